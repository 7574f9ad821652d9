"""The one place that imports Beam: a chain of map steps over small elements, on any runner.

Elements are descriptors (a byte range, a shard number), never text: the steps read and publish parts themselves. A
Reshuffle before each step spreads its elements over a runner's workers and is the only shuffle there is. Where no
runner is named, Beam runs in this process and hands the elements of a step to the processes of `workers`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from pipeline.counters import collecting
from pipeline.errors import PipelineError
from pipeline.workers import Pool, Size, processes
from pipeline.workers import Step as Step

_log = logging.getLogger(__name__)

COUNTERS = "mdeberta"
"""Namespace of the counters in a runner's own pages and in `PipelineResult.metrics()`."""
AUTO_BYTES_PER_WORKER = 16 << 20  # of input: below that a worker costs more than it brings
_WHERE = " [while running"  # Beam appends it to the message of a step's error
_OWN_ERROR = re.compile(r"pipeline\.(?:errors|storage)\.\w+Error: (.*?)(?: \[while running|\n|$)")
_CANCEL_SECONDS = 5.0
_EXIT_SECONDS = 2.0


def run_map(
    label: str,
    steps: Sequence[tuple[str, Step]],
    elements: Sequence[Any],
    workers: int | Pool,
    args: tuple[str, ...] = (),
    *,
    size: Size | None = None,
    stall_minutes: float | None = None,
    progress: Callable[[], int] | None = None,
) -> None:
    """Run every element through the named steps; a step returns the elements of the next one.

    Args:
        label: the pipeline's name, unique labels of its transforms derive from it.
        workers: local worker processes, used where there are no `args`; a pool is used and left running.
        args: Beam pipeline options, passed through unchanged.
        size: cost of an element in any unit; local workers begin with the largest, so that they end together.
        stall_minutes: give the run up after so long without a change in what `progress` returns.
        progress: number of parts that are published.

    Raises:
        PipelineError: a step failed, in the step's own sentence; or the run stood still.
    """
    if not elements:
        return
    with contextlib.ExitStack() as stack:
        pool = workers if isinstance(workers, Pool) else stack.enter_context(local_pool(workers, args))
        try:
            pipeline = _pipeline(args)
            add_steps(pipeline, label, steps, elements, pool, size)
            _finish(pipeline, _Watch(label, len(elements), stall_minutes, progress))
        except Exception as error:
            raise PipelineError(_sentence(label, error)) from error


def add_steps(
    pipeline: Any,
    label: str,
    steps: Sequence[tuple[str, Step]],
    elements: Sequence[Any],
    pool: Pool | None = None,
    size: Size | None = None,
) -> None:
    """Append the elements and steps to a Beam pipeline; with a pool, it does the work and Beam keeps the order."""
    import apache_beam as beam

    given = list(elements) if pool is None else [list(elements)]
    flow = pipeline | f"{label}: elements" >> beam.Create(given, reshuffle=False)
    for name, step in steps:
        if pool is None:
            flow |= f"{label}: spread to {name}" >> beam.Reshuffle().with_output_types(Any)
        work = partial(_in_place, step) if pool is None else partial(_in_pool, pool, size, step)
        flow |= f"{label}: {name}" >> beam.FlatMap(work).with_output_types(Any)


def local_workers(wanted: int | None, total_bytes: int) -> int:
    """Worker processes for this much input: as configured, else one a core and no more than the input is worth."""
    return wanted or max(1, min(len(os.sched_getaffinity(0)), total_bytes // AUTO_BYTES_PER_WORKER))


def local_pool(workers: int, args: tuple[str, ...]) -> contextlib.AbstractContextManager[Pool | None]:
    """Worker processes for every `run_map` in the block; None where this process or a named runner does the work.

    A pool for each call would begin with cold memory each time.
    """
    return processes(workers) if workers > 1 and not args else contextlib.nullcontext()


def _in_place(step: Step, element: Any) -> Iterable[Any]:
    with collecting() as counts:
        found = list(step(element))
    _report(counts)
    return found


def _in_pool(pool: Pool, size: Size | None, step: Step, elements: list[Any]) -> list[list[Any]]:
    """All elements as one, which Beam has nothing to group for: each step begins when the one before it has ended."""
    found: list[Any] = []
    for outcome in pool.run(step, elements, size):
        _report(outcome.counts)
        found += outcome.elements
    return [found]


def _report(counts: Counter[str]) -> None:
    from apache_beam.metrics import Metrics

    for name, number in counts.items():
        Metrics.counter(COUNTERS, name).inc(number)


def _pipeline(args: tuple[str, ...]) -> Any:
    """An empty pipeline on the runner that `args` name, else on FnApiRunner."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))  # on import Beam warns of cloud clients that are not installed
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

    logging.disable(disabled)
    if not _log.isEnabledFor(logging.DEBUG):
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # it logs every step's error with a traceback
    named = any(argument.startswith("--runner") for argument in args)
    return beam.Pipeline(runner=None if named else FnApiRunner(), options=PipelineOptions(list(args)))


class _Watch:
    """Tells how long a run has published nothing."""

    def __init__(self, label: str, elements: int, minutes: float | None, progress: Callable[[], int] | None) -> None:
        self._label, self._elements = label, elements
        self._seconds = minutes * 60 if minutes and progress else None
        self._progress = progress or (lambda: 0)
        self._first = self._last = self._progress()
        self._changed = time.monotonic()

    @property
    def poll_seconds(self) -> float | None:
        """Time between two looks; None: there is nothing to watch."""
        return self._seconds and min(60.0, self._seconds / 10)

    def check(self) -> None:
        """Raise PipelineError where nothing has changed for too long."""
        with contextlib.suppress(OSError):  # a store that does not answer for once is no reason to end the run
            now = self._progress()
            if now != self._last:
                self._last, self._changed = now, time.monotonic()
        idle = time.monotonic() - self._changed
        if self._seconds is not None and idle > self._seconds:
            raise PipelineError(
                f"{self._label}: no part was published for {idle / 60:.2g} minutes, after {self._last - self._first:,} "
                f"parts for {self._elements:,} pieces of work; likely the runner has no worker (a worker pool whose "
                "Python cannot import apache_beam waits for ever), the workers do not reach the work_dir, or one piece "
                "takes longer than corpus.stall_minutes; what is published is kept: run the same command again to go on"
            )


def _finish(pipeline: Any, watch: _Watch) -> None:
    """Run a pipeline to its end in a thread of its own, so that this one can give it up whatever it waits for."""
    from apache_beam.runners.portability.portable_runner import PortableRunner

    # only the main thread may submit to a job server that Beam starts itself: it sets a signal handler
    job = pipeline.run() if isinstance(pipeline.runner, PortableRunner) else None
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    threading.Thread(target=_wait, args=(pipeline, job, ended), daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            error = ended.get(timeout=watch.poll_seconds)
            break
        try:
            watch.check()
        except PipelineError:
            _abandon(job)
            raise
    if error is not None:
        raise error


def _wait(pipeline: Any, job: Any, ended: queue.SimpleQueue[BaseException | None]) -> None:
    try:
        (job or pipeline.run()).wait_until_finish()
    except BaseException as error:
        ended.put(error)
    else:
        ended.put(None)


def _abandon(job: Any) -> None:
    """Cancel a job if it lets itself be cancelled, and see to it that its threads do not keep this process alive."""
    if job is not None:
        cancel = threading.Thread(target=job.cancel, daemon=True)
        cancel.start()
        cancel.join(_CANCEL_SECONDS)
    threading.Thread(target=_exit_after_main, daemon=True).start()


def _exit_after_main() -> None:
    threading.main_thread().join()
    time.sleep(_EXIT_SECONDS)
    os._exit(PipelineError.exit_code)


def _sentence(label: str, error: Exception) -> str:
    text = str(error).split(_WHERE)[0].rstrip()
    if isinstance(error, PipelineError):
        return text
    own = _OWN_ERROR.findall(str(error))
    if own:
        return str(own[-1]).strip()
    # what comes from another process is its traceback inside a RuntimeError, with the kind of error in its last line
    told = text.splitlines()[-1:] if isinstance(error, RuntimeError) else [f"{type(error).__name__}: {text}"]
    return f"{label}: {''.join(told).strip()} (run again with --debug for the traceback)"
