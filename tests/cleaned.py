"""What the tests of the passes share: cleaned chunks of small files, phases run one after the other, and shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifact import fetch
from pipeline.assemble import ShardTask, assemble
from pipeline.chunks import CorpusJob, Source, Unit, clean_unit
from pipeline.config import CorpusConfig
from pipeline.manifest import Part
from pipeline.passes import Phase
from pipeline.shards import open_shard
from pipeline.sources import format_of, language_of, spans
from pipeline.storage import Folder


def clean_files(
    folder: Path, files: Mapping[str, Sequence[str]], chunk_bytes: int = 1_000_000, **config: Any
) -> CorpusJob:
    """Write each file's documents and clean them in chunks of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    job = CorpusJob(Folder(str(folder / "out")), chunk_bytes, CorpusConfig(**config))
    for name, documents in files.items():
        path = folder / name
        path.write_text("".join(f"{text}\n\n" for text in documents), encoding="utf-8")
        source = Source(name, language_of(name), format_of(name), str(path), path.stat().st_size)
        with path.open("rb") as stream:
            found = spans(stream, source.size, source.format, chunk_bytes)
        for number, span in enumerate(found or []):
            clean_unit(job, Unit(source, number, span))
    return job


def run_phases(job: CorpusJob, phases: Iterable[Phase], languages: Sequence[str]) -> None:
    """Do all tasks of all phases."""
    for phase in phases:
        for task in phase.tasks(job, languages):
            assert phase.step(job, task) == []


def with_small_buckets(phases: Iterable[Phase], rows: int) -> list[Phase]:
    """The phases with so few rows in a bucket that there are many."""
    return [
        phase._replace(tasks=partial(phase.tasks, rows_per_bucket=rows)) if is_over_buckets(phase) else phase
        for phase in phases
    ]


def is_over_buckets(phase: Phase) -> bool:
    return isinstance(phase.tasks, partial) and phase.tasks.func.__name__ == "bucket_tasks"


def rows_of(job: CorpusJob, kind: str, language: str) -> list[dict[str, Any]]:
    """All rows of a language's work parts of a kind."""
    return [row for part in job.work_parts(kind, language) for row in open_shard(fetch(job.folder, part)).to_pylist()]


def make_shards(job: CorpusJob, language: str, count: int = 1) -> list[Part]:
    """The language's shards."""
    tasks = [ShardTask(language, index, count) for index in range(count)]
    for task in tasks:
        assemble(job, task)
    return [part for task in tasks if (part := job.parts.get(task.path))]


def texts_of(job: CorpusJob, shards: Iterable[Part]) -> list[str]:
    """The texts in these shards."""
    return [text for part in shards for text in open_shard(fetch(job.folder, part))["text"].to_pylist()]
