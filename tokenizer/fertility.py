"""How well a vocabulary fits a language, measured on text it was not trained on where there is any.

- fertility: pieces per word, words being what white space separates; in a script that is written without spaces, pieces
  per character. Close to 1 is good; far above the other languages' means that this one was sampled too little.
- unknown rate: share of pieces that are [UNK].
- bytes per token: how much UTF-8 text one piece stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tokenizer.words import UNSPACED

MEASURED_BYTES = 1_000_000  # of each language


@dataclass(frozen=True)
class Counts:
    """Pieces of some texts, and how many of them are the unknown one."""

    pieces: int
    unknown: int


Tokenize = Callable[[list[bytes]], Counts]
"""Counts the pieces of UTF-8 texts."""


@dataclass(frozen=True)
class Extent:
    """What pieces are set in relation to: the bytes, words and characters of some texts."""

    size: int
    words: int
    characters: int
    unspaced: bool

    @classmethod
    def of(cls, texts: list[bytes]) -> Extent:
        """Count what is in UTF-8 texts."""
        joined = b"\n".join(texts).decode()
        words = joined.split()
        characters = sum(map(len, words))
        unspaced = len(UNSPACED.findall(joined)) > characters / 2
        return cls(sum(map(len, texts)), len(words), characters, unspaced)


def measure(tokenize: Tokenize, texts: list[bytes]) -> dict[str, Any]:
    """Fertility, unknown rate and bytes per token of a tokenizer on some texts."""
    found, extent = tokenize(texts), Extent.of(texts)
    return {
        "measured_bytes": extent.size,
        "unit": "character" if extent.unspaced else "word",
        "fertility": round(found.pieces / (extent.characters if extent.unspaced else extent.words), 4),
        "unknown_rate": round(found.unknown / found.pieces, 6),
        "bytes_per_token": round(extent.size / found.pieces, 4),
    }


def first_texts(batches: Iterable[list[bytes]], size: int = MEASURED_BYTES) -> list[bytes]:
    """About the first `size` bytes of some texts, the last of which is taken whole."""
    texts, taken = [], 0
    for batch in batches:
        for text in batch:
            texts.append(text)
            taken += len(text)
            if taken >= size:
                return texts
    return texts
