"""How well a vocabulary fits each language, measured on text it was not trained on where there is any.

- fertility: pieces per word, words being what white space separates; in a script that is written without spaces, pieces
  per character. Close to 1 is good; far above the other languages' means that this one was sampled too little.
- unknown rate: share of pieces that are [UNK].
- bytes per token: how much UTF-8 text one piece stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tokenizer.pieces import Processor, encode
from tokenizer.special import UNK_ID
from tokenizer.words import UNSPACED

MEASURED_BYTES = 1_000_000  # of each language


def measure(processor: Processor, batches: Iterable[list[bytes]]) -> dict[str, Any]:
    """Measure on about the first `MEASURED_BYTES` of some texts, the last of which is taken whole."""
    texts = list(_first(batches))
    ids, _ = encode(processor, [texts])
    joined = b"\n".join(texts).decode()
    words = joined.split()
    characters = sum(map(len, words))
    unspaced = len(UNSPACED.findall(joined)) > characters / 2
    size = sum(map(len, texts))
    return {
        "measured_bytes": size,
        "unit": "character" if unspaced else "word",
        "fertility": round(len(ids) / (characters if unspaced else len(words)), 4),
        "unknown_rate": round(float(np.mean(ids == UNK_ID)), 6),
        "bytes_per_token": round(size / len(ids), 4),
    }


def _first(batches: Iterable[list[bytes]]) -> Iterator[bytes]:
    taken = 0
    for batch in batches:
        for text in batch:
            yield text
            taken += len(text)
            if taken >= MEASURED_BYTES:
                return
