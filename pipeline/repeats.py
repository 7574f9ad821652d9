"""Exact paragraphs: of a language's equal paragraphs the first stays, in the order of source, document and line.

1. `hash_paragraphs`, over chunks: the xxh3_64 of every paragraph that is the first of its kind in the chunk, and its
   number there, sorted by hash. The others are repeats already.
2. `find_repeats`, over buckets of the hash space: of equal hashes all but the one of the first chunk are repeats.
3. `remove_repeats`, over chunks: the documents without their repeats, under new ids. One that loses all its text, or
   so much that `corpus.min_chars` is not met, is dropped as `repeated_paragraphs`.

Neither the size of chunks nor that of buckets shows in what stays. Cost: linear, some 300 ns a paragraph and 12 bytes
on disk at most. Memory: seven times a chunk, or one bucket, to which a line that is everywhere adds one row a chunk.
Two of n different paragraphs have the same hash with probability n^2 / 2^65: of two billion, which are 300 GB of text,
0.11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.chunks import CorpusJob
from pipeline.counters import count
from pipeline.passes import (
    BucketTask,
    ChunkTask,
    Phase,
    bucket_tasks,
    chunk_tasks,
    counterpart,
    in_source_order,
    published,
    step,
)
from pipeline.shards import CORPUS_SCHEMA, table_of, text_size
from pipeline.slices import Keys, publish_chunk, publish_sorted, read_slice, read_slices
from pipeline.text import content_hash, keep

REASON = "repeated_paragraphs"

Numbers = npt.NDArray[np.int64]
_HASHES = pa.schema([("key", pa.uint64()), ("paragraph", pa.uint32())])
_REPEATS = pa.schema([("key", pa.uint64())])  # place of the paragraph
_PARAGRAPH_BITS = 32


@step
def hash_paragraphs(job: CorpusJob, task: ChunkTask) -> None:
    """Publish where a chunk repeats itself, then the hashes of its other paragraphs, sorted, with their numbers."""
    table = read_slice(job.folder, task.documents(job), CORPUS_SCHEMA)
    hashes, counts = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for texts in table["text"].chunks:
        lines, first = _paragraphs(texts)
        hashes.append(np.fromiter(map(xxhash.xxh3_64_intdigest, lines), np.uint64, len(lines)))
        counts.append(np.diff(first))
    hashed = np.concatenate(hashes)
    in_source = np.argsort(np.repeat(table["offset"].to_numpy(), np.concatenate(counts)), kind="stable")
    order = in_source[np.argsort(hashed[in_source], kind="stable")]
    repeated = _repeated(hashed[order])
    _publish_places(job, _own_repeats_path(job, task), _places(task.rank, order[repeated]))
    first = order[~repeated]
    columns = [pa.array(hashed[first]), pa.array(first.astype(np.uint32))]
    publish_sorted(job.parts, task.path, pa.table(columns, schema=_HASHES), {})


@step
def find_repeats(job: CorpusJob, task: BucketTask) -> None:
    """Publish where the paragraphs are that occurred in a chunk before."""
    parts = in_source_order(job, "paragraphs", task.language)
    table, ranks = read_slices(job.folder, parts, _HASHES, *task.span)
    hashes = table["key"].to_numpy()
    order = np.argsort(hashes, kind="stable")  # equal hashes come in source order
    later = order[_repeated(hashes[order])]
    _publish_places(job, task.path, _places(ranks[later], table["paragraph"].to_numpy()[later]))


@step
def remove_repeats(job: CorpusJob, task: ChunkTask) -> None:
    """Publish a chunk's documents without their repeated paragraphs."""
    chunk = task.documents(job)
    table = read_slice(job.folder, chunk, CORPUS_SCHEMA)
    repeats = _repeats(job, task)
    edited = _Edited(job.config.min_chars, job.config.max_chars)
    for batch in table.to_batches():
        edited.add(batch, repeats)
    documents = edited.documents()
    dropped = table.num_rows - documents.num_rows
    stats = chunk.stats
    count("dropped", {REASON: dropped})
    publish_chunk(
        job.parts,
        task.path,
        documents,
        {
            **stats,
            "kept": documents.num_rows,
            "dropped": {**stats["dropped"], REASON: dropped} if dropped else stats["dropped"],
            "text_bytes": text_size(documents),
            "paragraphs_removed": len(repeats),
            "paragraph_bytes_removed": edited.bytes_removed,
        },
    )


PHASES: Sequence[Phase] = (
    Phase("hash paragraphs", partial(chunk_tasks, made_of="chunks", kind="paragraphs"), hash_paragraphs),
    Phase("find repeats", partial(bucket_tasks, made_of="paragraphs", kind="repeats"), find_repeats),
    Phase("remove repeats", partial(chunk_tasks, made_of="chunks", kind="distinct"), remove_repeats),
)


def _paragraphs(texts: pa.StringArray) -> tuple[list[bytes], Numbers]:
    """The lines of all texts, and where in them those of each text begin (and, as one more, where the last ends)."""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), "\n")[0].as_buffer()
    lines = joined.to_pybytes().split(b"\n")
    line_ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
    text_ends = np.cumsum(pc.binary_length(texts).to_numpy().astype(np.int64) + 1)
    return lines, np.concatenate([[0], np.searchsorted(line_ends, text_ends) + 1])


def _repeated(ordered: Keys) -> npt.NDArray[np.bool_]:
    """Which of ascending hashes equal the one before."""
    repeated = np.zeros(len(ordered), np.bool_)
    repeated[1:] = ordered[1:] == ordered[:-1]
    return repeated


def _own_repeats_path(job: CorpusJob, task: ChunkTask) -> str:
    """Name of the part that says where a chunk repeats itself."""
    return counterpart(job, "own_repeats", task.language, task.path)


def _places(ranks: int | npt.NDArray[np.uint32], paragraphs: Numbers | npt.NDArray[np.uint32]) -> Keys:
    """Places of paragraphs as numbers: the rank of the chunk, then the number of the paragraph in it."""
    return np.asarray(ranks, np.uint64) << np.uint64(_PARAGRAPH_BITS) | paragraphs.astype(np.uint64)


def _publish_places(job: CorpusJob, path: str, places: Keys) -> None:
    publish_sorted(job.parts, path, pa.table([np.sort(places)], schema=_REPEATS), {})


def _repeats(job: CorpusJob, task: ChunkTask) -> Numbers:
    """Numbers of the chunk's repeated paragraphs, ascending."""
    first = task.rank << _PARAGRAPH_BITS
    last = first + (1 << _PARAGRAPH_BITS) - 1
    own = published(job, _own_repeats_path(job, task))
    table, _ = read_slices(job.folder, [own, *job.work_parts("repeats", task.language)], _REPEATS, first, last)
    return np.sort(table["key"].to_numpy() - np.uint64(first)).astype(np.int64)


@dataclass
class _Edited:
    """The documents of a chunk as they are without repeats, while it is gone through batch by batch."""

    min_chars: int
    max_chars: int
    untouched: list[pa.RecordBatch] = field(default_factory=list)
    changed: list[tuple[str, str, str, int]] = field(default_factory=list)
    paragraphs: int = 0
    bytes_removed: int = 0

    def add(self, batch: pa.RecordBatch, repeats: Numbers) -> None:
        lines, first = _paragraphs(batch.column("text"))
        low, high = np.searchsorted(repeats, [self.paragraphs, self.paragraphs + len(lines)])
        here = repeats[low:high] - self.paragraphs
        self.paragraphs += len(lines)
        self.bytes_removed += sum(len(lines[number]) for number in here.tolist())
        owners = np.unique(np.searchsorted(first, here, "right") - 1)
        kept = np.ones(len(lines), np.bool_)
        kept[here] = False
        untouched = np.ones(batch.num_rows, np.bool_)
        untouched[owners] = False
        self.untouched.append(batch.filter(pa.array(untouched)) if len(owners) else batch)
        for row in owners.tolist():
            own = slice(first[row], first[row + 1])
            text = b"\n".join(compress(lines[own], kept[own].tolist())).decode()
            if keep(text, self.min_chars, self.max_chars) is None:
                source, offset = (batch.column(name)[row].as_py() for name in ("source", "offset"))
                self.changed.append((content_hash(text).hex(), text, source, offset))

    def documents(self) -> pa.Table:
        """What is left, sorted by id and place."""
        untouched = pa.Table.from_batches(self.untouched, CORPUS_SCHEMA)
        if not self.changed:
            return untouched
        both = pa.concat_tables([untouched, table_of(self.changed, CORPUS_SCHEMA)])
        return both.sort_by([("id", "ascending"), ("offset", "ascending")])
