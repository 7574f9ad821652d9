"""The tokens stage: corpus shards to rows of token ids, one Beam element a shard.

A worker cuts off a shard's validation documents, encodes both splits, packs them into rows and publishes these under
the shard's own number, with what it counted in their records. A shard is done when they account for all its documents.
So a shard's rows depend on that shard, the vocabulary and the config alone, whatever the runner, the number of workers
or the order.

Memory: 8 bytes a piece, its id as encoded and in its row, beside the mapped shard. Time: nearly all is SentencePiece's.

The validation split is the top of the range of content hashes: the same documents at any shard size, and none of them
also in the training split.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifact import fetch
from pipeline.beam import local_workers, run_map
from pipeline.config import TokensConfig
from pipeline.errors import PipelineError
from pipeline.manifest import Part
from pipeline.progress import published
from pipeline.shards import CORPUS_SCHEMA, open_shard, shard_name, token_schema, write_stream
from pipeline.stage import PartStore, StageRun
from pipeline.storage import Folder
from tokenizer import pieces
from tokenizer.documents import shards_by_language, text_batches, text_bytes
from tokenizer.pack import Rows, pack
from tokenizer.special import UNK_ID

SPLITS = ("train", "validation")
_HASHES = 1 << 128


@dataclass(frozen=True)
class Shard:
    """Shard `index` of the `count` that a language has: the element of the pipeline."""

    language: str
    index: int
    count: int
    part: Part

    def rows_path(self, split: str) -> str:
        """The part with the rows of a split; it does not exist where the split has no documents."""
        return f"{self.language}/{shard_name(self.index, self.count, split)}"


@dataclass(frozen=True)
class Job:
    """What the work on every shard needs: where to read, how to encode and pack, where to publish."""

    corpus: Folder
    vocab: Folder
    model: Part
    config: TokensConfig
    parts: PartStore

    @property
    def schema(self) -> pa.Schema:
        """Of the token rows."""
        return token_schema(self.config.max_seq_len, self.model.sha256)


def run(run: StageRun) -> None:
    """Encode every shard that is not done yet, check that no document was lost, and commit."""
    corpus, vocab, config = run.upstream["corpus"], run.upstream["vocab"], run.config.tokens
    shards = {
        language: [Shard(language, index, len(parts), part) for index, part in enumerate(parts)]
        for language, parts in shards_by_language(corpus).items()
    }
    job = Job(corpus.folder, vocab.folder, vocab.manifest.parts["spm.model"], config, run.parts)
    done = run.parts.done()
    missing = [shard for group in shards.values() for shard in group if _documents([shard], done) < shard.part.rows]
    workers = local_workers(config.workers, sum(shard.part.bytes for shard in missing))
    run_map(
        "tokens",
        [("encode", partial(encode_shard, job))],
        missing,
        workers,
        run.runner_args,
        size=lambda shard: shard.part.bytes,
        stall_minutes=run.config.corpus.stall_minutes,
        progress=partial(published, run.folder),
    )
    done = run.parts.done()
    languages = {language: _totals(group, done, config.max_seq_len) for language, group in shards.items()}
    stats = {"languages": languages, "max_seq_len": config.max_seq_len, "tokenizer_sha256": job.model.sha256}
    run.parts.publish_bytes("stats.json", json.dumps(stats, indent=1, sort_keys=True).encode())
    run.commit(stats)


def encode_shard(job: Job, shard: Shard) -> Iterable[Any]:
    """Encode, split, pack and publish one shard; the last step of the pipeline, so it returns no elements."""
    table = open_shard(fetch(job.corpus, shard.part), CORPUS_SCHEMA)
    border = first_held_out(table["id"], job.config.validation_fraction)
    splits = {"train": table["text"].slice(0, border), "validation": table["text"].slice(border)}
    for split, texts in splits.items():
        if len(texts):
            _publish_rows(job, shard.rows_path(split), texts)
    return ()


def first_held_out(ids: pa.ChunkedArray, fraction: float) -> int:
    """Where validation begins in a shard's sorted ids: at the first hash in the top `fraction` of all hashes."""
    last_train = f"{_HASHES - 1 - int(fraction * _HASHES):032x}"
    return pc.sum(pc.less_equal(ids, last_train)).as_py() or 0


def _publish_rows(job: Job, path: str, texts: pa.ChunkedArray) -> None:
    """Publish the rows of some documents and, in their record, what there was to count."""
    processor = _processor(fetch(job.vocab, job.model))
    ids, offsets = pieces.encode(processor, text_batches(texts))
    rows = pack(ids, offsets, job.config.max_seq_len, job.config.packing)
    unknown = int(np.count_nonzero(ids == UNK_ID))
    counts = {"documents": len(texts), "pieces": len(ids), "unknown": unknown, "tokens": rows.tokens}
    with job.parts.publish(path) as draft:
        draft.rows = write_stream(draft.sink, job.schema, to_table(rows, job.schema))
        draft.stats.update(counts)


def to_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Packed rows as an Arrow table of a `token_schema`; the ids are not copied."""
    ids_type, lengths_type = schema.types
    input_ids = pa.FixedSizeListArray.from_arrays(rows.input_ids.reshape(-1), type=ids_type)
    offsets = np.concatenate(([0], np.cumsum(rows.segment_counts))).astype(np.int32)
    lengths = pa.ListArray.from_arrays(offsets, rows.segment_lengths, type=lengths_type)
    return pa.Table.from_arrays([input_ids, lengths], schema=schema)


@lru_cache(maxsize=1)
def _processor(path: str) -> pieces.Processor:
    return pieces.load(Path(path).read_bytes())


def _totals(shards: list[Shard], done: Mapping[str, Part], max_seq_len: int) -> dict[str, Any]:
    """What one language gave.

    Raises:
        PipelineError: the runner lost or repeated work, so that not every document was encoded exactly once.
    """
    splits = {split: _counted(shards, split, done) for split in SPLITS}
    total = sum(splits.values(), Counter())
    expected = sum(shard.part.rows for shard in shards)
    if (encoded := total["documents"]) != expected:
        name = shards[0].language
        raise PipelineError(f"tokens: {encoded} of the {expected} documents of {name} were encoded; run it again")
    size = text_bytes([shard.part for shard in shards])
    return {
        "documents": expected,
        "pieces": total["pieces"],
        "unknown_rate": _ratio(total["unknown"], total["pieces"]),
        "bytes_per_token": _ratio(size, total["pieces"]),
        "fill": _ratio(total["tokens"], total["rows"] * max_seq_len),
        **{split: {key: splits[split][key] for key in ("documents", "rows", "tokens")} for split in SPLITS},
    }


def _documents(shards: list[Shard], done: Mapping[str, Part]) -> int:
    """How many documents the published rows of both splits account for."""
    return sum(_counted(shards, split, done)["documents"] for split in SPLITS)


def _counted(shards: list[Shard], split: str, done: Mapping[str, Part]) -> Counter[str]:
    """What the published rows of a split hold: documents, pieces, unknown ones among them, rows and tokens."""
    parts = [done[path] for shard in shards if (path := shard.rows_path(split)) in done]
    return sum((Counter({**part.stats, "rows": part.rows}) for part in parts), Counter())


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
