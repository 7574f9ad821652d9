"""Publishing broken on purpose: a run that is killed, or meets a failing disk, exactly at the n-th point it passes.

The points are functions of `pipeline.storage` and the removal of a tree; a quiet run lists those it passes.
"""

from __future__ import annotations

import functools
import lzma
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from support import tree, write_corpus

from pipeline import configfile, storage
from pipeline.errors import PipelineError
from pipeline.execute import run_stages

STAGES = ("corpus", "vocab", "tokens")
POINTS = {
    "create": (storage, "create"),
    "write": (storage.Sink, "write"),
    "fsync": (storage, "sync_file"),
    "replace": (storage, "replace"),
    "fsync of the directory": (storage, "sync_folder"),
    "remove": (LocalFileSystem, "rm"),
}
TEXTS = {
    "en": [f"Document number {n} says something of its own, and then some more." for n in range(40)],
    "sw": [f"Hati ya {n} inasema jambo lake, na tena maneno mengine machache." for n in range(30)]
    + [".\u200b", "\u200b"],
}


@dataclass(frozen=True)
class Passage:
    """One point that a run passed, and what was being published: part, work part, record, manifest and so on."""

    point: str
    file: str

    def __str__(self) -> str:
        return f"{self.point} of {self.file}"


def kind(path: str) -> str:
    """What a path in a stage's directory is, where it matters to the commit."""
    name = Path(path).name.split(storage.TEMPORARY)[0].lstrip(".")
    known = {
        "MANIFEST.json": "the manifest",
        "STAGE.json": "the identity",
        "_begun.json": "the beginning",
        "_parts": "all records",
        "_work": "all work parts",
    }
    inside = {
        "/checkpoints/": "a checkpoint",
        "/_parts/_work/": "a work record",
        "/_parts/": "a record",
        "/_work/": "a work part",
    }
    return known.get(name) or next((word for folder, word in inside.items() if folder in path), "a part")


@contextmanager
def watched(at: int | None = None, act: Callable[[], None] = lambda: None) -> Iterator[list[Passage]]:
    """List the points that the block passes; `act` before the point of that number and before all that follow it."""
    passed: list[Passage] = []
    last = [""]

    def wrap(point: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def passing(*arguments: Any, **keywords: Any) -> Any:
            if point not in ("write", "fsync of the directory"):  # they are not told the file: it is the last one
                last[0] = str(arguments[1 if point in ("replace", "remove") else 0])
            if "/logs/" in last[0]:
                return real(*arguments, **keywords)
            passed.append(Passage(point, kind(last[0])))
            if at is not None and len(passed) > at:
                act()
            return real(*arguments, **keywords)

        return passing

    with pytest.MonkeyPatch.context() as patch:
        for point, (owner, name) in POINTS.items():
            patch.setattr(owner, name, wrap(point, getattr(owner, name)))
        yield passed


def fail_with(code: int) -> Callable[[], None]:
    """An action: what the operating system does where a disk is full or broken."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def tiny(work: Path | str, inputs: Path | str) -> list[str]:
    """The overrides that name a run of a second a stage, on `TEXTS`."""
    keys = {
        "work_dir": work, "corpus.inputs": f"['{inputs}/*']", "corpus.workers": 1, "corpus.chunk_mb": 0.001,
        "corpus.shard_mb": 0.002, "vocab.size": 100, "vocab.sample_mb": 0.01, "vocab.num_threads": 1,
        "tokens.max_seq_len": 32, "tokens.workers": 1, "tokens.validation_fraction": 0.2,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items()]


def run(overrides: list[str], stage: str) -> None:
    """Run one stage in this process."""
    run_stages(configfile.load("demo", overrides), [stage])


def killed_at(number: int, overrides: list[str], stage: str) -> bool:
    """Run a stage in a process of its own that ends by `kill -9` at its n-th point; whether it came so far."""
    process = _processes().Process(target=_die_at, args=(number, overrides, stage))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@functools.cache
def _processes() -> Any:
    """Processes that begin with everything imported, so that a trial takes no longer than its stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults", "pipeline.corpus", "tokenizer.train", "tokenizer.encode"])
    return context


def _die_at(number: int, overrides: list[str], stage: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with watched(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        run(overrides, stage)


class Quiet:
    """The tiny run without any fault, and the points that each of its stages passes."""

    def __init__(self, root: Path) -> None:
        self.inputs = write_corpus(root / "in", TEXTS)
        plain = self.inputs / "sw.txt"
        (self.inputs / "sw.txt.xz").write_bytes(lzma.compress(plain.read_bytes()))
        plain.unlink()
        self.work = root / "work"
        self.passed: dict[str, list[Passage]] = {}
        for stage in STAGES:
            with watched() as passed:
                run(tiny(self.work, self.inputs), stage)
            self.passed[stage] = passed

    def first_of_each(self, stage: str) -> list[int]:
        """The number of the first passage of every point for every kind of file."""
        return [self.passed[stage].index(passage) for passage in dict.fromkeys(self.passed[stage])]

    def prepare(self, stage: str, work: Path) -> list[str]:
        """A work directory with what the stage reads; returns the overrides that name it."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for upstream in STAGES[: STAGES.index(stage)]:
            shutil.copytree(self.work / upstream, work / upstream)
        return tiny(work, self.inputs)

    def check(self, stage: str, work: Path) -> None:
        """The stage's directory holds the files of the quiet run and no other one."""
        assert tree(work / stage) == tree(self.work / stage)

    def kill_at(self, number: int, stage: str, work: Path) -> None:
        """Kill the stage at a point, run it again and check its directory."""
        overrides = self.prepare(stage, work)
        assert killed_at(number, overrides, stage), self.passed[stage][number]
        run(overrides, stage)
        self.check(stage, work)

    def fail_at(self, number: int, code: int, stage: str, work: Path) -> None:
        """Let everything fail from a point on, check what is told and left, run again and check the directory."""
        overrides = self.prepare(stage, work)
        with pytest.raises(PipelineError) as told, watched(number, fail_with(code)):
            run(overrides, stage)
        sentence = str(told.value)
        assert str(work / stage) in sentence and os.strerror(code) in sentence, self.passed[stage][number]
        assert "run the same command again" in sentence and "\n" not in sentence and storage.TEMPORARY not in sentence
        assert not [name for name in tree(work) if storage.TEMPORARY in name]
        run(overrides, stage)
        self.check(stage, work)


def left_behind() -> list[str]:
    """Temporary files of publishing in the system's folder for them."""
    return sorted(path.name for path in Path(tempfile.gettempdir()).glob("mdeberta-*"))
