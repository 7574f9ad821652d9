"""Stage corpus beside the natural Beam pipeline: ReadFromText, a Map a cleaning step, GroupByKey, WriteToParquet.

python benchmarks/corpus.py [FILE.txt ...]      plain text files; default: the packaged text, unpacked
"""

from __future__ import annotations

import logging
import lzma
import re
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from turns import compare

from pipeline import configfile
from pipeline.execute import run_stages
from pipeline.text import content_hash

_BLANKS = re.compile(r"[^\S\n]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def ours(folder: Path, work: Path, workers: int) -> None:
    """The stage as `mdeberta run` does it."""
    shutil.rmtree(work, ignore_errors=True)
    keys = [f"work_dir={work}", f"corpus.inputs=['{folder}/*.txt']", f"corpus.workers={workers}", "corpus.shard_mb=16"]
    run_stages(configfile.load("demo", keys), ["corpus"])


def natural(folder: Path, work: Path) -> None:
    """What one writes first with Beam's own transforms: an element is a line."""
    shutil.rmtree(work, ignore_errors=True)
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        (
            pipeline
            | beam.io.ReadFromText(f"{folder}/*.txt")
            | "nfc" >> beam.Map(lambda text: unicodedata.normalize("NFC", text))
            | "control" >> beam.Map(lambda text: _CONTROL.sub("", text))
            | "blanks" >> beam.Map(lambda text: _BLANKS.sub(" ", text).strip())
            | "not empty" >> beam.Filter(bool)
            | "hash" >> beam.Map(lambda text: (content_hash(text).hex(), text))
            | "same text" >> beam.GroupByKey()
            | "first" >> beam.MapTuple(lambda key, texts: {"id": key, "text": next(iter(texts))})
            | beam.io.WriteToParquet(f"{work}/data", schema, num_shards=4)
        )


def main() -> None:
    """Compare on the given files."""
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "in")
        folder.mkdir()
        given = [Path(name) for name in sys.argv[1:]]
        for path in given or sorted((Path(configfile.__file__).parent / "demo" / "corpus").glob("*.txt.xz")):
            data = path.read_bytes()
            text = lzma.decompress(data) if path.suffix == ".xz" else data
            (folder / path.name.removesuffix(".xz")).write_bytes(text)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        work = Path(scratch, "out")
        ways = {
            "ours, 1 worker": lambda: ours(folder, work, 1),
            "ours, 2 workers": lambda: ours(folder, work, 2),
            "natural Beam pipeline": lambda: natural(folder, work),
        }
        compare("corpus", "ours, 1 worker", ways, megabytes)


if __name__ == "__main__":
    main()
