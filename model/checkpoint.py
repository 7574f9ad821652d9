"""Training checkpoints that are whole or do not count: `checkpoints/step-N/` with every file's sha256 in a record.

1. Every process lets DeepSpeed write its share into a temporary directory of its own, then publishes those files one by
   one under `step-N/` with their digests.
2. Rank 0 gathers the digests and writes `COMMITTED.json`, last: a directory without it is the rest of a killed run.
3. Resuming takes the newest committed checkpoint; every process checks the digests of the files it wrote. One damaged
   file, named in a warning, and the checkpoint before is taken. DeepSpeed's own `latest` file is never written or read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from model.engine import Engine
from model.world import World
from pipeline.errors import UserError
from pipeline.storage import TEMPORARY, Folder, Receipt, redact

RECORD = "COMMITTED.json"
_FORMAT = 1
_log = logging.getLogger(__name__)


class _DamagedError(Exception):
    """A checkpoint cannot be used; the message says why."""


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint and the process that wrote it."""

    path: str
    bytes: int
    sha256: str
    rank: int


@dataclass(frozen=True)
class Record:
    """What `COMMITTED.json` says."""

    step: int
    world_size: int
    files: tuple[SavedFile, ...]
    metrics_bytes: int

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
            return Record(files=tuple(SavedFile(**entry) for entry in tree.pop("files")), **tree)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _DamagedError(f"{RECORD} is not readable ({error})") from None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: the stage's directory; they lie below its `checkpoints/`.
        world: the processes, which all have to call every method here.
        keep: newest ones kept.
    """

    folder: Folder
    world: World
    keep: int

    @property
    def place(self) -> Folder:
        """The directory of all checkpoints."""
        return self.folder / "checkpoints"

    def save(self, step: int, engines: Iterable[Engine], metrics_bytes: int) -> None:
        """Save the state after `step` steps, then remove checkpoints that are too old."""
        name = _name(step)
        if self.world.is_first:
            self._remove(step)
        self.world.wait()
        with self._scratch() as scratch:
            for engine in engines:
                engine.save(scratch)
            mine = [self._publish(path, scratch, name) for path in sorted(scratch.rglob("*")) if path.is_file()]
        files = tuple(file for found in self.world.collect(mine) for file in found)
        if self.world.is_first:
            record = Record(step, self.world.size, files, metrics_bytes)
            self.place.write(f"{name}/{RECORD}", record.to_json())
            for old in self._committed()[self.keep :]:
                self._remove(old)
        self.world.wait()

    def restore(self, engines: Iterable[Engine], metrics_bytes: int) -> Record | None:
        """Bring the engines to the newest checkpoint that is undamaged; None where there is none.

        Args:
            engines: as they were saved.
            metrics_bytes: length of the metrics file; a checkpoint that knew a longer one cannot be continued.

        Raises:
            UserError: it was written by another number of processes.
        """
        if self.world.is_first:
            self._clear_leftovers()
        for step in self.world.share(self._committed() if self.world.is_first else []):
            try:
                record = self._usable(step, metrics_bytes)
            except _DamagedError as damage:
                if self.world.is_first:
                    _log.warning("checkpoint %s is damaged and will be removed: %s", _name(step), damage)
                    self._remove(step)
                continue
            self._load(record, engines)
            return record
        return None

    def _usable(self, step: int, metrics_bytes: int) -> Record:
        """The record of a checkpoint whose files are all as they were written."""
        written = self.place.read(f"{_name(step)}/{RECORD}") if self.world.is_first else b""
        record = Record.from_json(self.world.share(written))
        if record.world_size != self.world.size:
            raise UserError(
                f"{redact(self.place.url)}/{_name(step)} was written by {record.world_size} processes and this run has "
                f"{self.world.size}; continue with {record.world_size} (pretrain.launcher.processes)"
            )
        if record.metrics_bytes > metrics_bytes:
            raise _DamagedError(f"metrics.jsonl had {record.metrics_bytes} bytes then and has {metrics_bytes} now")
        for problem in self.world.collect(self._problem(record)):
            if problem is not None:
                raise _DamagedError(problem)
        return record

    def _problem(self, record: Record) -> str | None:
        """What is wrong with the files that this process wrote, or None."""
        home = self.place / _name(record.step)
        for file in record.files:
            if file.rank == self.world.rank:
                if not home.exists(file.path):
                    return f"{file.path} is missing"
                if home.digest(file.path) != Receipt(file.bytes, file.sha256):
                    return f"{file.path} is altered"
        return None

    def _committed(self) -> list[int]:
        """Steps of the committed checkpoints, newest first."""
        names = [name for name in self.place.folders() if name.startswith("step-") and name[5:].isdigit()]
        return sorted((int(name[5:]) for name in names if self.place.exists(f"{name}/{RECORD}")), reverse=True)

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, its record first: a kill in between leaves no record of missing files."""
        self.place.remove(f"{_name(step)}/{RECORD}", _name(step))

    def _clear_leftovers(self) -> None:
        """Remove what killed runs left: directories without a record."""
        whole = {_name(step) for step in self._committed()}
        self.place.remove(*(name for name in self.place.folders() if name not in whole))

    def _load(self, record: Record, engines: Iterable[Engine]) -> None:
        with self._fetched(record) as directory:
            for engine in engines:
                engine.load(directory)
        self.world.wait()

    @contextlib.contextmanager
    def _fetched(self, record: Record) -> Iterator[Path]:
        """A local directory with the files this process reads: its own, and what rank 0 wrote for all."""
        home = self.place / _name(record.step)
        if home.is_local:
            yield Path(home.path())
            return
        with tempfile.TemporaryDirectory(prefix="mdeberta-checkpoint-") as scratch:
            for file in record.files:
                if file.rank in {0, self.world.rank}:
                    target = Path(scratch) / file.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    home.fs.get_file(home.path(file.path), str(target))
            yield Path(scratch)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A temporary directory of this process, on the checkpoints' own disk where they are on one."""
        parent = self.place.path() if self.place.is_local else None
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"rank-{self.world.rank}{TEMPORARY}", dir=parent) as path:
            yield Path(path)

    def _publish(self, path: Path, scratch: Path, name: str) -> SavedFile:
        relative = path.relative_to(scratch).as_posix()
        receipt = Folder(str(scratch)).digest(relative)
        with self.place.publish_file(f"{name}/{relative}") as temporary:
            shutil.move(path, temporary)
        return SavedFile(relative, receipt.bytes, receipt.sha256, self.world.rank)


def _name(step: int) -> str:
    return f"step-{step}"
