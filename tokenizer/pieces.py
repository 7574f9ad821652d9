"""Text to pieces with SentencePiece: loads a model, encodes batches to flat id arrays, lists the scored pieces."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
from numpy.typing import NDArray

Processor = sentencepiece.SentencePieceProcessor

STRETCH_BYTES = 4096
"""So few bytes are at most as many pieces, and the sum of their scores is exact (`tokenizer.scores`)."""


def load(model: bytes) -> Processor:
    """The processor of a serialised model."""
    return Processor(model_proto=model)


def encode(processor: Processor, batches: Iterable[list[bytes]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Encode UTF-8 texts as `transformers` does: line ends in them count as spaces.

    Pieces never reach over a space, so a text gives the same pieces whole or in stretches that end at spaces. Stretches
    of a few kilobytes keep the sums of scores exact and are few enough for what a call costs to be of no account. (Only
    a literal "▁" may be lost where a stretch ends, as it is where a text ends.)

    No text gives special ids: SentencePiece does not look for its control pieces, so a literal "[CLS]" is plain text.

    Returns:
        ids int32 [pieces] of all texts one after the other, and offsets int64 [texts + 1] where each begins.
    """
    ids, sizes = io.BytesIO(), [np.zeros(1, np.int64)]
    for batch in filter(None, batches):
        stretches, firsts = _cut(batch)
        arrays = processor.encode(stretches, out_type="numpy", num_threads=1)
        ids.writelines(arrays)
        sizes.append(np.add.reduceat(np.fromiter(map(len, arrays), np.int64, len(arrays)), firsts))
    return np.frombuffer(ids.getbuffer(), np.int32), np.cumsum(np.concatenate(sizes))


def _cut(texts: list[bytes]) -> tuple[list[bytes], list[int]]:
    """What to encode, and at which of these stretches each text begins."""
    stretches: list[bytes] = []
    firsts = []
    for text in texts:
        firsts.append(len(stretches))
        spaced = text.replace(b"\n", b" ")
        if len(spaced) <= STRETCH_BYTES:
            stretches.append(spaced)
        else:
            stretches += _stretches(spaced)
    return stretches, firsts


def _stretches(text: bytes) -> Iterator[bytes]:
    """The text in stretches of at most STRETCH_BYTES, without the spaces between them; longer words stay whole."""
    start = 0
    while len(text) - start > STRETCH_BYTES:
        end = text.rfind(b" ", start + 1, start + STRETCH_BYTES + 1)
        if end < 0:
            end = text.find(b" ", start + STRETCH_BYTES)
        if end < 0:
            break
        yield text[start:end]
        start = end + 1
    yield text[start:]


def scored_pieces(processor: Processor) -> list[tuple[str, float]]:
    """Every piece with its log probability (0 for special ones), in order of id."""
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]


def vocab_lines(scored: list[tuple[str, float]]) -> bytes:
    """`spm.vocab` as SentencePiece's own trainer writes it: a piece, a tab and its score on every line."""
    return "".join(f"{piece}\t{score:.6g}\n" for piece, score in scored).encode()
