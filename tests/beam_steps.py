"""Steps for the tests of `run_map`, and a program that runs them: `main STEP FOLDER WORKERS [BEAM OPTION ...]`."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.beam import Step, run_map
from pipeline.counters import count
from pipeline.errors import PipelineError

STALL_SECONDS = 2.0
STALL_VARIABLE = "STALL_SECONDS"
"""Environment variable with another number of them."""


def double(number: int) -> list[int]:
    """A number twice, counted."""
    count("numbers", 1)
    count("parity", {"even" if number % 2 == 0 else "odd": 1})
    return [number, number]


def note(folder: Path, number: float) -> list[int]:
    """Leave a file that says which process had which number."""
    count("noted", 1)
    (folder / f"{os.getpid()}-{number}-{time.monotonic_ns()}").touch()
    return []


def nap(folder: Path, seconds: float) -> list[int]:
    """Work for so long."""
    time.sleep(seconds)
    return note(folder, seconds)


def refuse(number: int) -> list[int]:
    """An error of our own."""
    raise PipelineError(f"number {number} is not for me; take another")


def stumble(number: int) -> list[int]:
    """An error of any other kind."""
    raise ValueError(f"about {number}")


def die(number: int) -> list[int]:
    """What the kernel does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def weigh(log: Path, step: Step, element: Any) -> Iterable[Any]:
    """Another step, with a note of how many bytes its element is on the way to a worker."""
    with log.open("a") as file:
        file.write(f"{len(pickle.dumps(element))}\n")
    return step(element)


def hang(folder: Path, number: int) -> list[int]:
    """Say which process this is and which is its parent, and never end."""
    (folder / f"{os.getpid()}").write_text(str(os.getppid()))
    time.sleep(600)
    return []


def main() -> None:
    """Run one of the steps that want a folder; a run that stands still is given up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they start in the background
    name, folder, workers, *options = sys.argv[1:]
    steps = [(name, partial(globals()[name], Path(folder)))]
    stall = {"stall_minutes": float(os.environ.get(STALL_VARIABLE, STALL_SECONDS)) / 60, "progress": lambda: 0}
    try:
        run_map("corpus", steps, [1, 2, 3], int(workers), tuple(options), **stall)
    except PipelineError as error:
        sys.exit(str(error))
