"""Stage corpus beside the natural Beam pipeline and datatrove with the same cleaning and exact deduplication.

python benchmarks/corpus.py [FILE.txt ...]      plain text files; default: the packaged text, unpacked
"""

from __future__ import annotations

import logging
import lzma
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from loguru import logger
from peers import datatrove, natural_beam
from turns import compare

from pipeline import configfile
from pipeline.execute import run_stages


def ours(workers: int) -> Callable[[Path, Path], None]:
    """The stage as `mdeberta run` does it."""

    def run(folder: Path, work: Path) -> None:
        keys = [f"work_dir={work}", f"corpus.inputs=['{folder}/*.txt']", f"corpus.workers={workers}"]
        run_stages(configfile.load("demo", [*keys, "corpus.shard_mb=128"]), ["corpus"])

    return run


def main() -> None:
    """Compare on the given files."""
    logging.getLogger().setLevel(logging.ERROR)
    logger.remove()
    with tempfile.TemporaryDirectory() as scratch:
        folder, work = Path(scratch, "in"), Path(scratch, "out")
        folder.mkdir()
        given = [Path(name) for name in sys.argv[1:]]
        for path in given or sorted((Path(configfile.__file__).parent / "demo" / "corpus").glob("*.txt.xz")):
            data = path.read_bytes()
            text = lzma.decompress(data) if path.suffix == ".xz" else data
            (folder / path.name.removesuffix(".xz")).write_bytes(text)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6

        def fresh(way: Callable[[Path, Path], None]) -> Callable[[], None]:
            def run() -> None:
                shutil.rmtree(work, ignore_errors=True)
                way(folder, work)

            return run

        ways = {
            "ours, 1 worker": ours(1), "ours, 2 workers": ours(2),
            "natural Beam pipeline": natural_beam, "datatrove": datatrove,
        }  # fmt: skip
        compare("corpus", "ours, 1 worker", {name: fresh(way) for name, way in ways.items()}, megabytes, rounds=3)


if __name__ == "__main__":
    main()
