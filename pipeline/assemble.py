"""Second half of the corpus stage: chunks to shards, without a shuffle.

Shard b of n holds the b-th n-th of the hash space. Every chunk is sorted by hash, so its share of a shard is found
by binary search; the shares are merged by (hash, source, offset), and of equal neighbours the first stays. Equal
texts have equal hashes and therefore always meet: that is the exact deduplication. Memory: a few times one shard.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chunks import CorpusJob
from pipeline.manifest import Part
from pipeline.shards import CORPUS_SCHEMA, REJECT_SCHEMA, open_shard, shard_name, write_stream
from pipeline.stage import fetch
from pipeline.storage import Folder

_HASH_BITS = 128


@dataclass(frozen=True)
class ShardTask:
    """Shard `index` of `count` of a language, or with `count` 0 the language's rejects."""

    language: str
    index: int
    count: int

    @property
    def path(self) -> str:
        """Name of the part that this task makes."""
        if not self.count:
            return f"rejects/{self.language}.arrow"
        return f"{self.language}/{shard_name(self.index, self.count)}"


def assemble(job: CorpusJob, task: ShardTask) -> list[Any]:
    """Beam step: merge one shard, or one language's rejects, and publish it."""
    if not task.count:
        _publish_rejects(job, task)
        return []
    low, high = hash_bounds(task.index, task.count)
    shares = [_share(job.folder, part, low, high) for part in job.work_parts("chunks", task.language)]
    table = pa.concat_tables(shares).sort_by([("id", "ascending"), ("source", "ascending"), ("offset", "ascending")])
    duplicates: Counter[str] = Counter()
    if job.config.dedup == "exact":
        table, duplicates = _without_duplicates(table)
    with job.parts.publish(task.path) as draft:
        draft.rows = write_stream(draft.sink, CORPUS_SCHEMA, table)
        draft.stats = {
            "text_bytes": pc.sum(pc.binary_length(table["text"])).as_py() or 0,
            "chars": pc.sum(pc.utf8_length(table["text"])).as_py() or 0,
            "duplicates": dict(sorted(duplicates.items())),
        }
    return []


def hash_bounds(index: int, count: int) -> tuple[str, str]:
    """First hash of the index-th of `count` equal parts of the hash space, and the first beyond it, in hex."""
    low, high = ((part << _HASH_BITS) // count for part in (index, index + 1))
    return f"{low:032x}", f"{high:032x}" if index + 1 < count else "g"  # "g" sorts behind every hex digit


def _share(folder: Folder, part: Part, low: str, high: str) -> pa.Table:
    table = open_shard(fetch(folder, part), CORPUS_SCHEMA)
    ids = table["id"]
    start, stop = (bisect_left(range(len(ids)), bound, key=lambda row: ids[row].as_py()) for bound in (low, high))
    return table.slice(start, stop - start)


def _without_duplicates(table: pa.Table) -> tuple[pa.Table, Counter[str]]:
    ids = table["id"].combine_chunks()
    if len(ids) < 2:
        return table, Counter()
    repeated = pa.concat_arrays([pa.array([False]), pc.equal(ids[1:], ids[:-1])])
    return table.filter(pc.invert(repeated)), Counter(table.filter(repeated)["source"].to_pylist())


def _publish_rejects(job: CorpusJob, task: ShardTask) -> None:
    parts = job.work_parts("rejects", task.language)
    table = pa.concat_tables(open_shard(fetch(job.folder, part), REJECT_SCHEMA) for part in parts)
    with job.parts.publish(task.path) as draft:
        draft.rows = write_stream(
            draft.sink, REJECT_SCHEMA, table.sort_by([("source", "ascending"), ("offset", "ascending")])
        )
