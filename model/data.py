"""Token shards to batches: rows straight from memory-mapped Arrow files, a whole batch at a time in numpy.

Which rows a step reads is `model.order`'s arithmetic; this module turns row numbers into arrays. A shard's digest and
its tokenizer are checked when its first row is wanted, once a process: a run over thousands of shards starts at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from model.order import Ints, Samples, TrainingOrder, apportion
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError, UserError
from pipeline.shards import open_shard, token_schema
from pipeline.stage import Artifact
from pipeline.storage import redact

T = TypeVar("T")
_OPEN_SHARDS = 256


class Rows(NamedTuple):
    """Rows of token ids and what they consist of."""

    slots: Ints
    """[B] int64: each sample's number in the run (negative for held-out rows); its randomness depends on it."""
    input_ids: Ints
    """[B, L] int32, 0 where padded."""
    segment_ids: Ints
    """[B, L] int32: 0 is padding, 1, 2, ... the segments of a row."""

    def narrow(self, first: int, count: int) -> Rows:
        """Rows first .. first + count - 1, or as many of them as there are."""
        chosen = slice(first, first + count)
        return Rows(self.slots[chosen], self.input_ids[chosen], self.segment_ids[chosen])


class TrainingData:
    """The training rows of all languages in the run's order.

    Raises:
        UserError: the tokens stage holds no training rows.
    """

    def __init__(self, tokens: Artifact, config: PretrainConfig) -> None:
        counts = {name: entry["train"] for name, entry in sorted(tokens.manifest.stats["languages"].items())}
        languages = [name for name, entry in counts.items() if entry["rows"]]
        if not languages:
            raise UserError(
                f"{redact(tokens.folder.url)} holds no training rows; give corpus.inputs more text "
                "or lower tokens.validation_fraction"
            )
        self.global_batch = config.global_batch
        self.weights = {name: counts[name]["tokens"] ** config.alpha for name in languages}
        self._tables = [LanguageRows(tokens, name, "train") for name in languages]
        self._order = TrainingOrder([len(table) for table in self._tables], list(self.weights.values()), config.seed)

    def samples(self, step: int, first: int, count: int) -> Samples:
        """Which samples are at places first .. first + count - 1 of a step's global batch."""
        start = step * self.global_batch + first
        return self._order.samples(np.arange(start, start + count, dtype=np.int64))

    def read(self, step: int, first: int, count: int) -> Rows:
        """The rows at those places."""
        samples = self.samples(step, first, count)
        return _gather(self._tables, samples)


class HeldOut:
    """The first validation rows of every language, about as many as its share of the training batches."""

    def __init__(self, tokens: Artifact, weights: dict[str, float], wanted: int) -> None:
        languages = list(weights)
        tables = [LanguageRows(tokens, name, "validation") for name in languages]
        shares = apportion(list(weights.values()), max(wanted, len(languages)))
        rows = [np.arange(min(len(table), share), dtype=np.int64) for table, share in zip(tables, shares, strict=True)]
        language = np.repeat(np.arange(len(tables)), [len(found) for found in rows])
        slots = -1 - np.arange(len(language), dtype=np.int64)
        self.rows = _gather(tables, Samples(slots, language, np.concatenate(rows)))


class LanguageRows:
    """The rows of one language and split, numbered through its shards."""

    def __init__(self, tokens: Artifact, language: str, split: str) -> None:
        self._tokens = tokens
        self._parts = tokens.select(f"{language}/{split}-", ".arrow")
        self._starts = np.cumsum([0, *(part.rows for part in self._parts)])
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self.seq_len: int = tokens.manifest.stats["max_seq_len"]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, rows: Ints) -> tuple[Ints, Ints]:
        """Ids and segments, both [n, L] int32, of the rows with these numbers."""
        input_ids = np.empty((len(rows), self.seq_len), dtype=np.int32)
        segment_ids = np.empty_like(input_ids)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shards):
            here = np.flatnonzero(shards == number)
            found = self._shard(int(number)).read(rows[here] - self._starts[number])
            input_ids[here], segment_ids[here] = found
        return input_ids, segment_ids

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            self._open[number] = _Shard(self._tokens, self._parts[number].path)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def require_tokenizer(tokens: Artifact, vocab: Artifact) -> None:
    """Refuse rows of another vocabulary than the model's; that each shard is of the stage's own is checked on opening.

    Raises:
        PipelineError: naming both tokenizers.
    """
    made_with, wanted = tokens.manifest.stats["tokenizer_sha256"], vocab.manifest.parts["spm.model"].sha256
    if made_with != wanted:
        raise PipelineError(
            f"{redact(tokens.folder.url)}: encoded with tokenizer {made_with[:12]}, the vocabulary is {wanted[:12]}; "
            "delete the tokens stage's directory and run it again"
        )


class _Shard:
    """One memory-mapped file of rows, as the record batches it consists of."""

    def __init__(self, tokens: Artifact, path: str) -> None:
        stats = tokens.manifest.stats
        schema = token_schema(stats["max_seq_len"], stats["tokenizer_sha256"])
        table = open_shard(tokens.fetch(path), schema)
        made_with = (table.schema.metadata or {}).get(b"tokenizer_sha256", b"none").decode()
        if made_with != stats["tokenizer_sha256"]:
            raise PipelineError(
                f"{redact(tokens.folder.url)}/{path}: encoded with tokenizer {made_with[:12]}, the stage says "
                f"{stats['tokenizer_sha256'][:12]}; delete the tokens stage's directory and run it again"
            )
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._seq_len = stats["max_seq_len"]

    def read(self, rows: Ints) -> tuple[Ints, Ints]:
        input_ids = np.empty((len(rows), self._seq_len), dtype=np.int32)
        segment_ids = np.empty_like(input_ids)
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(batches):
            here = np.flatnonzero(batches == number)
            batch, inside = self._batches[number], rows[here] - self._starts[number]
            ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=True)
            input_ids[here] = ids.reshape(-1, self._seq_len)[inside]
            segment_ids[here] = _segment_ids(batch.column("segment_lengths"), inside, self._seq_len)
        return input_ids, segment_ids


def _segment_ids(lengths: pa.ListArray, rows: Ints, seq_len: int) -> Ints:
    """Number the tokens of the given rows by segment, from the lists of segment lengths."""
    offsets = lengths.offsets.to_numpy().astype(np.int64)
    first, count = offsets[rows], offsets[rows + 1] - offsets[rows]
    row = np.repeat(np.arange(len(rows)), count)
    entry = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    length = lengths.values.to_numpy()[first[row] + entry].astype(np.int64)
    filled = np.bincount(row, weights=length, minlength=len(rows)).astype(np.int64)
    begins = np.cumsum(length) - length
    begins -= np.repeat((np.cumsum(filled) - filled)[count > 0], count[count > 0])
    marks = np.zeros((len(rows), seq_len), dtype=np.int32)
    marks[row, begins] = 1
    return marks.cumsum(axis=1, dtype=np.int32) * (np.arange(seq_len) < filled[:, None])


def _gather(tables: list[LanguageRows], samples: Samples) -> Rows:
    input_ids = np.empty((len(samples.slot), tables[0].seq_len), dtype=np.int32)
    segment_ids = np.empty_like(input_ids)
    for number in np.unique(samples.language):
        here = np.flatnonzero(samples.language == number)
        input_ids[here], segment_ids[here] = tables[number].read(samples.row[here])
    return Rows(samples.slot, input_ids, segment_ids)


def read_ahead(read: Callable[[int], T], steps: range) -> Iterator[T]:
    """`read(step)` for each step in order; the next one is read in the background while this one is worked on."""
    if not steps:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending = pool.submit(read, steps[0])
        for following in steps[1:]:
            rows = pending.result()
            pending = pool.submit(read, following)
            yield rows
        yield pending.result()
