"""A chain of steps on Beam: each element is done once and counted, errors are told, no run waits or lives for ever."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from beam_cluster import job_server, worker_pool
from beam_steps import STALL_SECONDS, STALL_VARIABLE, die, double, nap, note, refuse, stumble, weigh

from pipeline import configfile
from pipeline.beam import COUNTERS, add_steps, local_pool, run_map
from pipeline.errors import PipelineError
from pipeline.execute import run_stages
from pipeline.workers import processes

PROGRAM = [sys.executable, "-c", "from beam_steps import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONFAULTHANDLER": "1"}


def noted(folder: Path) -> list[tuple[int, str]]:
    """What `note` wrote: process and number."""
    found = (path.name.split("-") for path in folder.iterdir())
    return [(int(process), number) for process, number, _ in found]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_element_goes_through_all_steps_once(tmp_path: Path, workers: int) -> None:
    run_map("x", [("double", double), ("again", double), ("note", partial(note, tmp_path))], range(50), workers)
    assert sorted(int(number) for _, number in noted(tmp_path)) == sorted([*range(50)] * 4)
    processes = {process for process, _ in noted(tmp_path)}
    assert processes == {os.getpid()} if workers == 1 else os.getpid() not in processes


def test_a_pool_serves_several_runs_with_the_same_processes(tmp_path: Path) -> None:
    with local_pool(2, ()) as pool:
        assert pool
        for label in ("first", "second"):
            (tmp_path / label).mkdir()
            run_map(label, [("nap", partial(nap, tmp_path / label))], [0.1] * 4, pool)
    first, second = ({process for process, _ in noted(tmp_path / label)} for label in ("first", "second"))
    assert first == second and len(first) == 2


def test_a_worker_takes_the_next_element_when_it_is_free_and_the_largest_go_first(tmp_path: Path) -> None:
    naps = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1.0]
    run_map("x", [("nap", partial(nap, tmp_path))], naps, 2, size=float)
    long = next(process for process, number in noted(tmp_path) if number == "1.0")
    assert [number for process, number in noted(tmp_path) if process == long] == ["1.0"]


def test_the_order_stays_without_a_size(tmp_path: Path) -> None:
    with processes(1) as pool:
        list(pool.run(partial(note, tmp_path), [3, 1, 2]))
    in_time = sorted((int(path.name.split("-")[2]), path.name.split("-")[1]) for path in tmp_path.iterdir())
    assert [number for _, number in in_time] == ["3", "1", "2"]


def counters(workers: int, *options: str) -> dict[str, int]:
    """What a run of 7 elements told its runner."""
    import apache_beam
    from apache_beam.metrics import MetricsFilter
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

    pipeline = apache_beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(list(options)))
    with processes(workers) as pool:
        add_steps(pipeline, "x", [("double", double), ("again", double)], range(7), pool if workers else None)
        result = pipeline.run()
        result.wait_until_finish()
    found = result.metrics().query(MetricsFilter().with_namespace(COUNTERS))["counters"]
    totals: dict[str, int] = {}
    for counter in found:
        totals[counter.key.metric.name] = totals.get(counter.key.metric.name, 0) + counter.committed
    return totals


MULTI_PROCESSING = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


@pytest.mark.parametrize(
    ("workers", "options"), [(0, ()), (2, ()), pytest.param(0, MULTI_PROCESSING, marks=pytest.mark.slow)]
)
def test_what_the_steps_count_are_counters_of_the_runner(
    monkeypatch: pytest.MonkeyPatch, workers: int, options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    assert counters(workers, *options) == {"numbers": 7 + 14, "parity/even": 4 + 8, "parity/odd": 3 + 6}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_steps_own_error_is_told_in_its_own_words(workers: int) -> None:
    with pytest.raises(PipelineError, match=r"^number 5 is not for me; take another$"):
        run_map("corpus", [("double", double), ("refuse", refuse)], [5], workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_another_error_is_told_with_its_kind(workers: int) -> None:
    with pytest.raises(PipelineError, match=r"^corpus: ValueError: about 5 .*--debug"):
        run_map("corpus", [("stumble", stumble)], [5], workers)


def test_a_worker_that_the_kernel_ended_is_told() -> None:
    with pytest.raises(PipelineError, match=r"^a worker process ended before its work did.*corpus\.workers"):
        run_map("corpus", [("die", die)], [1, 2], 2)


def test_workers_start_in_milliseconds_once_one_has_started() -> None:
    def seconds() -> float:
        started = time.monotonic()
        with processes(2) as pool:
            next(pool.run(double, [1]))
        return time.monotonic() - started

    assert min(seconds() for _ in range(5)) < 0.1


def hanging(folder: Path, workers: int, *options: str, stall_seconds: float = STALL_SECONDS) -> subprocess.Popen[str]:
    """A process whose steps hang."""
    return subprocess.Popen(
        [*PROGRAM, "hang", str(folder), str(workers), *options],
        env={**ENVIRONMENT, STALL_VARIABLE: str(stall_seconds)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def said_by(launcher: subprocess.Popen[str], seconds: float) -> str:
    """What a process has said when it and its own have ended; those that do not end have to say where they are."""
    try:
        return launcher.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGABRT)
        raise AssertionError(f"it did not end: {launcher.communicate()[1]}") from None


def involved(folder: Path, count: int) -> set[int]:
    """The processes of hanging workers, as soon as there are so many, and their parents."""
    wait_until(lambda: sum(bool(path.read_text()) for path in folder.iterdir()) == count)
    return {int(number) for path in folder.iterdir() for number in (path.name, path.read_text())}


def wait_until(happened: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_stands_still_is_given_up_and_leaves_no_process(tmp_path: Path, workers: int) -> None:
    launcher = hanging(tmp_path, workers)
    running = involved(tmp_path, workers)
    errors = said_by(launcher, STALL_SECONDS + 15)
    assert launcher.returncode == 1
    assert re.match(r"corpus: no part was published for 0\.0\d+ minutes, after 0 parts for 3 pieces of work; ", errors)
    assert len(errors.splitlines()) == 1
    wait_until(lambda: not any(psutil.pid_exists(process) for process in running - {os.getpid()}), 5)


def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = hanging(tmp_path, 2)
    running = involved(tmp_path, 2)
    launcher.kill()
    wait_until(lambda: not any(psutil.pid_exists(process) for process in running), 5)


def test_ctrl_c_ends_everything_and_only_the_launcher_speaks(tmp_path: Path) -> None:
    launcher = hanging(tmp_path, 2, stall_seconds=60)
    running = involved(tmp_path, 2)
    os.killpg(launcher.pid, signal.SIGINT)
    errors = said_by(launcher, 10)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    wait_until(lambda: not any(psutil.pid_exists(process) for process in running), 5)


@pytest.mark.slow
def test_a_worker_pool_without_beam_does_not_hang_the_run(tmp_path: Path) -> None:
    bare = tmp_path / "bin" / "python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with job_server(tmp_path / "staged") as job, worker_pool(bare.parent) as pool:
        options = ["--runner=PortableRunner", f"--job_endpoint=localhost:{job}"]
        options += ["--environment_type=EXTERNAL", f"--environment_config=localhost:{pool}"]
        launcher = hanging(tmp_path, 1, *options)
        errors = said_by(launcher, STALL_SECONDS + 20)
    assert launcher.returncode == 1
    assert "a worker pool whose Python cannot import apache_beam waits for ever" in errors


@pytest.mark.slow
def test_a_run_whose_workers_are_beams_own_threads_is_given_up_too(tmp_path: Path) -> None:
    (tmp_path / "noted").mkdir()
    with job_server(tmp_path / "staged") as job:
        options = ["--runner=PortableRunner", f"--job_endpoint=localhost:{job}", "--environment_type=LOOPBACK"]
        launcher = hanging(tmp_path / "noted", 1, *options)
        involved(tmp_path / "noted", 1)
        errors = said_by(launcher, STALL_SECONDS + 20)
    assert launcher.returncode == 1 and "corpus: no part was published" in errors


@pytest.mark.parametrize("stage", ["pipeline.corpus", "tokenizer.encode"])
def test_elements_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """They cross the network on a cluster; what they stand for is megabytes."""
    log = tmp_path / "sizes"

    def weigh_all(label: str, steps: Any, *rest: Any, **more: Any) -> None:
        run_map(label, [(name, partial(weigh, log, step)) for name, step in steps], *rest, **more)

    changes = [f"work_dir={tmp_path}/work", "corpus.inputs=['package://demo/corpus/sw.txt.xz']", "vocab.size=300"]
    monkeypatch.setattr(f"{stage}.run_map", weigh_all)
    run_stages(configfile.load("demo", [*changes, "corpus.chunk_mb=0.05"]), ["corpus", "vocab", "tokens"])
    assert max(int(line) for line in log.read_text().splitlines()) < 10_000
