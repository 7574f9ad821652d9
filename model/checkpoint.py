"""Training checkpoints that are whole or do not count: `checkpoints/step-N/` with every file's sha256 in a record.

1. `begin`: every process copies its share of the state to host memory and goes on training; a thread of its own writes
   the copy under `step-N/` (`model.snapshot`).
2. `commit`, as soon as all have written: rank 0 gathers the digests and writes `COMMITTED.json`, last. A directory
   without it is the rest of a killed run.
3. `restore` takes the newest committed checkpoint whose files are as they were written; one that is not is named and
   set aside as `damaged-step-N/`, and the one before it is taken. Whatever else keeps one from being read ends the run
   and changes nothing. How many processes wrote it, and with which ZeRO stage, does not matter.

Kept are the newest, the multiples of `keep_every`, and the one that a loss spike would go back to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from model.engine import Engine
from model.failure import CommonError
from model.runstate import RunState
from model.snapshot import Snapshot, Stored, file_of
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError
from pipeline.storage import Folder, Receipt, StorageError, redact

RECORD = "COMMITTED.json"
_FORMAT = 2
_ASIDE = "damaged-"
_log = logging.getLogger(__name__)


class _DamagedError(Exception):
    """A checkpoint is not what was written, and never will be; the message says why."""


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
    def from_json(data: bytes, where: str) -> Record:
        """Parse a record.

        Raises:
            CommonError: it is one of another version of this project.
        """
        try:
            tree = json.loads(data)
            found = int(tree.pop("format"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _DamagedError(f"{RECORD} is not readable ({error})") from None
        way_out = "go on with the version that wrote it, or move the directory away to go on from the checkpoint before"
        if found != _FORMAT:
            raise CommonError(f"{where} has format {found} of checkpoints, this version reads {_FORMAT}; {way_out}")
        try:
            files = tuple(SavedFile(**entry) for entry in tree.pop("files"))
            return Record(files=files, state=RunState(**tree.pop("state")), **tree)
        except (KeyError, TypeError) as error:
            raise CommonError(f"{where} has a record of another version, {error}; {way_out}") from None


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

    def raise_failure(self) -> None:
        """Raise what makes checkpoints impossible, as soon as it is known: its own affair.

        Raises:
            RuntimeError: there is no memory for the copy that a checkpoint is written from.
        """
        if self._snapshots.done():
            self._snapshots.result()

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

    def restore(self, at_most: float = math.inf) -> Record | None:
        """Bring the engines to the newest checkpoint that is undamaged; None where there is none.

        Args:
            at_most: only checkpoints of steps up to this one.

        Raises:
            StorageError: a checkpoint cannot be read at present.
            PipelineError: one is of another version, or lacks something.
        """
        if self._world.is_first:
            self._clear_leftovers()
        self.newest = 0
        committed = self._world.share(self._committed() if self._world.is_first else [])
        for step in (step for step in committed if step <= at_most):
            with self._explained(step):
                try:
                    record = self._record(step)
                    self._load(record)
                except _DamagedError as damage:
                    if self._world.is_first:
                        self._set_aside(step, str(damage))
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

    def _record(self, step: int) -> Record:
        written = self.place.read(f"{_name(step)}/{RECORD}") if self._world.is_first else b""
        return Record.from_json(self._world.share(written), self._url(step))

    def _load(self, record: Record) -> None:
        """Bring the engines to a checkpoint's state.

        Raises:
            _DamagedError: on every process, before anything was changed.
        """
        lacking = None
        for wanted in self._choices(record):
            with self._verified(record, wanted) as directory, contextlib.ExitStack() as stack:
                found = [
                    stack.enter_context(
                        Stored(engine, [directory / path for path in wanted if path.startswith(f"{engine.name}/")])
                    )
                    for engine in self._engines
                ]
                mine = next(filter(None, (stored.lacks() for stored in found)), None)
                lacking = next(filter(None, self._world.collect(mine)), None)
                if lacking is None:
                    for stored in found:
                        stored.load()
                    return
        raise CommonError(f"{self._url(record.step)} lacks {lacking}; move it away to go on from the checkpoint before")

    def _choices(self, record: Record) -> list[list[str]]:
        """The files to read: this process's own where the processes are as they were, and should those not do, all."""
        paths = [file.path for file in record.files]
        mine = {file_of(engine.name, self._world.rank) for engine in self._engines}
        same = (record.world_size, record.zero_stage) == (self._world.size, self._config.zero_stage)
        return [[path for path in paths if path in mine], paths] if same and self._config.zero_stage else [paths]

    @contextlib.contextmanager
    def _verified(self, record: Record, wanted: list[str]) -> Iterator[Path]:
        """A local directory with the wanted files, after every file was checked by some process.

        Raises:
            _DamagedError: on every process, when any found one that is not as it was written.
        """
        home = self.place / _name(record.step)
        with tempfile.TemporaryDirectory(prefix="mdeberta-checkpoint-") as scratch:
            local = Folder(home.path() if home.is_local else scratch)
            checked = [file for file in record.files if file.path in wanted]
            if home.is_local and len(wanted) == len(record.files):  # all read all: they share the checking
                checked = checked[self._world.rank :: self._world.size]
            damage = None
            try:
                if not home.is_local:
                    for path in wanted:
                        Path(local.path(path)).parent.mkdir(parents=True, exist_ok=True)
                        home.fs.get_file(home.path(path), local.path(path))
                damage = next(filter(None, (_damage(local, file) for file in checked)), None)
            except FileNotFoundError as error:
                damage = f"{error.filename or error} is missing"
            for found in self._world.collect(damage):
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

    def _set_aside(self, step: int, damage: str) -> None:
        """Keep a damaged checkpoint under another name, for whoever can repair it."""
        aside = f"{_ASIDE}{_name(step)}"
        self.place.remove(aside)
        self.place.fs.mv(self.place.path(_name(step)), self.place.path(aside), recursive=True)
        _log.warning("checkpoint %s is damaged, from now on it is called %s: %s", _name(step), aside, damage)

    def _clear_leftovers(self) -> None:
        """Remove what killed runs left: directories without a record."""
        kept = {_name(step) for step in self._committed()}
        self.place.remove(*(name for name in self.place.folders() if name not in kept and not name.startswith(_ASIDE)))

    def _url(self, step: int) -> str:
        return f"{redact(self.place.url)}/{_name(step)}"

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turn an error of the system, the store or a file's format into a sentence."""
        try:
            yield
        except PipelineError:
            raise
        except (OSError, SafetensorError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            culprit = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
            raise StorageError(
                f"{self._url(step)}: could not be read ({reason}{culprit}); free some space or repair what failed, "
                "then run the same command again"
            ) from error


def _damage(local: Folder, file: SavedFile) -> str | None:
    """What is wrong with a file, or None."""
    if not local.exists(file.path):
        return f"{file.path} is missing"
    if local.digest(file.path) != Receipt(file.bytes, file.sha256):
        return f"{file.path} is altered"
    return None


def _name(step: int) -> str:
    return f"step-{step}"
