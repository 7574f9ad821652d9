"""Trackers that a run's numbers also go to: TensorBoard, Weights & Biases and trackio, behind one small interface.

None of them may cost a run: one that fails is warned about once and left out from then on, and a run that stops or
fails waits only so long for one. A resumed run continues its tracker's run, under the same name, and logs the lines
after its checkpoint again, with the same values as before: TensorBoard drops the old ones; the other two keep both,
drawn over one another on the axis `step`.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import PretrainConfig
from pipeline.errors import UserError
from pipeline.storage import redact

_STOP_SECONDS = 20.0  # batch systems and launchers kill after 30
_ERROR_SECONDS = 4.0  # the other processes are ending meanwhile
_log = logging.getLogger(__name__)

Readings = Mapping[str, "float | Readings"]
"""Numbers by name, and such groups of numbers by name."""


def flatten(readings: Readings, prefix: str = "") -> dict[str, float]:
    """One level of numbers; the names of what was nested are joined by slashes."""
    flat: dict[str, float] = {}
    for name, value in readings.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


class Tracker(Protocol):
    """One place for numbers. Every method may raise whatever the package behind it does."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take a step's numbers."""

    def flush(self) -> None:
        """Hand over what is still held back."""

    def close(self, failed: bool) -> None:
        """The end of this execution, for whatever reason; another thread than the others' may call it."""


class Trackers:
    """The trackers of a run's configuration, as one that never fails.

    Args:
        config: of the stage.
        run: what the run is called in a tracker, the same in every execution.

    Raises:
        UserError: a tracker's package is not installed.
    """

    def __init__(self, config: PretrainConfig, run: str) -> None:
        self._config, self._run = config, run
        self._open: dict[str, Tracker] = {}
        for name in config.trackers:
            _require(name)

    def open(self, folder: Path, step: int) -> None:
        """Begin, or continue after a step; what a tracker writes to files lies in `folder`."""
        for name in self._config.trackers:
            with self._forgiven(name):
                self._open[name] = _TRACKERS[name](self._config, self._run, folder, step)

    def log(self, step: int, readings: Readings) -> None:
        """Take a step's numbers."""
        self._each(lambda tracker: tracker.log(step, flatten(readings)))

    def flush(self) -> None:
        """Hand over what is still held back."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """The end of this execution; where an exception ends it, trackers are told so and get only so long."""
        error, _, _ = sys.exc_info()
        if error is None:
            self._each(lambda tracker: tracker.close(failed=False))
        else:
            self._close_within(_STOP_SECONDS if issubclass(error, SystemExit) else _ERROR_SECONDS)
        self._open.clear()

    def _close_within(self, seconds: float) -> None:
        def close(name: str, tracker: Tracker) -> None:
            with self._forgiven(name):
                tracker.close(failed=True)

        threads = {
            name: threading.Thread(target=contextvars.copy_context().run, args=(close, name, tracker), daemon=True)
            for name, tracker in self._open.items()
        }
        end = time.monotonic() + seconds
        for thread in threads.values():
            thread.start()
        for name, thread in threads.items():
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                _log.warning("pretrain: tracker %s did not close in %.0f s and is left as it is", name, seconds)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._forgiven(name):
                act(tracker)

    @contextlib.contextmanager
    def _forgiven(self, name: str) -> Iterator[None]:
        """Go on without a tracker that fails."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _log.warning("pretrain: tracker %s failed and is off until the run is started again (%s)", name, reason)


def _require(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"pretrain.trackers names {name}, which cannot be imported ({error}); install it with "
            "pip install 'mdeberta-pipeline[tracking]' or take it off the list"
        ) from None


class _TensorBoard:
    """Event files in the folder `tensorboard`."""

    def __init__(self, config: PretrainConfig, run: str, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases; `WANDB_MODE`, `WANDB_ENTITY` and its other variables work as usual.

    Its own step counter refuses to go back, so the step is a column like the others and serves as their axis.
    """

    def __init__(self, config: PretrainConfig, run: str, folder: Path, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=config.tracker_project,
            id=run,
            name=run,
            resume="allow",
            dir=str(folder),
            config=_loggable(config.model_dump(mode="json")),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Its background process sends everything as it comes."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run of trackio, kept where `TRACKIO_DIR`, `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` says."""

    def __init__(self, config: PretrainConfig, run: str, folder: Path, step: int) -> None:
        import trackio

        self._trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=config.tracker_project,
                name=run,
                resume="allow",
                config=_loggable(config.model_dump(mode="json")),
                embed=False,
            )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Its background thread writes everything twice a second."""

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


_TRACKERS: dict[str, Callable[[PretrainConfig, str, Path, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


def _loggable(value: Any) -> Any:
    """Settings without the credentials that a URL among them may hold."""
    if isinstance(value, dict):
        return {key: _loggable(inner) for key, inner in value.items()}
    return redact(value) if isinstance(value, str) and "://" in value else value
