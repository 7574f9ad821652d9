"""Exact paragraphs beside one pass with a set of lines in memory, on clean chunks that are there already.

python benchmarks/paragraphs.py [FILE.txt]      default: the packaged English text; processor time, one process, no Beam
"""

from __future__ import annotations

import lzma
import shutil
import sys
import tempfile
import time
from pathlib import Path

from turns import compare

from pipeline import configfile
from pipeline.chunks import CorpusJob, Source, clean_unit, list_work_parts
from pipeline.config import CorpusConfig
from pipeline.repeats import PHASES
from pipeline.shards import CORPUS_SCHEMA
from pipeline.slices import read_slice
from pipeline.sources import format_of, language_of
from pipeline.storage import Folder
from pipeline.streams import split

CHUNK_BYTES = 32_000_000


def chunked(path: Path, folder: Path) -> CorpusJob:
    """A job whose chunks are made."""
    job = CorpusJob(Folder(str(folder)), CHUNK_BYTES, CorpusConfig(dedup_paragraphs=True))
    source = Source(path.name, language_of(path.name), format_of(path.name), str(path), path.stat().st_size)
    for unit in split(job, (source,), source):
        clean_unit(job, unit)
    return job


def ours(job: CorpusJob, language: str) -> None:
    """All phases, from the beginning."""
    for kind in ("paragraphs", "own_repeats", "repeats", "distinct"):
        shutil.rmtree(Path(job.folder.path(job.work_folder(kind))), ignore_errors=True)
        shutil.rmtree(Path(job.folder.path(f"_parts/{job.work_folder(kind)}")), ignore_errors=True)
    list_work_parts.cache_clear()
    for phase in PHASES:
        for task in phase.tasks(job, [language]):
            phase.step(job, task)


def with_a_set(job: CorpusJob, language: str) -> list[str]:
    """What one would write for text that fits into memory, keeping nothing."""
    seen: set[str] = set()
    documents = []
    for part in job.work_parts("chunks", language):
        for text in read_slice(job.folder, part, CORPUS_SCHEMA)["text"].to_pylist():
            kept = [line for line in text.split("\n") if not (line in seen or seen.add(line))]
            documents.append("\n".join(kept))
    return documents


def main() -> None:
    """Compare on one file."""
    with tempfile.TemporaryDirectory() as scratch:
        packaged = Path(configfile.__file__).parent / "demo" / "corpus" / "en.txt.xz"
        path = Path(sys.argv[1] if len(sys.argv) > 1 else packaged)
        if path.suffix == ".xz":
            unpacked = Path(scratch, path.stem)
            unpacked.write_bytes(lzma.decompress(path.read_bytes()))
            path = unpacked
        job, language = chunked(path, Path(scratch, "work")), language_of(path.name)
        ways = {"ours": lambda: ours(job, language), "a set in memory": lambda: with_a_set(job, language)}
        compare(f"paragraphs of {language}", "ours", ways, path.stat().st_size / 1e6, clock=time.process_time)


if __name__ == "__main__":
    main()
