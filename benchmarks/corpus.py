"""Stage corpus beside the natural Beam pipeline and datatrove with the same cleaning and exact deduplication.

python benchmarks/corpus.py [--as-it-is] [FILE.txt ...]      plain text files; default: the packaged text, unpacked

With `--as-it-is` nobody looks for mojibake, which is most of what the peers' cleaning costs.
"""

from __future__ import annotations

import logging
import lzma
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loguru import logger
from peers import CLEANING, datatrove, mojibake, natural_beam
from turns import compare

from pipeline import configfile
from pipeline.execute import run_stages


def ours(workers: int, fix_mojibake: bool) -> Callable[[Path, Path], None]:
    """The stage as `mdeberta run` does it."""

    def run(folder: Path, work: Path) -> None:
        keys = [f"work_dir={work}", f"corpus.inputs=['{folder}/*.txt']", f"corpus.workers={workers}"]
        keys += ["corpus.shard_mb=128", f"corpus.fix_mojibake={str(fix_mojibake).lower()}"]
        run_stages(configfile.load("demo", keys), ["corpus"])

    return run


def main() -> None:
    """Compare on the given files."""
    logging.getLogger().setLevel(logging.ERROR)
    logger.remove()
    with tempfile.TemporaryDirectory() as scratch:
        folder, work = Path(scratch, "in"), Path(scratch, "out")
        folder.mkdir()
        repair = "--as-it-is" not in sys.argv
        cleaning = CLEANING if repair else tuple(step for step in CLEANING if step is not mojibake)
        given = [Path(name) for name in sys.argv[1:] if name != "--as-it-is"]
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
            "ours, 1 worker": ours(1, repair), "ours, 2 workers": ours(2, repair),
            "natural Beam pipeline": partial(natural_beam, cleaning=cleaning),
            "datatrove": partial(datatrove, cleaning=cleaning),
        }  # fmt: skip
        compare("corpus", "ours, 1 worker", {name: fresh(way) for name, way in ways.items()}, megabytes, rounds=3)


if __name__ == "__main__":
    main()
