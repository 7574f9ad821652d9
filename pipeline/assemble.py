"""Second half of the corpus stage: chunks to shards, without a shuffle.

Shard b of n holds the b-th n-th of the hash space. Every chunk is sorted by hash and read by slice; the slices are
merged by (hash, source, offset), and of equal neighbours the first stays. Equal texts have equal hashes and therefore
always meet: that is the exact deduplication. What other passes over the chunks find superfluous (`phases`) is left out
here too. Memory: twice one shard, whatever the number of chunks. A shard reads at least one batch, 1/64, of every
chunk: where a language has more shards than that, larger chunks save reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import copies, near, repeats
from pipeline.artifact import read
from pipeline.chunks import CorpusJob
from pipeline.config import CorpusConfig
from pipeline.counters import count
from pipeline.passes import DROPS, Phase, documents_kind, in_source_order, step
from pipeline.shards import (
    CORPUS_SCHEMA,
    REJECT_SCHEMA,
    ROWS_PER_BATCH,
    dataset_files,
    parse_shard,
    shard_name,
    write_batches,
)
from pipeline.slices import hashes_of, read_slice, read_slices, span

DUPLICATE = "duplicate"


@dataclass(frozen=True)
class ShardTask:
    """Shard `index` of `count` of a language, or with `count` 0 the language's rejects."""

    language: str
    index: int
    count: int
    bytes: int = 0  # of text, about

    @property
    def path(self) -> str:
        """Name of the part that this task makes."""
        if not self.count:
            return f"rejects/{self.language}.arrow"
        return f"{self.language}/{shard_name(self.index, self.count)}"


def phases(config: CorpusConfig) -> list[Phase]:
    """The phases to run, one after the other and over all languages, between cleaning and assembling."""
    chosen: list[Phase] = []
    if config.dedup_paragraphs:
        chosen += repeats.PHASES
    if config.near_duplicates is not None:
        chosen += near.PHASES
    if config.copies_across_languages == "drop":
        chosen += copies.PHASES
    return chosen


@step
def assemble(job: CorpusJob, task: ShardTask) -> None:
    """Merge one shard, or one language's rejects, and publish it; before the first shard its companions."""
    if not task.count:
        _publish_rejects(job, task)
        return
    for path, data in companions(job, task).items():
        job.folder.write(path, data)
    parts = in_source_order(job, documents_kind(job), task.language)
    table, _ = read_slices(job.folder, parts, CORPUS_SCHEMA, *span(task.index, task.count))
    # With duplicates the text may exceed 2 GiB; to take rows from chunks, Arrow would join them anew each time.
    table = table.set_column(1, "text", table["text"].cast(pa.large_string())).combine_chunks()
    hashes = hashes_of(table["id"])
    order = np.lexsort((hashes["low"], hashes["high"]))  # stable, and the rows come by source and offset
    kept = np.ones(len(order), np.bool_)
    dropped: dict[str, Counter[str]] = {}
    for reason, superfluous in _superfluous(job, task, hashes[order]):
        for source in table["source"].take(pa.array(order[kept & superfluous])).to_pylist():
            dropped.setdefault(source, Counter())[reason] += 1
        kept &= ~superfluous
    rows = order[kept]
    batches = (rows[start : start + ROWS_PER_BATCH] for start in range(0, len(rows), ROWS_PER_BATCH))
    tables = (table.take(pa.array(batch)).cast(CORPUS_SCHEMA) for batch in batches)
    with job.parts.publish(task.path) as draft:
        draft.rows = write_batches(draft.sink, CORPUS_SCHEMA, tables)
        draft.stats = {
            "text_bytes": int(pc.binary_length(table["text"]).to_numpy()[rows].sum()),
            "chars": int(pc.utf8_length(table["text"]).to_numpy()[rows].sum()),
            "dropped": dropped,
        }
    count("kept", len(rows))
    count("dropped", sum(dropped.values(), Counter()))


def companions(job: CorpusJob, task: ShardTask) -> dict[str, bytes]:
    """The files by which `datasets` knows a language's directory; they come with its first shard."""
    if task.index or not task.count:
        return {}
    names = [shard_name(index, task.count) for index in range(task.count)]
    files = dataset_files(CORPUS_SCHEMA, names, job.fingerprint)
    return {f"{task.language}/{name}": data for name, data in files.items()}


def _superfluous(
    job: CorpusJob, task: ShardTask, hashes: npt.NDArray[np.void]
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Reasons to leave rows out, given their sorted hashes, and which rows; of a row the first reason counts."""
    if job.config.dedup == "exact":
        repeated = np.zeros(len(hashes), np.bool_)
        repeated[1:] = hashes[1:] == hashes[:-1]
        yield DUPLICATE, repeated
    keys = hashes["high"].astype(np.uint64)
    for part in job.work_parts("drops", task.language):
        drops = read_slice(job.folder, part, DROPS, *span(task.index, task.count))
        yield part.stats["reason"], np.isin(keys, drops["key"].to_numpy())


def _publish_rejects(job: CorpusJob, task: ShardTask) -> None:
    """One part after the other as they come by source and place, so that memory does not grow with their number."""
    parts = in_source_order(job, "rejects", task.language)
    tables = (parse_shard(read(job.folder, part), part.path, REJECT_SCHEMA) for part in parts)
    with job.parts.publish(task.path) as draft:
        draft.rows = write_batches(draft.sink, REJECT_SCHEMA, tables)
