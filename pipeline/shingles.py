"""Shingles of a text, their MinHash signature, and the bands by which similar texts meet.

A shingle is five words in a row, or ten characters in a row of a script that puts no spaces between words, which hold
about as much. Texts are hashed many at once, in numpy over their code points: a word is the sum of its characters times
powers of a constant, a shingle the same over words. A text shorter than one shingle has none, and so no near-duplicate.

A signature is 128 minima; `bands` of `rows` of them each are hashed. Two texts of Jaccard similarity s share a band
with probability 1 - (1 - s^rows)^bands, an S-curve: `band_shape` takes the most rows that still give 0.95 at the
threshold. For 0.8 that is 18 bands of 7 rows: 0.999 at 0.85, 0.985 at 0.8, 0.79 at 0.7, 0.4 at 0.6, 0.13 at 0.5.

Cost: about 25 ns a character; memory: 60 bytes a character of the longest text. No hash depends on the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.text import UNSPACED_RANGES

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

PERMUTATIONS = 128
RECALL_AT_THRESHOLD = 0.95
WORDS = 5
UNSPACED_CHARACTERS = 2 * WORDS
_SEED = 1
_BLOCK_CHARACTERS = 50_000  # more at once leave the processor's cache
_NONE = np.empty(0, np.uint64)

_BLANK, _SPACED, _UNSPACED = 0, 1, 2
_KINDS = np.full(0x110000, _SPACED, np.uint8)
_KINDS[[0x20, 0x0A]] = _BLANK
for _first, _last in UNSPACED_RANGES:
    _KINDS[_first : _last + 1] = _UNSPACED

_BASE = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.cumprod(np.full(1 << 12, _BASE))  # a longer word begins anew in them


def shingle_hashes(texts: Sequence[str]) -> tuple[Hashes, Numbers]:
    """The 64-bit hashes of all texts' shingles in order, repeated ones too, and the number that each text has."""
    blocks = [_block_hashes(block) for block in _blocks(texts)]
    hashes, numbers = zip(*blocks, strict=True) if blocks else ((_NONE,), (_NONE,))
    return np.concatenate(hashes), np.concatenate(numbers).astype(np.int64)


def jaccard(first: Hashes, second: Hashes) -> float:
    """Shared shingles over all shingles of two texts, given the distinct hashes of each; at least one is not empty."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def band_shape(threshold: float) -> tuple[int, int]:
    """Number of bands and rows in each: the steepest S-curve whose recall at the threshold is at least 0.95."""
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL_AT_THRESHOLD:
            return bands, rows
    return PERMUTATIONS, 1


def band_hashes(texts: Sequence[str], threshold: float) -> tuple[Hashes, Numbers]:
    """One row of band hashes for each text that has shingles, and which texts those are."""
    from rensa import RMinHash

    hashes, numbers = shingle_hashes(texts)
    present = np.flatnonzero(numbers)
    ends = np.concatenate([[0], np.cumsum(numbers[present])]).astype(np.uint64)
    digests = RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends, PERMUTATIONS, _SEED).to_rows()
    signatures = np.array(digests, np.uint64).reshape(len(present), PERMUTATIONS)
    bands, rows = band_shape(threshold)
    folded = np.tile(_mix(np.arange(1, bands + 1, dtype=np.uint64)), (len(present), 1))  # bands never mix
    for row in range(rows):
        folded = _mix(folded ^ signatures[:, row : bands * rows : rows])
    return folded, present


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in runs of some 50,000 characters."""
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    cuts = [0, *(np.flatnonzero(np.diff(ends // _BLOCK_CHARACTERS)) + 1).tolist(), len(texts)]
    return (texts[start:stop] for start, stop in pairwise(cuts))


def _block_hashes(texts: Sequence[str]) -> tuple[Hashes, Numbers]:
    words, counts, unspaced = _words(texts)
    fives = _weighted_sums(words, WORDS, 1)
    tens = _weighted_sums(fives, 2, WORDS)
    of_characters = 2 * unspaced > counts
    numbers = np.maximum(counts - np.where(of_characters, UNSPACED_CHARACTERS, WORDS) + 1, 0)
    # the shingles of a text begin at its first words
    first_words, first_shingles = np.cumsum(counts) - counts, np.cumsum(numbers) - numbers
    places = np.arange(int(np.sum(numbers))) + np.repeat(first_words - first_shingles, numbers)
    return _mix(np.where(np.repeat(of_characters, numbers), tens[places], fives[places])), numbers


def _words(texts: Sequence[str]) -> tuple[Hashes, Numbers, Numbers]:
    """Hashes of all texts' words, the number of words of each text, and how many of those are unspaced characters."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    kinds = _KINDS[codes]
    text_ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    before = np.roll(kinds, 1)
    before[:1] = before[text_ends[text_ends < len(kinds)]] = _BLANK
    begins = (kinds == _UNSPACED) | ((kinds == _SPACED) & (before != _SPACED))
    starts = np.flatnonzero(begins)
    places = np.arange(len(codes))
    in_word = places - np.maximum.accumulate(np.where(begins, places, 0))
    terms = np.where(kinds == _BLANK, 0, codes).astype(np.uint64) * _POWERS[in_word & (len(_POWERS) - 1)]
    words = _mix(np.add.reduceat(terms, starts)) if len(starts) else _NONE
    unspaced = np.concatenate([[0], np.cumsum(kinds[starts] == _UNSPACED)])
    bounds = np.concatenate([[0], np.searchsorted(starts, text_ends)])
    return words, np.diff(bounds), np.diff(unspaced[bounds])


def _weighted_sums(values: Hashes, terms: int, stride: int) -> Hashes:
    """At each place the sum of that value and those at the next strides, each times a power of its own."""
    padded = np.concatenate([values, np.zeros((terms - 1) * stride, np.uint64)])
    shifts = (term * stride for term in range(terms))
    return sum((padded[shift : shift + len(values)] * _POWERS[shift] for shift in shifts), np.zeros_like(values))


def _mix(hashes: Hashes) -> Hashes:
    """Spread every bit of a hash over all others, one to one (the finaliser of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
