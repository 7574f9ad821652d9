"""Training checkpoints that are whole or do not count: `checkpoints/step-N/` with every file's sha256 in a record.

1. `begin`: every process copies its share of the state to host memory and goes on training; a thread of its own writes
   the copy under `step-N/` (`model.snapshot`).
2. `commit`, as soon as all have written: rank 0 gathers the digests and writes `COMMITTED.json`, last. A directory
   without it is the rest of a killed run.
3. `restore` takes the newest committed checkpoint whose files are as they were written; one that is not is named and
   removed, and the one before it is taken. How many processes wrote it, and with which ZeRO stage, does not matter.

Kept are the newest, the multiples of `keep_every`, and the one that a loss spike would go back to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from model.engine import Engine
from model.runstate import RunState
from model.snapshot import Snapshot, file_of, load
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.storage import Folder, Receipt, StorageError

RECORD = "COMMITTED.json"
_FORMAT = 2
_log = logging.getLogger(__name__)


class _DamagedError(Exception):
    """A checkpoint cannot be used; the message says why."""


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What `COMMITTED.json` says."""

    step: int
    world_size: int
    zero_stage: int
    files: tuple[SavedFile, ...]
    metrics_bytes: int
    state: RunState

    def to_json(self) -> bytes:
        """The record as readable JSON."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> Record:
        """Parse a record."""
        try:
            tree = json.loads(data)
            if tree.pop("format") != _FORMAT:
                raise ValueError("another format")
            files = tuple(SavedFile(**entry) for entry in tree.pop("files"))
            return Record(files=files, state=RunState(**tree.pop("state")), **tree)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _DamagedError(f"{RECORD} is not readable ({error})") from None


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    metrics_bytes: int
    state: RunState
    files: Future[list[SavedFile]]


class Checkpoints:
    """The checkpoints of a run. Every process has to call every method that is not marked as its own affair.

    Args:
        folder: the stage's directory; they lie below its `checkpoints/`.
        world: the processes.
        engines: whose state they hold.
        config: of the stage.
    """

    def __init__(self, folder: Folder, world: World, engines: Sequence[Engine], config: PretrainConfig) -> None:
        self.place = folder / "checkpoints"
        self._world, self._engines, self._config = world, engines, config
        self.newest = 0
        """Step of the checkpoint begun or restored last."""
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._snapshots = self._writer.submit(self._prepare)

    def begin(self, step: int, state: RunState, metrics_bytes: int) -> None:
        """Start to save the state after `step` steps; returns as soon as it is copied.

        Args:
            step: done so far.
            state: of the run.
            metrics_bytes: length of the metrics file, of which so much will be durable at the commit.

        Raises:
            StorageError: the checkpoint before could not be written.
        """
        assert self._pending is None, "the one before has to be committed"
        if self._world.is_first:
            self._remove(step)
        self._world.wait()
        for snapshot in self._snapshots.result():
            snapshot.take()
        state = RunState(**asdict(state))
        self.newest = step
        self._pending = _Pending(step, metrics_bytes, state, self._writer.submit(self._write, step))

    def _prepare(self) -> list[Snapshot]:
        """Runs in the background: memory for what this process owns. Without ZeRO that is all, and rank 0 keeps it."""
        owns = self._config.zero_stage > 0 or self._world.is_first
        return [Snapshot(engine) for engine in self._engines] if owns else []

    @property
    def is_pending(self) -> bool:
        """Whether one is begun and not committed; the same on all processes."""
        return self._pending is not None

    def has_written(self) -> bool:
        """Whether this process is through with its files of the pending checkpoint: its own affair."""
        return self._pending is not None and self._pending.files.done()

    def commit(self) -> None:
        """Wait until all have written the pending checkpoint, make it count, and remove those that are too old.

        Raises:
            StorageError: a process could not write its files; on every process, and the checkpoint before stands.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        saved: list[SavedFile] = []
        problem = None
        try:
            saved = pending.files.result()
        except StorageError as error:
            problem = str(error)
        for found in self._world.collect(problem):
            if found is not None:
                raise StorageError(found)
        files = tuple(file for found in self._world.collect(saved) for file in found)
        if self._world.is_first:
            stage = self._config.zero_stage
            record = Record(pending.step, self._world.size, stage, files, pending.metrics_bytes, pending.state)
            self.place.write(f"{_name(pending.step)}/{RECORD}", record.to_json())
            for step in self._outdated():
                self._remove(step)
        self._world.wait()

    def restore(self, metrics_bytes: int) -> Record | None:
        """Bring the engines to the newest checkpoint that is undamaged; None where there is none.

        Args:
            metrics_bytes: length of the metrics file; a checkpoint that knew a longer one cannot be continued.
        """
        if self._world.is_first:
            self._clear_leftovers()
        for step in self._world.share(self._committed() if self._world.is_first else []):
            try:
                record = self._record(step, metrics_bytes)
                wanted = self._wanted(record)
                with self._verified(record, wanted) as directory:
                    for engine in self._engines:
                        load(engine, [directory / path for path in wanted if path.startswith(f"{engine.name}/")])
            except _DamagedError as damage:
                if self._world.is_first:
                    _log.warning("checkpoint %s is damaged and will be removed: %s", _name(step), damage)
                    self._remove(step)
                continue
            self._world.wait()
            self.newest = step
            return record
        return None

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run takes another way from there."""
        if self._world.is_first:
            for later in self._committed():
                if later > step:
                    self._remove(later)
        self._world.wait()

    def _write(self, step: int) -> list[SavedFile]:
        """Runs in the background."""
        saved = []
        for snapshot in self._snapshots.result():
            path = file_of(snapshot.engine.name, self._world.rank)
            with self.place.publish(f"{_name(step)}/{path}") as sink:
                snapshot.write(sink)
            saved.append(SavedFile(path, sink.receipt.bytes, sink.receipt.sha256))
        return saved

    def _record(self, step: int, metrics_bytes: int) -> Record:
        written = self.place.read(f"{_name(step)}/{RECORD}") if self._world.is_first else b""
        record = Record.from_json(self._world.share(written))
        if record.metrics_bytes > metrics_bytes:
            raise _DamagedError(f"metrics.jsonl had {record.metrics_bytes} bytes then and has {metrics_bytes} now")
        return record

    def _wanted(self, record: Record) -> list[str]:
        """The files that this process reads: its own where the processes are as they were, else all."""
        paths = [file.path for file in record.files]
        same = (record.world_size, record.zero_stage) == (self._world.size, self._config.zero_stage)
        if not same or not self._config.zero_stage:
            return paths
        mine = {file_of(engine.name, self._world.rank) for engine in self._engines}
        return [path for path in paths if path in mine]

    @contextlib.contextmanager
    def _verified(self, record: Record, wanted: list[str]) -> Iterator[Path]:
        """A local directory with the wanted files, after every file was checked by some process.

        Raises:
            _DamagedError: on every process, when any found something.
        """
        home = self.place / _name(record.step)
        with tempfile.TemporaryDirectory(prefix="mdeberta-checkpoint-") as scratch:
            local = Folder(home.path() if home.is_local else scratch)
            checked = [file for file in record.files if file.path in wanted]
            if len(wanted) == len(record.files):  # all read all: they share the checking
                checked = checked[self._world.rank :: self._world.size]
            problem = None
            try:
                if not home.is_local:
                    for path in wanted:
                        Path(local.path(path)).parent.mkdir(parents=True, exist_ok=True)
                        home.fs.get_file(home.path(path), local.path(path))
                problem = next(filter(None, (_problem(local, file) for file in checked)), None)
            except FileNotFoundError as error:
                problem = f"{error.filename or error} is missing"
            for found in self._world.collect(problem):
                if found is not None:
                    raise _DamagedError(found)
            yield Path(local.path())

    def _committed(self) -> list[int]:
        """Steps of the committed checkpoints, newest first."""
        names = [name for name in self.place.folders() if name.startswith("step-") and name[5:].isdigit()]
        return sorted((int(name[5:]) for name in names if self.place.exists(f"{name}/{RECORD}")), reverse=True)

    def _outdated(self) -> list[int]:
        """Steps of the committed checkpoints that need not be kept."""
        config, committed = self._config, self._committed()
        kept = set(committed[: config.keep_checkpoints])
        if config.keep_every:
            kept |= {step for step in committed if step % config.keep_every == 0}
        if config.spikes.factor:
            kept |= {max((step for step in committed if step % config.spikes.rollback_every == 0), default=0)}
        return [step for step in committed if step not in kept]

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, its record first: a kill in between leaves no record of missing files."""
        self.place.remove(f"{_name(step)}/{RECORD}", _name(step))

    def _clear_leftovers(self) -> None:
        """Remove what killed runs left: directories without a record."""
        whole = {_name(step) for step in self._committed()}
        self.place.remove(*(name for name in self.place.folders() if name not in whole))


def _problem(local: Folder, file: SavedFile) -> str | None:
    """What is wrong with a file, or None."""
    if not local.exists(file.path):
        return f"{file.path} is missing"
    if local.digest(file.path) != Receipt(file.bytes, file.sha256):
        return f"{file.path} is altered"
    return None


def _name(step: int) -> str:
    return f"step-{step}"
