"""The rows a run trains on, by their number in the run, and the rows it is measured on.

Which row a number stands for is `model.order`'s arithmetic, reading it is `model.token_shards`'s work: this module puts
the two together. Nothing has to be read before the first row that is wanted, wherever in the run that is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from model.order import Ints, Samples, TrainingOrder, apportion
from model.token_shards import LanguageRows, TokenShards
from pipeline.artifact import Artifact
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError, UserError
from pipeline.storage import redact

T = TypeVar("T")


class Rows(NamedTuple):
    """Rows of token ids and what they consist of."""

    slots: Ints
    """[B] int64: each sample's number in the run (negative for held-out rows); its randomness depends on it."""
    input_ids: Ints
    """[B, L] int32, 0 where padded."""
    segment_ids: Ints
    """[B, L] int32: 0 is padding, 1, 2, ... the segments of a row."""
    languages: Ints
    """[B] int64: index into `TrainingData.languages`."""

    def narrow(self, first: int, count: int) -> Rows:
        """Rows first .. first + count - 1, or as many of them as there are."""
        chosen = slice(first, first + count)
        return Rows(*(array[chosen] for array in self))


class TrainingData:
    """The training rows of all languages in the run's order, and the held-out rows beside them.

    Args:
        tokens: the committed stage.
        config: of the stage that trains.
        vocab_rows: of the embedding tables; a row with other ids is refused.

    Raises:
        UserError: the tokens stage holds no training rows.
    """

    def __init__(self, tokens: Artifact, config: PretrainConfig, vocab_rows: int) -> None:
        counts = {name: entry["train"] for name, entry in sorted(tokens.manifest.stats["languages"].items())}
        self.weights = {name: entry["tokens"] ** config.alpha for name, entry in counts.items() if entry["rows"]}
        if not self.weights:
            raise UserError(
                f"{redact(tokens.folder.url)} holds no training rows; give corpus.inputs more text "
                "or lower tokens.validation_fraction"
            )
        self.languages = tuple(self.weights)
        self._shards = TokenShards(tokens, vocab_rows)
        self._tables = [self._shards.rows(name, "train") for name in self.languages]
        self._order = TrainingOrder([len(table) for table in self._tables], list(self.weights.values()), config.seed)

    def samples(self, first: int, count: int) -> Samples:
        """Which samples are in slots first .. first + count - 1 of the run."""
        return self._order.samples(np.arange(first, first + count, dtype=np.int64))

    def read(self, first: int, count: int) -> Rows:
        """The rows in those slots.

        Raises:
            PipelineError: a shard is missing, or damaged as far as is known by now.
        """
        return self._gather(self._tables, self.samples(first, count))

    def held_out(self, wanted: int) -> Rows:
        """The first validation rows of every language, about as many as its share of the training batches."""
        tables = [self._shards.rows(name, "validation") for name in self.languages]
        shares = apportion(list(self.weights.values()), max(wanted, len(tables)))
        rows = [np.arange(min(len(table), share), dtype=np.int64) for table, share in zip(tables, shares, strict=True)]
        language = np.repeat(np.arange(len(tables)), [len(found) for found in rows])
        slots = -1 - np.arange(len(language), dtype=np.int64)
        return self._gather(tables, Samples(slots, language, np.concatenate(rows)))

    def require_verified(self) -> None:
        """Wait until the digest of every shard opened so far has been checked.

        Raises:
            PipelineError: a shard's bytes are not the ones that were committed.
        """
        self._shards.require_verified()

    def _gather(self, tables: list[LanguageRows], samples: Samples) -> Rows:
        return Rows(samples.slot, *self._shards.read(tables, samples.language, samples.row), samples.language)


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


def read_ahead(read: Callable[[int], T], steps: range) -> Generator[T, None, None]:
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
