"""Beam's own job server and worker pools: they stand where those of Flink or Spark do, and run from its wheel."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BIN = Path(sys.executable).parent


@contextlib.contextmanager
def job_server(folder: Path) -> Iterator[int]:
    """A portable job server; gives its port."""
    with _serving("runners.portability.local_job_service_main", "--staging_dir", str(folder), port="--port") as port:
        yield port


@contextlib.contextmanager
def worker_pool(programs: Path = BIN) -> Iterator[int]:
    """A pool whose workers are run by the `python` of a directory; gives its port."""
    with _serving("runners.worker.worker_pool_main", port="--service_port", programs=programs) as port:
        yield port


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _serving(module: str, *options: str, port: str, programs: Path = BIN) -> Iterator[int]:
    number = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", f"apache_beam.{module}", *options, port, str(number)],
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(number)
        yield number
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")
