"""What a run says of itself while it trains: `metrics.jsonl`, trackers, and a bar or a line now and then.

`metrics.jsonl` has at most one line a step. A checkpoint remembers how long the file was; a resumed run cuts it there
and goes on, so no step is ever in it twice. `deterministic` leaves out what depends on the clock, for the stage's
`losses.jsonl`. On an object store the files are kept in a local folder and uploaded with every checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.trackers import Readings, Trackers
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError
from pipeline.storage import Folder, redact

METRICS_FILE = "metrics.jsonl"
_TIMED = (
    "time",
    "seconds",
    "data_seconds",
    "generator_seconds",
    "sampling_seconds",
    "discriminator_seconds",
    "optimizer_seconds",
    "checkpoint_seconds",
    "tokens_per_second",
    "model_tflops",
    "utilisation",
    "memory_mb",
)
_LINE_SECONDS = 30.0
_log = logging.getLogger(__name__)


class Speed:
    """Tokens a second of training alone; validation and checkpoints do not count."""

    def __init__(self) -> None:
        self._tokens, self._seconds, self._since = 0, 0.0, time.monotonic()

    def add(self, tokens: int) -> None:
        """The time since the last call went into so many tokens."""
        self._tokens += tokens
        self._seconds += time.monotonic() - self._since
        self.skip()

    def skip(self) -> None:
        """The time since the last call does not count."""
        self._since = time.monotonic()

    def take(self) -> tuple[int, float]:
        """Tokens and seconds since the last take."""
        taken = self._tokens, self._seconds
        self._tokens, self._seconds = 0, 0.0
        return taken


class MetricsLog:
    """Appends to `metrics.jsonl` of a stage's folder, feeds the trackers and shows progress; rank 0 has one.

    Args:
        folder: of the stage.
        config: of the stage.
        label: stage and fingerprint, which the run is called by in trackers.

    Raises:
        UserError: a tracker's package is not installed.
    """

    def __init__(self, folder: Folder, config: PretrainConfig, label: str) -> None:
        self._folder, self._config = folder, config
        self._trackers = Trackers(config, label.replace(" ", "-"))
        self._spool = None if folder.is_local else _spool()
        self._local = Path(self._spool.name if self._spool else folder.path())
        self._path = self._local / METRICS_FILE
        self._file: BinaryIO | None = None
        self._not_taken: set[str] = set()
        self._reporter: _Reporter | None = None

    def begin(self, step: int, length: int) -> None:
        """Keep the first `length` bytes of the file, which reach up to `step`, and append from there on.

        A file that has lost some of them is warned about, and its whole lines are kept. A run that goes back to an
        earlier checkpoint begins again.
        """
        self._end()
        if self._spool and length and self._folder.exists(METRICS_FILE):
            self._folder.fs.get_file(self._folder.path(METRICS_FILE), str(self._path))
        self._file = open(self._path, "ab")  # noqa: SIM115 - open for the whole run
        if (there := self._file.seek(0, os.SEEK_END)) < length:
            where = f"{redact(self._folder.url)}/{METRICS_FILE}"
            told = "%s had %d bytes at step %d and has %d: lines of earlier steps are missing in it and in losses.jsonl"
            _log.warning(told, where, length, step, there)
            length = self._path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)
        self._trackers.open(self._local, step)
        self._reporter = _Reporter(step, self._config.steps)

    def write(self, step: int, values: Readings) -> None:
        """Add a step's line; every loss of the step gets a twin `..._hex` with all of its bits.

        Raises:
            PipelineError: the line could not be written.
        """
        assert self._file and self._reporter, "begin comes first"
        scalars = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
        exact = {f"{key}_hex": float(value).hex() for key, value in scalars.items() if key.endswith("loss")}
        with self._explained():
            self._file.write(json.dumps({"step": step, **values, **exact}).encode() + b"\n")
            self._file.flush()
        self._trackers.log(step, {key: value for key, value in values.items() if key != "time"})
        if "tokens_per_second" in scalars:
            self._reporter.show(step, scalars)

    @property
    def length(self) -> int:
        """Length of the file so far."""
        assert self._file, "begin comes first"
        return self._file.tell()

    def sync(self) -> None:
        """Make everything written so far durable; on a store, of the trackers' files those that it takes.

        Raises:
            PipelineError: the disk or the store does not take the lines.
        """
        assert self._file, "begin comes first"
        with self._explained():
            os.fsync(self._file.fileno())
        self._trackers.flush()
        if self._spool:
            self._folder.write(METRICS_FILE, self._path.read_bytes())
            for path in sorted(path for path in self._local.rglob("*") if path.is_file() and path != self._path):
                self._upload(path)

    def _upload(self, path: Path) -> None:
        """Copy a tracker's file to the store; one that cannot be is named once."""
        name = path.relative_to(self._local).as_posix()
        try:
            self._folder.write(name, path.read_bytes())
        except (PipelineError, OSError) as error:
            if name not in self._not_taken:
                self._not_taken.add(name)
                _log.warning("pretrain: a tracker's file %s is not copied to the store (%s)", name, error)

    def deterministic(self) -> Iterator[bytes]:
        """The lines without the columns that depend on the clock or the machine."""
        with open(self._path, "rb") as file:
            for line in file:
                values = json.loads(line)
                yield json.dumps({key: value for key, value in values.items() if key not in _TIMED}).encode() + b"\n"

    def close(self) -> None:
        """Release files and the terminal; what has to last was made so by `sync`."""
        self._end()
        if self._spool:
            self._spool.cleanup()

    def _end(self) -> None:
        if self._reporter:
            self._reporter.close()
        self._trackers.close()
        if self._file:
            # Of a line that a full disk refused, the rest is tried again here.
            with contextlib.suppress(OSError):
                self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PipelineError(
                f"{redact(self._folder.url)}/{METRICS_FILE}: could not be written ({error.strerror or error}); free "
                "some space or repair what failed, then run the same command again to continue from the last checkpoint"
            ) from error


def _spool() -> tempfile.TemporaryDirectory[str]:
    """A folder for what a store gets; a tracker that did not close in time may write to it while it is removed."""
    return tempfile.TemporaryDirectory(prefix="mdeberta-metrics-", ignore_cleanup_errors=True)


class _Reporter:
    """Shows how far training is: a bar on a terminal, elsewhere a line of log every half minute."""

    def __init__(self, step: int, steps: int) -> None:
        self._steps = steps
        self._first, self._began = step, time.monotonic()
        self._spoken = -_LINE_SECONDS
        self._bar = None
        if sys.stderr.isatty() and _log.isEnabledFor(logging.INFO):
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=steps, completed=step)
            self._bar.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Tell of a finished step; `values` as for `MetricsLog.write`."""
        names = [name for name in ("generator", "discriminator") if f"{name}_loss" in values]
        losses = "  ".join(f"{name} {values[f'{name}_loss']:.3f}" for name in names)
        text = f"{losses}  {values['tokens_per_second']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._spoken >= _LINE_SECONDS or step == self._steps:
            self._spoken = time.monotonic()
            _log.info("pretrain: step %d/%d  %s  %s left", step, self._steps, text, self._left(step))

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._began) / max(1, step - self._first) * (self._steps - step)
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes} min"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
