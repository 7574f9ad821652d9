"""Measures one stage execution: wall time and peak memory of its process tree, written as a log beside the stages."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from pipeline.storage import Folder

_SAMPLE_SECONDS = 0.25


@contextmanager
def measured(work_dir: Folder, label: str) -> Iterator[None]:
    """Run the block and write `<work_dir>/logs/<label>-<time>.json` with its seconds and peak memory in MB."""
    meter, started = _Meter(), time.time()
    meter.start()
    outcome = "failed"
    try:
        yield
        outcome = "finished"
    finally:
        meter.stop()
        record = {
            "stage": label,
            "outcome": outcome,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 2),
            "peak_memory_mb": round(meter.peak_bytes / 1e6, 1),
            "cores": psutil.cpu_count(),
            "python": platform.python_version(),
        }
        name = f"{label}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started))}.json"
        with suppress(OSError):  # a full disk must not hide the stage's own error
            work_dir.write(f"logs/{name}", json.dumps(record, indent=1).encode())


class _Meter(threading.Thread):
    """Samples the memory of this process and its children: the sum of their resident sets less what they share."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        root = psutil.Process()
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, _tree_bytes(root))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _tree_bytes(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):
            memory = process.memory_info()
            total += memory.rss - getattr(memory, "shared", 0)
    return total
