"""Starts the training processes of this machine for `mdeberta run` and stays until the last one has ended.

The children run `model.pretrain` with the variables every torch launcher sets; they write to the terminal themselves.
One that fails ends the others within seconds, and its sentence becomes this stage's error. They die with this process,
however it dies. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from model.place import free_port
from pipeline.errors import PipelineError, UserError
from pipeline.stage import StageRun, read_manifest

LOG_LEVEL = "MDEBERTA_LOG_LEVEL"
_REPORTS = "MDEBERTA_LAUNCHER_REPORTS"
_GRACE_SECONDS = 3.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STOP_CODES = (143, 130)
"""What training processes end with after the first two of these signals and a checkpoint; after SIGUSR1 it is 0."""
_libc = ctypes.CDLL(None)


def run(run: StageRun) -> None:
    """Train with `pretrain.launcher.processes` processes; they publish and commit.

    Raises:
        PipelineError: a process failed; the message is its own.
        SystemExit: the run was asked to stop and left a checkpoint (0 after SIGUSR1, 143 after SIGTERM).
    """
    launcher = run.config.pretrain.launcher
    cores = max(1, len(os.sched_getaffinity(0)) // launcher.processes)
    threads = str(launcher.threads or os.environ.get("OMP_NUM_THREADS") or cores)
    with tempfile.TemporaryDirectory(prefix="mdeberta-launch-") as reports:
        processes = _start(run, launcher.processes, threads, reports)
        with _forwarded(processes) as signals:
            codes = _wait(processes, signals)
        failed = {rank: code for rank, code in codes.items() if code and code not in _in_order(signals)}
        if failed:
            raise _failure(failed, Path(reports))
        if signals:
            raise SystemExit(_stop_code(signals[0]))
        if any(codes.values()):  # a process was asked by somebody else, and stopped all
            raise SystemExit(max(codes.values()))
    if read_manifest(run.folder) is None:
        raise PipelineError(f"{run.label}: its processes ended without committing; run it again with --debug")


def started_by_launcher() -> bool:
    """Whether this process was started by `run` above, which holds the stage's lock."""
    return _REPORTS in os.environ


def report_failure(sentence: str, code: int) -> None:
    """Tell the launcher why this process fails; without one of ours, tell the user."""
    if not started_by_launcher():
        print(f"mdeberta: {sentence}", file=sys.stderr, flush=True)
        return
    record = {"sentence": sentence, "code": code, "time": time.monotonic()}  # one clock for a machine's processes
    path = Path(os.environ[_REPORTS]) / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps(record), encoding="utf-8")


def _start(run: StageRun, count: int, threads: str, reports: str) -> list[subprocess.Popen[bytes]]:
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": threads,
        LOG_LEVEL: str(logging.getLogger("model").getEffectiveLevel()),
        _REPORTS: reports,
    }
    command = [sys.executable, "-m", "model.pretrain", *run.source]
    parent = os.getpid()
    return [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=lambda: _die_with(parent),
        )
        for rank in range(count)
    ]


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, also by `kill -9`."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def _forwarded(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGTERM, SIGINT and SIGUSR1 on to the processes; yields the list of those that came."""
    came: list[int] = []

    def forward(number: int, _: object) -> None:
        came.append(number)
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _STOP_SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_order(signals: list[int]) -> set[int]:
    """What processes end with that were asked to stop; these signals may have come before they could take notice."""
    return {*_STOP_CODES, *(-number for number in signals)}


def _stop_code(number: int) -> int:
    """The exit code after a stop signal: a batch system that sends SIGUSR1 ahead of a time limit wants success."""
    return 0 if number == signal.SIGUSR1 else 128 + number


def _wait(processes: list[subprocess.Popen[bytes]], signals: list[int]) -> dict[int, int]:
    """Rank -> exit code of those that ended by themselves.

    After a first failure the others get a moment to do so, after a stop (of which `signals` grows) as long as batch
    systems give: rank 0 may still be closing trackers.
    """
    ended: dict[int, int] = {}
    deadline = float("inf")
    try:
        while len(ended) < len(processes) and time.monotonic() < deadline:
            for rank, process in enumerate(processes):
                if rank not in ended and (code := process.poll()) is not None:
                    ended[rank] = code
                    if code:
                        seconds = _STOP_SECONDS if code in _in_order(signals) else _GRACE_SECONDS
                        deadline = min(deadline, time.monotonic() + seconds)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended


def _failure(codes: dict[int, int], reports: Path) -> PipelineError:
    """The error of the process that failed first: the others only lost their connection to it."""
    for rank, code in codes.items():
        if code < 0:
            hint = "; probably memory ran out, lower pretrain.micro_batch" if code == -signal.SIGKILL else ""
            return PipelineError(f"training process {rank} was ended by {signal.Signals(-code).name}{hint}")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in reports.glob("*.json")]
    if not found:
        rank, code = next((rank, code) for rank, code in codes.items() if code)
        return PipelineError(f"training process {rank} ended with exit code {code} and without a message")
    first = min(found, key=lambda record: record["time"])
    kind = UserError if first["code"] == UserError.exit_code else PipelineError
    return kind(first["sentence"])
