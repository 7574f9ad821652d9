"""This process's share of an engine's state: copied to host memory at once, written from there while training goes on.

    training thread      copy fragments -> buffers                      (the only time training stands still)
    background           buffers -> ENGINE/rank-R.safetensors           (12 bytes a parameter over all processes)

A file holds every fragment's tensors under `NAME/KIND`, and in its metadata the fragments' starts and the engine's
counters. Nothing in it depends on how many processes or which ZeRO stage wrote it, so `Stored` puts the state together
for any others: it looks up, in all files, the ranges that this process owns. Where the processes are the same, that is
the file which this one wrote.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from model.engine import Engine
from model.fragments import KINDS
from model.tensorfile import Writable, write_tensors


def file_of(engine: str, rank: int) -> str:
    """Where in a checkpoint a process's share of an engine is."""
    return f"{engine}/rank-{rank:05d}.safetensors"


class Snapshot:
    """Host memory for this process's share of one engine, used again at every checkpoint."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        pinned = any(fragment.weight.is_cuda for fragment in engine.fragments())
        self._buffers = {
            f"{fragment.name}/{kind}": torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            for fragment in engine.fragments()
            for kind, tensor in fragment.tensors()
        }
        for buffer in self._buffers.values():
            buffer.zero_()  # has the kernel hand out the pages now, not while training stands still
        self._metadata: dict[str, str] = {}

    def take(self) -> None:
        """Copy the state as it is now."""
        found = self.engine.fragments()
        for fragment in found:
            for kind, tensor in fragment.tensors():
                self._buffers[f"{fragment.name}/{kind}"].copy_(tensor, non_blocking=True)
        starts = {fragment.name: fragment.start for fragment in found}
        self._metadata = {"starts": json.dumps(starts), "counters": json.dumps(self.engine.counters())}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def write(self, sink: Writable) -> None:
        """Write what was copied last."""
        write_tensors(sink, self._buffers, self._metadata)


class _Source(NamedTuple):
    """A stored fragment: elements [start, stop) of a parameter, in a file."""

    start: int
    stop: int
    file: Any


class Stored:
    """The state of an engine in files; as a context it keeps them open.

    Args:
        engine: any ZeRO stage, any number of processes.
        paths: the files, of any processes.
    """

    def __init__(self, engine: Engine, paths: Iterable[Path]) -> None:
        self._engine, self._paths = engine, paths
        self._sources: dict[str, list[_Source]] = defaultdict(list)
        self._counters: dict[str, float] = {}

    def __enter__(self) -> Stored:
        with ExitStack() as stack:
            for path in self._paths:
                file = stack.enter_context(safe_open(path, "pt"))
                self._counters = json.loads(file.metadata()["counters"])
                for name, start in json.loads(file.metadata()["starts"]).items():
                    stop = start + file.get_slice(f"{name}/{KINDS[0]}").get_shape()[0]
                    self._sources[name].append(_Source(start, stop, file))
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def lacks(self) -> str | None:
        """The first element of this process's fragments that is in none of the files; None where they hold all."""
        for fragment in self._engine.fragments():
            at, end = fragment.start, fragment.start + len(fragment.weight)
            while at < end:
                source = self._source(fragment.name, at)
                if source is None:
                    return f"element {at:,} of {fragment.name}"
                at = source.stop
        return None

    @torch.no_grad()
    def load(self) -> None:
        """Bring the engine to this state, of which nothing may be lacking. Every process has to call it."""
        for fragment in self._engine.fragments():
            at, end = fragment.start, fragment.start + len(fragment.weight)
            while at < end:
                source = self._source(fragment.name, at)
                assert source, "asked for before"
                stop = min(end, source.stop)
                for kind, tensor in fragment.tensors():
                    part = source.file.get_slice(f"{fragment.name}/{kind}")[at - source.start : stop - source.start]
                    tensor[at - fragment.start : stop - fragment.start].copy_(part)
                at = stop
        self._engine.restore(self._counters)

    def _source(self, name: str, at: int) -> _Source | None:
        return next((source for source in self._sources[name] if source.start <= at < source.stop), None)
