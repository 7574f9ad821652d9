"""Stage corpus beside the natural Beam pipeline and datatrove with the same cleaning and exact deduplication.

python benchmarks/corpus.py [--as-it-is | --workers] [FILE.txt ...]   plain text; default: the packaged text, unpacked

With `--as-it-is` nobody looks for mojibake, which is most of what the peers' cleaning costs. With `--workers` only ours
is timed, one worker and two in nine rounds.
"""

from __future__ import annotations

import logging
import lzma
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
        folder = Path(scratch, "in")
        folder.mkdir()
        repair = "--as-it-is" not in sys.argv
        cleaning = CLEANING if repair else tuple(step for step in CLEANING if step is not mojibake)
        given = [Path(name) for name in sys.argv[1:] if not name.startswith("--")]
        for path in given or sorted((Path(configfile.__file__).parent / "demo" / "corpus").glob("*.txt.xz")):
            data = path.read_bytes()
            text = lzma.decompress(data) if path.suffix == ".xz" else data
            (folder / path.name.removesuffix(".xz")).write_bytes(text)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6

        def fresh(way: Callable[[Path, Path], None]) -> Callable[[], None]:
            def run() -> None:
                # all are removed at the end: for minutes after a removal, ext4 takes longer to make new files
                way(folder, Path(tempfile.mkdtemp(dir=scratch)))

            return run

        ways = {"ours, 1 worker": ours(1, repair), "ours, 2 workers": ours(2, repair)}
        if "--workers" in sys.argv:
            first, rounds = "ours, 2 workers", 9
        else:
            first, rounds = "ours, 1 worker", 3
            ways["natural Beam pipeline"] = partial(natural_beam, cleaning=cleaning)
            ways["datatrove"] = partial(datatrove, cleaning=cleaning)
        compare("corpus", first, {name: fresh(way) for name, way in ways.items()}, megabytes, rounds=rounds)


if __name__ == "__main__":
    main()
