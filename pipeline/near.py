"""Near-duplicates: of documents that resemble each other, directly or through others, the one with the lowest id stays.

1. `sign`, over documents: the band hashes of every document's shingles (`shingles`), sorted; of equal ones once.
2. `pair`, over buckets of the band hashes: documents that share one form a group, each is paired with its lowest.
3. `verify`, over buckets of the pairs: the Jaccard similarity of the two texts' shingles decides. Documents that failed
   with the same one are each paired with the lowest of them, in `ROUNDS` rounds at most.
4. `choose`, over languages: the connected components of the verified pairs.

Pairing with one document keeps a group of n at n - 1 pairs. There are no false positives; of true ones those are missed
that the S-curve misses, or that resemble neither their group's lowest nor, later, the lowest they failed with.
Documents go by the 64-bit keys of their ids. Cost: linear; 16 bytes a document and band on disk; a pair is verified in
about a millisecond, or in the time of one read where the parts are in an object store. Memory: one part of documents,
one bucket, which holds whole groups, and 100 bytes a verified pair to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa

from pipeline.chunks import CorpusJob
from pipeline.passes import (
    BucketTask,
    ChunkTask,
    Phase,
    bucket_tasks,
    document_tasks,
    documents_kind,
    drops_path,
    in_source_order,
    publish_drops,
    step,
)
from pipeline.shards import CORPUS_SCHEMA
from pipeline.shingles import Hashes, band_hashes, jaccard, shingle_hashes
from pipeline.slices import Keys, keys_of, publish_sorted, read_slice, read_slices

REASON = "near_duplicate"
ROUNDS = 4
PAIRS_PER_BUCKET = 5_000  # seconds of work on a local disk and minutes in an object store: no run looks stalled

_BANDS = pa.schema([("key", pa.uint64()), ("document", pa.uint64())])
_PAIRS = pa.schema(
    [
        ("key", pa.uint64()),  # of the lower document
        ("document", pa.uint64()),  # key of the other
        ("key_rank", pa.uint32()),  # of the parts that hold them
        ("document_rank", pa.uint32()),
    ]
)
_EDGES = pa.schema([("key", pa.uint64()), ("document", pa.uint64())])


@step
def sign(job: CorpusJob, task: ChunkTask) -> None:
    """Publish the band hashes of a part's documents, sorted, with the documents' keys; equal documents count as one."""
    bands, documents = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for batch in read_slice(job.folder, task.documents(job), CORPUS_SCHEMA).to_batches():
        hashes, present = band_hashes(batch.column("text").to_pylist(), _threshold(job))
        bands.append(hashes.ravel())
        documents.append(np.repeat(keys_of(batch.column("id"))[present], hashes.shape[1]))
    table = pa.table([np.concatenate(bands), np.concatenate(documents)], schema=_BANDS)
    publish_sorted(job.parts, task.path, _distinct(table), {})


@step
def pair(job: CorpusJob, task: BucketTask) -> None:
    """Publish a pair for each document that shares a band with a lower one: the two of them, each pair once."""
    table, ranks = read_slices(job.folder, in_source_order(job, "bands", task.language), _BANDS, *task.span)
    members = _distinct(table.append_column("document_rank", pa.array(ranks)))
    pairs = _with_lowest(members)
    publish_sorted(job.parts, task.path, pairs, {})


@step
def verify(job: CorpusJob, task: BucketTask) -> None:
    """Publish the pairs that are similar, and in the counts how many were compared and how many left undecided."""
    pairs, _ = read_slices(job.folder, job.work_parts("pairs", task.language), _PAIRS, *task.span)
    pairs = _distinct(pairs)
    shingles = _shingle_reader(job, task.language)
    similar_pairs, compared = [_EDGES.empty_table()], 0
    for _ in range(ROUNDS):
        similarities = (
            jaccard(shingles(low, low_rank), shingles(high, high_rank))
            for low, high, low_rank, high_rank in zip(*(column.to_pylist() for column in pairs.columns), strict=True)
        )
        similar = np.fromiter(similarities, np.float64, pairs.num_rows) >= _threshold(job)
        compared += pairs.num_rows
        similar_pairs.append(pairs.filter(pa.array(similar)).select(_EDGES.names))
        pairs = _with_lowest(pairs.filter(pa.array(~similar)))
    edges = _distinct(pa.concat_tables(similar_pairs))
    publish_sorted(job.parts, task.path, edges, {"compared": compared, "undecided": pairs.num_rows})


@step
def choose(job: CorpusJob, task: BucketTask) -> None:
    """Publish which documents of a language to drop: of those that are connected, all but the lowest."""
    edges, _ = read_slices(job.folder, job.work_parts("edges", task.language), _EDGES)
    documents, lowest = components(edges["key"].to_numpy(), edges["document"].to_numpy())
    publish_drops(job, task.path, documents[documents != lowest], REASON)


def components(first: Keys, second: Keys) -> tuple[Keys, Keys]:
    """The ends of these edges, ascending, and for each the lowest end that it is connected with.

    Each round hangs the higher of an edge's two roots below the lower one and makes all paths short; the number of
    rounds is about the logarithm of the longest chain.
    """
    documents, ends = np.unique(np.concatenate([first, second]), return_inverse=True)
    low, high = np.split(ends, 2)
    parents = np.arange(len(documents))
    while np.any(parents[low] != parents[high]):
        roots = parents[low], parents[high]
        np.minimum.at(parents, np.maximum(*roots), np.minimum(*roots))
        while np.any(parents[parents] != parents):
            parents = parents[parents]
    return documents, documents[parents]


def _choose_tasks(job: CorpusJob, languages: Sequence[str]) -> list[BucketTask]:
    tasks = [BucketTask(language, 0, 1, drops_path(job, language, "near")) for language in languages]
    return [task for task in tasks if not job.parts.get(task.path)]


PHASES: Sequence[Phase] = (
    Phase("sign documents", partial(document_tasks, kind="bands"), sign),
    Phase("pair documents", partial(bucket_tasks, made_of="bands", kind="pairs"), pair),
    Phase(
        "verify pairs",
        partial(bucket_tasks, made_of="pairs", kind="edges", rows_per_bucket=PAIRS_PER_BUCKET),
        verify,
    ),
    Phase("choose documents", _choose_tasks, choose),
)


def _threshold(job: CorpusJob) -> float:
    threshold = job.config.near_duplicates
    assert threshold is not None, "the pass runs only where a threshold is configured"
    return threshold


def _distinct(table: pa.Table) -> pa.Table:
    """The rows sorted by key and document, the first of those that have both in common."""
    keys, documents = table["key"].to_numpy(), table["document"].to_numpy()
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    repeated = np.zeros(len(order), np.bool_)
    repeated[1:] = (keys[1:] == keys[:-1]) & (documents[1:] == documents[:-1])
    return table.take(pa.array(order[~repeated]))


def _with_lowest(members: pa.Table) -> pa.Table:
    """Distinct rows of documents as pairs: each document with the lowest that has the same key, but for that one."""
    keys, documents, ranks = (members[name].to_numpy() for name in ("key", "document", "document_rank"))
    lowest = np.searchsorted(keys, keys)
    others = np.flatnonzero(lowest != np.arange(len(keys)))
    low = lowest[others]
    return _distinct(pa.table([documents[low], documents[others], ranks[low], ranks[others]], schema=_PAIRS))


def _shingle_reader(job: CorpusJob, language: str) -> Callable[[int, int], Hashes]:
    """A function that reads the distinct shingles of the document with a key in the part of a rank."""
    parts = in_source_order(job, documents_kind(job), language)

    @lru_cache(maxsize=2)  # the pairs of one document follow each other
    def shingles(key: int, rank: int) -> Hashes:
        found = read_slice(job.folder, parts[rank], CORPUS_SCHEMA, key, key)
        return np.unique(shingle_hashes([found["text"][0].as_py()])[0])

    return shingles
