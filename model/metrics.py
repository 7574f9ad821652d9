"""What a run says of itself while it trains: `metrics.jsonl`, TensorBoard, and a bar or a line now and then.

`metrics.jsonl` has at most one line a step. A checkpoint remembers how long the file was; a resumed run cuts it there
and goes on, so no step is ever in it twice. `deterministic` leaves out what depends on the clock, for the stage's
`losses.jsonl`. On an object store the files are kept in a local folder and uploaded with every checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.config import PretrainConfig
from pipeline.storage import Folder

METRICS_FILE = "metrics.jsonl"
_TIMED = ("time", "seconds", "tokens_per_second", "model_tflops")
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
    """Appends to `metrics.jsonl` and TensorBoard of a stage's folder, and shows progress; rank 0 has one.

    Args:
        folder: of the stage.
        config: of the stage.
    """

    def __init__(self, folder: Folder, config: PretrainConfig) -> None:
        self._folder, self._config = folder, config
        self._spool = None if folder.is_local else tempfile.TemporaryDirectory(prefix="mdeberta-metrics-")
        self._local = Path(self._spool.name if self._spool else folder.path())
        self._path = self._local / METRICS_FILE
        self._file: BinaryIO | None = None
        self._writer: Any = None
        self._reporter: _Reporter | None = None

    def available(self) -> int:
        """Length of the file as earlier executions left it."""
        return self._folder.size(METRICS_FILE) if self._folder.exists(METRICS_FILE) else 0

    def begin(self, step: int, length: int) -> None:
        """Keep the first `length` bytes of the file, which reach up to `step`, and append from there on."""
        if self._spool and length:
            self._folder.fs.get_file(self._folder.path(METRICS_FILE), str(self._path))
        self._file = open(self._path, "ab")  # noqa: SIM115 - open for the whole run
        self._file.truncate(length)
        if "tensorboard" in self._config.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._local / "tensorboard"), purge_step=step + 1)
        self._reporter = _Reporter(step, self._config.steps)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a step's line; every loss gets a twin `..._hex` with all of its bits."""
        assert self._file and self._reporter, "begin comes first"
        exact = {f"{key}_hex": float(value).hex() for key, value in values.items() if key.endswith("loss")}
        self._file.write(json.dumps({"step": step, **values, **exact}).encode() + b"\n")
        self._file.flush()
        if self._writer:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
        if "tokens_per_second" in values:
            self._reporter.show(step, values)

    def sync(self) -> int:
        """Make everything written so far durable; the file's length."""
        assert self._file, "begin comes first"
        os.fsync(self._file.fileno())
        if self._writer:
            self._writer.flush()
        if self._spool:
            for path in sorted(path for path in self._local.rglob("*") if path.is_file()):
                self._folder.write(path.relative_to(self._local).as_posix(), path.read_bytes())
        return self._path.stat().st_size

    def deterministic(self) -> Iterator[bytes]:
        """The lines without the columns that depend on the clock."""
        with open(self._path, "rb") as file:
            for line in file:
                values = json.loads(line)
                yield json.dumps({key: value for key, value in values.items() if key not in _TIMED}).encode() + b"\n"

    def close(self) -> None:
        """Release files and the terminal; what has to last was made so by `sync`."""
        for opened in (self._reporter, self._writer, self._file):
            if opened:
                opened.close()
        if self._spool:
            self._spool.cleanup()


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

    def show(self, step: int, values: dict[str, float]) -> None:
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
