"""Text to pieces with SentencePiece: loads a model, encodes batches to flat id arrays, lists the scored pieces."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import sentencepiece
from numpy.typing import NDArray

Processor = sentencepiece.SentencePieceProcessor

WHOLE_TEXT_BYTES = 16_384


def load(model: bytes) -> Processor:
    """The processor of a serialised model."""
    return Processor(model_proto=model)


def encode(processor: Processor, batches: Iterable[list[bytes]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Encode UTF-8 texts as `transformers` does: line ends in them count as spaces.

    Pieces never reach over a space, so a text gives the same pieces whole or line by line. Long texts are encoded by
    line, because only sums of about 7000 scores are exact (`tokenizer.scores`).

    No text gives special ids: SentencePiece does not look for its control pieces, so a literal "[CLS]" is plain text.

    Returns:
        ids int32 [pieces] of all texts one after the other, and offsets int64 [texts + 1] where each begins.
    """
    found, sizes = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
    for batch in filter(None, batches):
        lines, counts = _lines(batch)
        arrays = processor.encode(lines, out_type="numpy", num_threads=1)
        found.append(np.concatenate(arrays))
        line_sizes = np.fromiter(map(len, arrays), np.int64, len(arrays))
        sizes.append(np.add.reduceat(line_sizes, np.cumsum(counts) - counts))
    return np.concatenate(found), np.cumsum(np.concatenate(sizes))


def _lines(texts: list[bytes]) -> tuple[list[bytes], NDArray[np.int64]]:
    """What to encode, and how many of these lines each text has."""
    lines: list[bytes] = []
    counts = []
    for text in texts:
        found = [text.replace(b"\n", b" ")] if len(text) <= WHOLE_TEXT_BYTES else text.split(b"\n")
        lines += found
        counts.append(len(found))
    return lines, np.array(counts)


def scored_pieces(processor: Processor) -> list[tuple[str, float]]:
    """Every piece with its log probability (0 for special ones), in order of id."""
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]


def vocab_lines(scored: list[tuple[str, float]]) -> bytes:
    """`spm.vocab` as SentencePiece's own trainer writes it: a piece, a tab and its score on every line."""
    return "".join(f"{piece}\t{score:.6g}\n" for piece, score in scored).encode()
