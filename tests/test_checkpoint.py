"""Checkpoints as they lie on a disk: which one is taken, what counts as damage, and what only ends a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import flip_bit, tree

from model.checkpoint import RECORD, Checkpoints
from model.fragments import Fragment
from model.runstate import RunState
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError
from pipeline.storage import Folder, StorageError

CONFIG = PretrainConfig(zero_stage=1, keep_checkpoints=9)
SIZE = 6


class Alike(World):
    """Processes of which every one would say what this one says."""

    def share(self, value: Any) -> Any:
        return value

    def collect(self, value: Any) -> list[Any]:
        return [value] * self.size

    def wait(self) -> None:
        pass


class Weights:
    """An engine of one parameter, of which this process owns [start, stop)."""

    name = "generator"

    def __init__(self, value: float = 0.0, start: int = 0, stop: int = SIZE) -> None:
        self.fragment = Fragment("words", start, *(torch.full((stop - start,), value + kind) for kind in range(3)))

    def fragments(self) -> list[Fragment]:
        return [self.fragment]

    def counters(self) -> dict[str, float]:
        return {"updates": 1}

    def restore(self, counters: dict[str, float]) -> None:
        assert counters == self.counters()


def checkpoints(folder: Path | str, engine: Any, rank: int = 0, size: int = 1) -> Checkpoints:
    return Checkpoints(Folder(str(folder)), Alike(rank, size, torch.device("cpu"), None), [engine], CONFIG)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A stage with checkpoints of steps 1 to 3, whose weights are all 1, 2 and 3; the folder of them."""
    engine = Weights()
    written = checkpoints(tmp_path, engine)
    for step in (1, 2, 3):
        engine.fragment.weight.fill_(step)
        written.begin(step, RunState(), 1000)
        written.commit()
    return tmp_path / "checkpoints"


def change_record(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((path / RECORD).read_text())
    change(record)
    (path / RECORD).write_text(json.dumps(record))


def test_the_newest_up_to_a_step_is_taken(saved: Path) -> None:
    engine = Weights()
    found = checkpoints(saved.parent, engine)
    for at_most, step in ((2, 2), (10, 3)):
        record = found.restore(at_most)
        assert record and (record.step, found.newest) == (step, step)
        assert engine.fragment.weight.tolist() == [step] * SIZE
    assert found.restore(at_most=0) is None
    assert found.newest == 0


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "record"])
def test_a_damaged_one_is_set_aside_and_the_one_before_taken(
    saved: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    victim = saved / "step-3" / "generator" / "rank-00000.safetensors"
    if damage == "flipped":
        flip_bit(victim)
    elif damage == "short":
        victim.write_bytes(victim.read_bytes()[:-4])
    elif damage == "missing":
        victim.unlink()
    else:
        (saved / "step-3" / RECORD).write_bytes(b'{"format')
    before = tree(saved / "step-3")
    record = checkpoints(saved.parent, Weights()).restore()
    assert record and record.step == 2
    assert tree(saved / "damaged-step-3") == before
    assert "checkpoint step-3 is damaged, from now on it is called damaged-step-3: " in caplog.text
    record = checkpoints(saved.parent, Weights()).restore()  # what was set aside stays there
    assert record and record.step == 2
    assert tree(saved / "damaged-step-3") == before


def test_one_on_a_store_is_set_aside_too() -> None:
    engine, folder = Weights(), Folder("memory://checkpoints-of-a-run")
    written = checkpoints(folder.url, engine)
    for step in (1, 2):
        engine.fragment.weight.fill_(step)
        written.begin(step, RunState(), 0)
        written.commit()
    path = "checkpoints/step-2/generator/rank-00000.safetensors"
    folder.write(path, folder.read(path)[:-4])
    record = checkpoints(folder.url, engine).restore()
    assert record and record.step == 1
    assert engine.fragment.weight.tolist() == [1] * SIZE
    assert set(folder.files("checkpoints")) == {
        f"checkpoints/{name}/{file}"
        for name in ("step-1", "damaged-step-2")
        for file in (RECORD, "generator/rank-00000.safetensors")
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(format=3), r"step-3 has format 3 of checkpoints, this version reads 2; go on"),
        (lambda record: record["state"].update(moon=1), r"step-3 has a record of another version, .*'moon'; go on"),
        (lambda record: record.pop("step"), r"step-3 has a record of another version, .*'step'; go on"),
    ],
)
def test_one_of_another_version_ends_the_run_and_stays(
    saved: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    change_record(saved / "step-3", change)
    before = tree(saved)
    with pytest.raises(PipelineError, match=words):
        checkpoints(saved.parent, Weights()).restore()
    assert tree(saved) == before


def test_one_that_cannot_be_read_ends_the_run_and_stays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(5, os.strerror(5), "disk")

    before = tree(saved)
    with monkeypatch.context() as broken, pytest.raises(StorageError, match=r"step-3: could not be read \(Input/"):
        broken.setattr(Folder, "digest", failing)
        checkpoints(saved.parent, Weights()).restore()
    with monkeypatch.context() as full, pytest.raises(StorageError, match=r"step-3: could not be read \(Input/"):
        full.setattr("tempfile.TemporaryDirectory", failing)
        checkpoints(saved.parent, Weights()).restore()
    assert tree(saved) == before


def test_a_file_that_is_as_it_was_written_and_none_of_ours_is_named(saved: Path) -> None:
    path = saved / "step-3" / "generator" / "rank-00000.safetensors"
    path.write_bytes(b"nonsense")
    digest = Folder(str(path.parent)).digest(path.name)
    change_record(saved / "step-3", lambda record: record["files"][0].update(sha256=digest.sha256, bytes=digest.bytes))
    with pytest.raises(StorageError, match="step-3: could not be read"):
        checkpoints(saved.parent, Weights()).restore()


@pytest.mark.parametrize(("border", "whole"), [(3, True), (4, True), (2, False)])
def test_where_a_processes_own_file_does_not_do_all_are_read(saved: Path, border: int, whole: bool) -> None:
    """Two processes met at element 3, or 4, or there is a gap; this one now owns [0, 4)."""
    folder, files = saved / "step-3" / "generator", []
    for rank, (start, stop) in enumerate(((0, border), (3 if border < 3 else border, SIZE))):
        name = f"rank-{rank:05d}.safetensors"
        tensors = {f"words/{kind}": torch.arange(start, stop).float() for kind in ("weight", "exp_avg", "exp_avg_sq")}
        metadata = {"starts": json.dumps({"words": start}), "counters": json.dumps({"updates": 1})}
        save_file(tensors, str(folder / name), metadata)
        found = Folder(str(folder)).digest(name)
        files.append({"path": f"generator/{name}", "bytes": found.bytes, "sha256": found.sha256})
    change_record(saved / "step-3", lambda record: record.update(files=files, world_size=2))
    engine = Weights(stop=4)
    found = checkpoints(saved.parent, engine, size=2)
    if whole:
        found.restore()
        assert engine.fragment.weight.tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(PipelineError, match=r"checkpoints/step-3 lacks element 2 of words; move it away"):
            found.restore()


def test_what_makes_checkpoints_impossible_is_known_before_the_first_one(tmp_path: Path) -> None:
    engine: Any = Weights()
    engine.fragments = lambda: [][0]
    found = checkpoints(tmp_path, engine)
    found._snapshots.exception()  # it is made in the background
    with pytest.raises(IndexError):
        found.raise_failure()
