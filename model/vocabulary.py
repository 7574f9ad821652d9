"""What the networks must know of a vocabulary: its pieces, the id of [MASK] and how many rows the tables have."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipeline.artifact import Artifact
from pipeline.config import ModelConfig
from pipeline.errors import UserError

ROWS_MULTIPLE = 128


class Vocabulary(NamedTuple):
    """A vocabulary and the tables over it."""

    pieces: list[str]
    """By id."""
    rows: int
    """V: pieces, [MASK] and spare rows."""

    @property
    def mask_id(self) -> int:
        """Id of [MASK], the one after the last piece."""
        return len(self.pieces)


def read_vocabulary(vocab: Artifact, model: ModelConfig) -> Vocabulary:
    """The vocabulary of a committed vocab stage.

    Raises:
        UserError: pretrain.model.vocab_size is smaller than the vocabulary.
    """
    lines = Path(vocab.fetch("spm.vocab")).read_text(encoding="utf-8").split("\n")
    pieces = [line.partition("\t")[0] for line in lines if line]
    return Vocabulary(pieces, table_rows(model, len(pieces)))


def table_rows(model: ModelConfig, mask_id: int) -> int:
    """Rows of the embedding tables: every piece, [MASK], and spare rows up to a multiple of 128.

    Raises:
        UserError: pretrain.model.vocab_size is smaller than the vocabulary.
    """
    needed = mask_id + 1
    if model.vocab_size is None:
        return -(-needed // ROWS_MULTIPLE) * ROWS_MULTIPLE
    if model.vocab_size < needed:
        raise UserError(
            f"pretrain.model.vocab_size {model.vocab_size} is less than the {needed} ids of the vocabulary; "
            "raise it or leave it out"
        )
    return model.vocab_size
