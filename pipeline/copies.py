"""Copies across languages: a text that several languages have stays in the one with the most text.

1. `list_ids`, over documents: the keys of their ids.
2. `find_copies`, over buckets of the key space, of all languages at once: where languages share a key, all but the one
   with the most text (of equally large ones the first by name) drop it.

Cost: one read of all text, 8 bytes a document on disk. Memory: one part of documents, or one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.chunks import CorpusJob
from pipeline.passes import (
    ROWS_PER_BUCKET,
    ChunkTask,
    Phase,
    document_tasks,
    documents_kind,
    drops_path,
    publish_drops,
    step,
)
from pipeline.shards import CORPUS_SCHEMA, shard_name
from pipeline.slices import keys_of, publish_sorted, read_slice, read_slices, span

REASON = "copy"

_IDS = pa.schema([("key", pa.uint64())])


@dataclass(frozen=True)
class CopiesTask:
    """The index-th of `count` buckets; of `languages` the one with the most text is first. `path` says it is done."""

    languages: tuple[str, ...]
    index: int
    count: int
    path: str


@step
def list_ids(job: CorpusJob, task: ChunkTask) -> None:
    """Publish the keys of a part's documents."""
    batches = read_slice(job.folder, task.documents(job), CORPUS_SCHEMA).to_batches()
    keys = np.concatenate([np.empty(0, np.uint64), *(keys_of(batch.column("id")) for batch in batches)])
    publish_sorted(job.parts, task.path, pa.table([keys], schema=_IDS), {})


@step
def find_copies(job: CorpusJob, task: CopiesTask) -> None:
    """Publish for each language the documents of a bucket that it leaves to a larger language."""
    found = []
    for language in task.languages:
        ids, _ = read_slices(job.folder, job.work_parts("ids", language), _IDS, *span(task.index, task.count))
        found.append(np.unique(ids["key"].to_numpy()))
    keys = np.concatenate(found)
    owners = np.repeat(np.arange(len(found), dtype=np.uint16), [len(own) for own in found])
    order = np.argsort(keys, kind="stable")  # of equal keys the one of the largest language comes first
    keys, owners = keys[order], owners[order]
    copied = np.concatenate([[False], keys[1:] == keys[:-1]])[: len(keys)]
    for owner in np.unique(owners[copied]).tolist():
        path = drops_path(job, task.languages[owner], shard_name(task.index, task.count, "copies"))
        publish_drops(job, path, keys[copied & (owners == owner)], REASON)
    job.parts.publish_bytes(task.path, b"", rows=int(np.sum(copied)))


def _copies_tasks(job: CorpusJob, languages: Sequence[str]) -> list[CopiesTask]:
    text_bytes = {
        language: sum(part.stats["text_bytes"] for part in job.work_parts(documents_kind(job), language))
        for language in languages
    }
    ordered = tuple(sorted(languages, key=lambda language: (-text_bytes[language], language)))
    rows = sum(part.rows for language in languages for part in job.work_parts("ids", language))
    target = job.work_folder("copies")
    done = job.parts.done(target)
    count = math.ceil(rows / ROWS_PER_BUCKET)
    paths = [f"{target}/{shard_name(index, count, 'bucket')}" for index in range(count)]
    return [CopiesTask(ordered, index, count, path) for index, path in enumerate(paths) if path not in done]


PHASES: Sequence[Phase] = (
    Phase("list ids", partial(document_tasks, kind="ids"), list_ids),
    Phase("find copies", _copies_tasks, find_copies),
)
