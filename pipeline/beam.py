"""The one place that imports Beam: a chain of map steps over small elements, on any runner.

Elements are descriptors (a byte range, a shard number), never text: the steps read and publish parts themselves. A
Reshuffle before each step spreads its elements over the workers and is the only shuffle there is.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_disabled = logging.root.manager.disable
logging.disable(max(_disabled, logging.WARNING))  # on import Beam warns of cloud clients that are not installed
import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner  # noqa: E402
from apache_beam.transforms.environments import SubprocessSDKEnvironment  # noqa: E402

logging.disable(_disabled)

from pipeline.errors import PipelineError  # noqa: E402

_log = logging.getLogger(__name__)

Step = Callable[[Any], Iterable[Any]]
AUTO_BYTES_PER_WORKER = 64 << 20  # of input: below that a worker costs more than it brings
_OWN_ERROR = re.compile(r"pipeline\.errors\.(?:Pipeline|User)Error: (.*?)(?: \[while running|\n|$)")


def run_map(
    label: str, steps: Sequence[tuple[str, Step]], elements: Sequence[Any], workers: int, args: tuple[str, ...] = ()
) -> None:
    """Run every element through the named steps; a step returns the elements of the next one.

    Args:
        label: the pipeline's name, unique labels of its transforms derive from it.
        workers: local worker processes, used where `args` name no runner.
        args: Beam pipeline options, passed through unchanged.

    Raises:
        PipelineError: a step failed; the message is the step's own sentence.
    """
    if not elements:
        return
    if not _log.isEnabledFor(logging.DEBUG):
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # it logs every step's error with a traceback
    try:
        with _pipeline(workers, args) as pipeline:
            flow = pipeline | f"{label}: elements" >> beam.Create(list(elements), reshuffle=False)
            for name, step in steps:
                flow = (
                    flow
                    | f"{label}: spread to {name}" >> beam.Reshuffle().with_output_types(Any)
                    | f"{label}: {name}" >> beam.FlatMap(step).with_output_types(Any)
                )
    except Exception as error:
        raise PipelineError(_sentence(label, error)) from error


def local_workers(wanted: int | None, total_bytes: int) -> int:
    """Worker processes for this much input: as configured, else one a core and no more than the input is worth."""
    return wanted or max(1, min(len(os.sched_getaffinity(0)), total_bytes // AUTO_BYTES_PER_WORKER))


def _pipeline(workers: int, args: tuple[str, ...]) -> beam.Pipeline:
    """The runner that `args` name, else FnApiRunner here or with worker processes of this module."""
    if any(argument.startswith("--runner") for argument in args):
        return beam.Pipeline(options=PipelineOptions(list(args)))
    if workers == 1:
        return beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(list(args)))
    command = f"{shlex.quote(sys.executable)} -m {__spec__.name}"
    runner = FnApiRunner(default_environment=SubprocessSDKEnvironment(command_string=command))
    return beam.Pipeline(runner=runner, options=PipelineOptions([f"--direct_num_workers={workers}", *args]))


def _sentence(label: str, error: Exception) -> str:
    text = str(error)
    if isinstance(error, PipelineError):
        return text.split(" [while running")[0]
    own = _OWN_ERROR.findall(text)
    if own:
        return str(own[-1]).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{label}: {lines[-1] if lines else type(error).__name__} (run again with --debug for the traceback)"


if __name__ == "__main__":  # a worker process; what goes wrong in it reaches the runner and is told there
    from apache_beam.runners.worker import sdk_worker_main

    logging.disable(logging.ERROR)
    sdk_worker_main.main(sys.argv)
