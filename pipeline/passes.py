"""What the passes over a language's documents have in common: their tasks, and what each task makes.

A pass is a chain of phases, each of which has its tasks done before the next one is planned. A phase either takes the
parts of documents one by one, or the buckets of the key space: parts that a phase before made, sorted by key, are read
slice by slice, so that equal keys of all parts meet in one bucket. Documents that a pass finds to be superfluous it
lists in parts of kind `drops`, for the shards to be made without them.

Memory: buckets are as many as give each `ROWS_PER_BUCKET` rows on average, which take some 200 MB while they are
sorted. Rows of one key stay together, so that a bucket grows beyond that with its most frequent key: parts should hold
a key no more often than they need to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa

from pipeline.chunks import CorpusJob
from pipeline.errors import PipelineError
from pipeline.manifest import Part
from pipeline.shards import shard_name
from pipeline.slices import Keys, publish_sorted, span
from pipeline.storage import redact

ROWS_PER_BUCKET = 2_500_000
DROPS = pa.schema([("key", pa.uint64())])  # of the id of a document


class Phase(NamedTuple):
    """A label, what is still to do in these languages, and the step that does one task of it."""

    label: str
    tasks: Callable[[CorpusJob, Sequence[str]], list[Any]]
    step: Callable[[CorpusJob, Any], list[Any]]


@dataclass(frozen=True)
class ChunkTask:
    """Make the part `path` of a language's part of documents `made_of`; `rank` is its place in source order.

    It names the parts and leaves their records where they are: those are kilobytes, and a runner ships all tasks.
    """

    language: str
    made_of: str
    rank: int
    path: str

    def documents(self, job: CorpusJob) -> Part:
        """The record of the part of documents.

        Raises:
            PipelineError: the part is not there.
        """
        return published(job, self.made_of)


@dataclass(frozen=True)
class BucketTask:
    """Make the part `path` of the rows whose keys are in the index-th of `count` equal parts of the key space."""

    language: str
    index: int
    count: int
    path: str

    @property
    def span(self) -> tuple[int, int]:
        """First and last key of the bucket."""
        return span(self.index, self.count)


class _Task(Protocol):
    @property
    def path(self) -> str: ...


_T = TypeVar("_T", bound=_Task)


def step(make: Callable[[CorpusJob, _T], None]) -> Callable[[CorpusJob, _T], list[Any]]:
    """Turn a function that publishes a task's part into a step, which does nothing where the part is there already."""

    @functools.wraps(make)
    def run(job: CorpusJob, task: _T) -> list[Any]:
        if not job.parts.get(task.path):  # a runner may run a step again
            make(job, task)
        return []

    return run


def published(job: CorpusJob, path: str) -> Part:
    """The record of a part that a step before has published.

    Raises:
        PipelineError: the part is not there.
    """
    part = job.parts.get(path)
    if part is None:
        raise PipelineError(
            f"{redact(job.folder.url)}/{path}: the part is not there as it was published; delete its stage's directory "
            "and run it again"
        )
    return part


def documents_kind(job: CorpusJob) -> str:
    """The kind of work parts that hold the documents once paragraphs are done with."""
    return "distinct" if job.config.dedup_paragraphs else "chunks"


def in_source_order(job: CorpusJob, kind: str, language: str) -> list[Part]:
    """The work parts of a kind that were made of one chunk each, ordered by source and place in it."""

    def place(part: Part) -> tuple[str, int]:
        *_, source, name = part.path.split("/")
        return source, int(name.removesuffix(".arrow"))

    return sorted(job.work_parts(kind, language), key=place)


def counterpart(job: CorpusJob, kind: str, language: str, path: str) -> str:
    """Name of the part of a kind that is made of the same chunk as the part `path`."""
    *_, source, name = path.split("/")
    return f"{job.work_folder(kind, language)}/{source}/{name}"


def chunk_tasks(job: CorpusJob, languages: Sequence[str], made_of: str, kind: str) -> list[ChunkTask]:
    """One task for each part of documents of which the part of this kind is still to be made."""
    tasks: list[ChunkTask] = []
    for language in languages:
        done = job.parts.done(job.work_folder(kind, language))
        for rank, part in enumerate(in_source_order(job, made_of, language)):
            path = counterpart(job, kind, language, part.path)
            if path not in done:
                tasks.append(ChunkTask(language, part.path, rank, path))
    return tasks


def document_tasks(job: CorpusJob, languages: Sequence[str], kind: str) -> list[ChunkTask]:
    """One task for each part of the documents that are left after the pass over paragraphs."""
    return chunk_tasks(job, languages, documents_kind(job), kind)


def bucket_tasks(
    job: CorpusJob, languages: Sequence[str], made_of: str, kind: str, rows_per_bucket: int = ROWS_PER_BUCKET
) -> list[BucketTask]:
    """One task for each bucket of which the part of this kind is still to be made."""
    tasks: list[BucketTask] = []
    for language in languages:
        target = job.work_folder(kind, language)
        done = job.parts.done(target)
        count = math.ceil(sum(part.rows for part in job.work_parts(made_of, language)) / rows_per_bucket)
        for index in range(count):
            path = f"{target}/{shard_name(index, count, 'bucket')}"
            if path not in done:
                tasks.append(BucketTask(language, index, count, path))
    return tasks


def drops_path(job: CorpusJob, language: str, name: str) -> str:
    """Name of a part that lists documents of a language to leave out."""
    return f"{job.work_folder('drops', language)}/{name}.arrow"


def publish_drops(job: CorpusJob, path: str, keys: Keys, reason: str) -> None:
    """Publish the ascending keys of the documents to leave out, and why."""
    publish_sorted(job.parts, path, pa.table([keys], schema=DROPS), {"reason": reason})
