"""The order of training rows by arithmetic: any sample of any step in constant time, with no state to save.

A *slot* is a sample's place in the whole run: slot = step * global_batch + place in the batch. Two maps lead from a
slot to a row of the training data; neither reads anything but the seed and a few counts:

1. slot -> language. A cycle of 65,536 slots holds each language in proportion to its weight. Within the cycle the j-th
   of a language's n slots has to come after (j - 1) / n and not later than j / n of the way (P-fair scheduling: the
   earliest deadline first always finds such a schedule), so in every prefix of the run each language's count is
   within 1 of its share. The schedule is laid out once, for one cycle; later cycles repeat it.
2. (language, occurrence) -> row. Occurrences run through the language's rows once an epoch. The rows form a ring, cut
   at a random place into blocks of neighbours; the blocks are permuted, then the rows inside each. Blocks keep reading
   local: at any time a language reads from one or two stretches of its files.

Permutations are Feistel networks with cycle-walking: keyed bijections of 0..n-1 that need no table.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from model.rng import derive, mix

Ints = np.ndarray
CYCLE = 1 << 16
BLOCK_ROWS = 1024
_ROUNDS = 4


class Samples(NamedTuple):
    """Where some slots' rows are; three int64 arrays of the same length."""

    slot: Ints
    language: Ints
    row: Ints


class TrainingOrder:
    """Which row every slot of a run reads.

    Args:
        rows: training rows of each language, all positive.
        weights: sampling weight of each language, in the same order.
        seed: of the permutations; the mixture of languages does not depend on it.
        block_rows: neighbours that stay together.
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float], seed: int, block_rows: int = BLOCK_ROWS) -> None:
        self.rows = np.array(rows, dtype=np.int64)
        self.quota = apportion(weights, CYCLE)
        self._language, self._rank = _schedule(self.quota)
        self._keys = np.array([derive(seed, "order", number) for number in range(len(rows))], dtype=np.int64)
        self._block_rows = block_rows

    def samples(self, slots: Ints) -> Samples:
        """The samples of `slots` (int64, any values, any order)."""
        cycle, place = np.divmod(slots, CYCLE)
        language = self._language[place]
        occurrence = cycle * self.quota[language] + self._rank[place]
        rows = self.rows[language]
        row = _row_of(occurrence % rows, rows, mix(self._keys[language] + occurrence // rows), self._block_rows)
        return Samples(slots, language, row)


def apportion(weights: Sequence[float], seats: int) -> Ints:
    """Split `seats` in proportion to `weights` by largest remainder; everyone gets at least one."""
    wanted = np.array(weights, dtype=np.float64)
    wanted *= seats / wanted.sum()
    given = np.maximum(np.floor(wanted).astype(np.int64), 1)
    while missing := seats - int(given.sum()):
        step = 1 if missing > 0 else -1
        claim = np.where(given + step >= 1, (wanted - given) * step, -np.inf)
        given[np.argmax(claim)] += step
    return given


def _schedule(quota: Ints) -> tuple[Ints, Ints]:
    """One cycle by earliest deadline first: the language of every slot, and how many of its slots came before."""
    cycle = int(quota.sum())
    language, rank = np.empty(cycle, dtype=np.int64), np.empty(cycle, dtype=np.int64)
    waiting = [(0, number, 0) for number in range(len(quota))]  # (first slot allowed, language, rank)
    ready: list[tuple[int, int, int]] = []  # (first slot too late, language, rank)
    for slot in range(cycle):
        while waiting and waiting[0][0] <= slot:
            _, number, count = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(count + 1) * cycle // int(quota[number])), number, count))
        _, number, count = heapq.heappop(ready)
        language[slot], rank[slot] = number, count
        if count + 1 < quota[number]:
            heapq.heappush(waiting, ((count + 1) * cycle // int(quota[number]), number, count + 1))
    return language, rank


def _row_of(place: Ints, rows: Ints, key: Ints, block_rows: int) -> Ints:
    """The row read at `place` of an epoch over `rows` rows; what does not fill a block comes last."""
    blocks = rows // block_rows
    block, inside = np.divmod(place, block_rows)
    rest = block >= blocks
    block = np.where(rest, blocks, permute(np.minimum(block, np.maximum(blocks - 1, 0)), np.maximum(blocks, 1), key))
    size = np.where(rest, rows - blocks * block_rows, block_rows)
    inside = permute(inside, size, mix(key ^ (block + 1)))
    start = (mix(key) >> 1 & (2**62 - 1)) % rows
    return (start + block * block_rows + inside) % rows


def permute(values: Ints, size: Ints, key: Ints) -> Ints:
    """A bijection of 0..size-1 for every (size, key), elementwise; arrays of one shape, 0 <= values < size.

    A Feistel network over the smallest even number of bits that holds the range; results outside of it are sent through
    again (fewer than four passes on average) until they fall inside.
    """
    half = np.maximum((np.frexp((size - 1).astype(np.float64))[1].astype(np.int64) + 1) // 2, 1)
    keys = mix(key + np.arange(_ROUNDS)[:, None])
    # Small languages are one block; walking to the only place of it would take the longest of all.
    result = np.where(size > 1, _feistel(values, half, keys), 0)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _feistel(result[outside], half[outside], keys[:, outside])
    return result


def _feistel(values: Ints, half: Ints, keys: Ints) -> Ints:
    """One pass over `values` [n] of 2 * `half` [n] bits each; `keys` [rounds, n]."""
    mask = (np.int64(1) << half) - 1
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix(key ^ right) & mask)
    return left << half | right
