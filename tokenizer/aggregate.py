"""Counts the distinct segments of training text: all that a unigram vocabulary can learn from it.

SentencePiece's pieces never contain a space but as their first character, nor characters of two scripts. So text falls
apart at spaces and script borders into segments that are tokenized independently, and a segment with its count says as
much as all its occurrences: training on the counts has the same optimum for a fraction of the text.

Text is cut and counted a batch at a time in numpy and Arrow, at about 30 MB/s; memory holds a batch and the distinct
segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenizer.scripts import SCRIPTS, script_numbers
from tokenizer.words import SPACE_MARK

BATCH_BYTES = 8_000_000
_SLICE = 65_536
_MARK = SPACE_MARK.encode()
_SPACES = bytes.maketrans(b"\0\t\n\r", b"    ")
_INHERITED = SCRIPTS.index("Inherited")
_AS_HAN = [SCRIPTS.index(name) for name in ("Hiragana", "Katakana")]
_LONG_VOWEL = 0x30FC  # of both kana, so of script Common


@dataclass(frozen=True)
class Segments:
    """Distinct segments as UTF-8 in order of first occurrence, and how often each occurs."""

    texts: pa.LargeBinaryArray
    counts: NDArray[np.int64]

    def lines(self) -> Iterator[bytes]:
        """`segment TAB count`, as SentencePiece reads it."""
        for texts, counts in self.slices():
            for text, count in zip(texts, counts, strict=True):
                yield b"%b\t%d" % (text, count)

    def slices(self) -> Iterator[tuple[list[bytes], list[int]]]:
        """All texts and counts, some ten thousand at a time."""
        for start in range(0, len(self.texts), _SLICE):
            yield self.texts[start : start + _SLICE].to_pylist(), self.counts[start : start + _SLICE].tolist()


def aggregate(sentences: Iterable[bytes]) -> Segments:
    """Cut UTF-8 sentences into segments and count them.

    A sentence begins a word, which the space mark shows; runs of spaces count as one.
    """
    total, waiting = _counted(pa.array([], pa.large_binary())), []
    for batch in _batches(sentences):
        waiting.append(_counted(cut(batch)))
        if sum(map(len, waiting)) > len(total):
            total, waiting = _merged([total, *waiting]), []
    total = _merged([total, *waiting])
    return Segments(total["text"].combine_chunks(), total["count"].to_numpy())


def cut(sentences: list[bytes]) -> pa.LargeBinaryArray:
    """The segments of some sentences in order; together they are the whole text."""
    text = b" ".join(sentences).translate(_SPACES).strip(b" ")
    while b"  " in text:
        text = text.replace(b"  ", b" ")
    if not text:
        return pa.array([], pa.large_binary())
    text = _MARK + text.replace(b" ", _MARK)
    characters = np.frombuffer(text.decode().encode("utf-32-le"), np.uint32)
    widths = np.uint8(1) + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
    ends = np.cumsum(widths, dtype=np.int64)
    begins = np.flatnonzero(_begins(characters))
    offsets = np.append(ends[begins] - widths[begins], ends[-1])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(begins), buffers)


def _begins(characters: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Where a segment begins: at the mark of a space, and between two characters that no piece may hold together.

    Kana counts as Han. A character of script Inherited, such as a combining accent, goes with anything on either side.
    """
    scripts = script_numbers(characters)
    scripts[np.isin(scripts, _AS_HAN) | (characters == _LONG_VOWEL)] = SCRIPTS.index("Han")
    marks = characters == ord(SPACE_MARK)
    free = marks | (scripts == _INHERITED)
    begins = marks.copy()
    begins[1:] |= (scripts[1:] != scripts[:-1]) & ~free[1:] & ~free[:-1]
    return begins


def _batches(sentences: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for sentence in sentences:
        batch.append(sentence)
        size += len(sentence)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _counted(texts: pa.LargeBinaryArray) -> pa.Table:
    return pa.Table.from_arrays(texts.value_counts().flatten(), ["text", "count"])


def _merged(tables: list[pa.Table]) -> pa.Table:
    """One row for each text with the sum of its counts, in order of first occurrence."""
    grouped = pa.concat_tables(tables).group_by("text", use_threads=False).aggregate([("count", "sum")])
    return grouped.select(["text", "count_sum"]).rename_columns(["text", "count"])
