"""Stage corpus on one generated file of growing size: seconds and peak memory, to see what is linear and what is flat.

python benchmarks/scale.py [FILE.txt] [GIGABYTES,...] [WORKERS]      default: the packaged English text, 0.5,1,2,5 and 1

Documents are made of paragraphs of the given text in ever new combinations, so nearly none is a duplicate.
"""

from __future__ import annotations

import itertools
import lzma
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipeline import configfile

MB, GB = 10**6, 10**9
_SAMPLE_SECONDS = 0.2


def generate(paragraphs: list[bytes], size: int, path: Path) -> None:
    """Write documents of two to seven random paragraphs until the file has `size` bytes."""
    dice = random.Random(0)
    with open(path, "wb") as file:
        for number in itertools.count():
            if file.tell() >= size:
                return
            chosen = dice.choices(paragraphs, k=dice.randrange(2, 8))
            file.write(b"\n".join([*chosen, b"Document %d." % number]) + b"\n\n")


def run(file: Path, work: Path, workers: int) -> tuple[float, float]:
    """Seconds of the stage, and the largest private memory of one of its processes in MB."""
    keys = [f"work_dir={work}", f"corpus.inputs=['{file}']", "corpus.shard_mb=128", f"corpus.workers={workers}"]
    arguments = [word for key in keys for word in ("--set", key)]
    began, peak = time.monotonic(), 0
    command = [str(Path(sys.executable).with_name("mdeberta")), "run", "-c", "demo", "corpus", *arguments]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, _largest(process))
        time.sleep(_SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"the stage failed with exit code {process.returncode}")
    return time.monotonic() - began, peak / MB


def _largest(process: psutil.Process) -> int:
    found = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            memory = each.memory_info()
        except psutil.NoSuchProcess:
            continue
        found = max(found, memory.rss - memory.shared)
    return found


def main() -> None:
    """Generate, run, print one line a size."""
    given = dict(enumerate(sys.argv))
    default = Path(configfile.__file__).parent / "demo" / "corpus" / "en.txt.xz"
    source = Path(given.get(1, default))
    text = lzma.decompress(source.read_bytes()) if source.suffix == ".xz" else source.read_bytes()
    paragraphs = [line for line in text.splitlines() if len(line) > 40]
    workers = int(given.get(3, 1))
    print(f"{'GB':>6} {'seconds':>8} {'MB/s':>7} {'peak MB of a process':>21}   ({workers} workers)")
    for gigabytes in map(float, given.get(2, "0.5,1,2,5").split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "en.txt")
            generate(paragraphs, int(gigabytes * GB), file)
            seconds, peak = run(file, Path(scratch, "work"), workers)
        print(f"{gigabytes:6.1f} {seconds:8.1f} {gigabytes * GB / MB / seconds:7.1f} {peak:21.0f}", flush=True)


if __name__ == "__main__":
    main()
