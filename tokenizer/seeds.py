"""The pieces that training starts from: the substrings of segments that are worth most.

A substring is worth its residual count times the square root of the information in its characters. The residual is how
often it occurs without being part of the same longer one: "nformatio" is as frequent as "information" and worth
nothing. So a few seeds for each wanted piece do, where SentencePiece takes the best by count and length. How many is a
matter of balance: of too few, scripts of many characters such as Han suffer, of too many, languages with much text.

Substrings are found by length, as frequent item sets are: one of length k occurs twice only where its first and last
k - 1 characters do, so each level looks at the positions that are left, and numbers their pairs of shorter substrings
by hashing. Time grows with the characters of the distinct segments (0.4 s a million over all levels), memory by some
35 bytes for each of them, of which there may be 2**31.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tokenizer.aggregate import Segments

LONGEST = 16  # characters, SentencePiece's max_sentencepiece_length
STEPS_PER_BIT = 256
SUBSTRINGS_PER_SEED = 6
_BUCKETS = 16
_END = 0  # stands after every segment


@dataclass(frozen=True)
class _Level:
    """The substrings of one length: for each its count and first position, and by position its number or -1."""

    length: int
    counts: NDArray[np.float64]
    first: NDArray[np.int32]
    numbers: NDArray[np.int32]


@dataclass(frozen=True)
class _Seeds:
    """Substrings by value: where each begins, its length and its count."""

    values: NDArray[np.float64]
    first: NDArray[np.int32]
    lengths: NDArray[np.int32]
    counts: NDArray[np.float64]

    def best(self, wanted: int) -> _Seeds:
        """The most valuable ones; of equal ones those that come first, so that the choice is the same everywhere."""
        if len(self.values) <= wanted:
            return self
        limit = np.partition(self.values, -wanted)[-wanted]
        above, equal = self.values > limit, np.flatnonzero(self.values == limit)
        above[equal[: wanted - np.count_nonzero(above)]] = True
        return _Seeds(self.values[above], self.first[above], self.lengths[above], self.counts[above])

    def joined(self, other: _Seeds) -> _Seeds:
        """These and others."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Seeds(*(np.concatenate(pair) for pair in pairs))


def seed_pieces(segments: Segments, least: int, most: int) -> Iterator[tuple[str, int]]:
    """The best substrings of 2 to `LONGEST` characters that occur at least twice, with their counts.

    One of `SUBSTRINGS_PER_SEED` that are worth anything is taken, but not fewer than `least` nor more than `most`.
    """
    characters, counts = _positions(segments)
    information = _information(characters, counts)
    bucket_of = np.where(characters == _END, _BUCKETS, characters % _BUCKETS).astype(np.uint8)
    buckets = [np.flatnonzero(bucket_of == number).astype(np.int32) for number in range(_BUCKETS)]
    numbers = np.where(characters == _END, -1, characters).astype(np.int32)
    level = _Level(1, np.empty(0), np.empty(0, np.int32), numbers)
    found, worthy = _Seeds(np.empty(0), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0)), 0
    while level.length <= LONGEST:
        longer, buckets = _longer(level, buckets, counts)
        if level.length > 1:
            valued = _valued(level, longer, characters, information)
            found, worthy = found.joined(valued).best(most), worthy + len(valued.values)
        level = longer
    found = found.best(max(least, min(most, worthy // SUBSTRINGS_PER_SEED)))
    for first, length, count in zip(found.first.tolist(), found.lengths.tolist(), found.counts.tolist(), strict=True):
        yield characters[first : first + length].tobytes().decode("utf-32-le"), int(count)


def _positions(segments: Segments) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The characters of all segments with `_END` after each and at the end twice, and at each the segment's count."""
    text = b"".join(b"\0".join([*texts, b""]) for texts, _ in segments.slices())
    characters = np.frombuffer(text.decode().encode("utf-32-le") + bytes(4), np.uint32)
    ends = np.flatnonzero(characters == _END)[:-1]
    sizes = np.diff(ends, prepend=-1)
    counts = np.append(np.repeat(segments.counts.astype(np.uint32), sizes), np.uint32(0))
    return characters, counts


def _information(characters: NDArray[np.uint32], counts: NDArray[np.uint32]) -> NDArray[np.int32]:
    """By code point: the information in the character, in steps of 1 / STEPS_PER_BIT bit."""
    sums = np.bincount(characters, weights=counts)
    sums[_END] = 0
    bits = np.log2(max(1.0, sums.sum())) - np.log2(np.maximum(1.0, sums))
    return np.rint(bits * STEPS_PER_BIT).astype(np.int32)


def _longer(
    level: _Level, buckets: list[NDArray[np.int32]], counts: NDArray[np.uint32]
) -> tuple[_Level, list[NDArray[np.int32]]]:
    """The substrings that are a character longer and occur twice, and the positions that they begin at.

    Those of different buckets begin with different characters, so each bucket is grouped by itself.
    """
    numbers = np.full(len(level.numbers), -1, np.int32)
    sums: list[NDArray[np.float64]] = []
    firsts: list[NDArray[np.int32]] = []
    left: list[NDArray[np.int32]] = []
    size = 0
    for bucket in buckets:
        places: NDArray[np.int32] = bucket[(level.numbers[bucket] >= 0) & (level.numbers[bucket + 1] >= 0)]
        pairs = (level.numbers[places].astype(np.int64) << 32) | level.numbers[places + 1]
        grouped = pa.array(pairs).dictionary_encode()
        groups = grouped.indices.to_numpy()
        total: NDArray[np.float64] = np.bincount(groups, counts[places], len(grouped.dictionary)).astype(np.float64)
        first = np.empty(len(total), np.int32)
        first[groups[::-1]] = places[::-1]
        kept = total >= 2
        renumbered = np.where(kept, size + np.cumsum(kept) - 1, -1).astype(np.int32)[groups]
        numbers[places] = renumbered
        sums.append(total[kept])
        firsts.append(first[kept])
        left.append(places[renumbered >= 0])
        size += int(np.count_nonzero(kept))
    return _Level(level.length + 1, np.concatenate(sums), np.concatenate(firsts), numbers), left


def _valued(level: _Level, longer: _Level, characters: NDArray[np.uint32], information: NDArray[np.int32]) -> _Seeds:
    """The substrings of a level that are more than a part of one longer substring."""
    covered = np.zeros(len(level.counts))
    np.maximum.at(covered, level.numbers[longer.first], longer.counts)
    np.maximum.at(covered, level.numbers[longer.first + 1], longer.counts)
    residual = level.counts - covered
    own = residual > 0
    first = level.first[own]
    bits = np.zeros(len(first), np.int32)
    for place in range(level.length):
        bits += information[characters[first + place]]
    return _Seeds(residual[own] * np.sqrt(bits), first, np.full(len(first), level.length, np.int32), level.counts[own])
