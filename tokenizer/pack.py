"""Cuts documents into segments and packs segments into rows of exactly `max_seq_len` ids, in pure numpy.

Documents come as flat ids and offsets: document d is `ids[offsets[d] : offsets[d + 1]]`. A segment is a run of at most
`max_seq_len - 2` pieces between [CLS] and [SEP].

`documents`: segments lie side by side in a row and none holds pieces of two documents. Which share a row is decided by
best-fit decreasing over the segments of one shard: longest first, each into the fullest row that still has room. Why
that beats cutting documents wherever a row ends: Ding et al. 2024, "Fewer Truncations Improve Language Modeling". Rows
are found by their free places, with one integer that has a bit for every number of free places in use, so n segments
cost O(n log n) to sort and O(n * max_seq_len / 64) to place; those as long as a row need no search.

`stream`: all pieces are one text, cut every `max_seq_len - 2` pieces, one segment a row; only the last row is padded.
This is how the published models were trained.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenizer.special import CLS_ID, SEP_ID

SPECIALS = 2  # [CLS] and [SEP] of a segment

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Packed rows.

    Args:
        input_ids: int32 [rows, max_seq_len], padded with 0.
        segment_lengths: uint16 [segments], special tokens included, in the order of rows and of places in a row.
        segment_counts: int64 [rows], segments in each row.
    """

    input_ids: Int32
    segment_lengths: NDArray[np.uint16]
    segment_counts: Int64

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.segment_lengths.sum(dtype=np.int64))


def pack(ids: Int32, offsets: Int64, max_seq_len: int, packing: Literal["documents", "stream"]) -> Rows:
    """Pack documents the way the config says.

    Args:
        ids: int32 [pieces], the pieces of all documents one after the other.
        offsets: int64 [documents + 1], rising from 0 to len(ids); documents may be empty.
    """
    if packing == "documents":
        starts, sizes = cut(offsets, max_seq_len - SPECIALS)
        rows, places = best_fit_decreasing(sizes + SPECIALS, max_seq_len)
    else:
        starts, sizes = cut(np.array([0, len(ids)]), max_seq_len - SPECIALS)
        rows, places = np.arange(len(starts)), np.zeros_like(starts)
    return _fill(ids, starts, sizes, rows, places, max_seq_len)


def cut(offsets: Int64, limit: int) -> tuple[Int64, Int64]:
    """Cut every document into runs of `limit` pieces and a shorter last one.

    Returns:
        starts int64 [segments] and sizes int64 [segments]: segment s is `ids[starts[s] : starts[s] + sizes[s]]`.
    """
    ends = offsets[1:]
    counts = -(-np.diff(offsets) // limit)  # an empty document has no segment
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the segment in its document
    starts = np.repeat(offsets[:-1], counts) + number * limit
    return starts, np.minimum(limit, np.repeat(ends, counts) - starts)


def best_fit_decreasing(lengths: Int64, capacity: int) -> tuple[Int64, Int64]:
    """Place lengths into as few rows of `capacity` as best-fit decreasing finds; equal input, equal result.

    Returns:
        rows int64 [segments] and places int64 [segments]: the row of every segment and where in the row it begins.
    """
    order = np.argsort(-lengths, kind="stable")
    opened = int(np.count_nonzero(lengths == capacity))  # the first in that order fill rows of their own
    row_of, place_of = list(range(opened)), [0] * opened
    rows_with: dict[int, list[int]] = defaultdict(list)  # free places -> rows
    in_use = 0  # bit f is set while a row with f free places exists
    for length in lengths[order[opened:]].tolist():
        if fitting := in_use >> length:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[free].pop()
            in_use ^= 0 if rows_with[free] else 1 << free
        else:
            free, row, opened = capacity, opened, opened + 1
        row_of.append(row)
        place_of.append(capacity - free)
        rows_with[free - length].append(row)
        in_use |= 1 << (free - length)
    rows, places = np.empty_like(lengths), np.empty_like(lengths)
    rows[order], places[order] = row_of, place_of
    return rows, places


def _fill(ids: Int32, starts: Int64, sizes: Int64, rows: Int64, places: Int64, max_seq_len: int) -> Rows:
    """Write segments to their places, with [CLS] before and [SEP] after each."""
    count = int(rows.max(initial=-1)) + 1
    flat = np.zeros(count * max_seq_len, dtype=np.int32)
    firsts = rows * max_seq_len + places
    flat[firsts] = CLS_ID
    flat[firsts + sizes + 1] = SEP_ID
    for target, start, size in zip((firsts + 1).tolist(), starts.tolist(), sizes.tolist(), strict=True):
        flat[target : target + size] = ids[start : start + size]  # one copy a segment is faster than one index a piece
    lengths = (sizes + SPECIALS)[np.argsort(firsts)].astype(np.uint16)
    return Rows(flat.reshape(count, max_seq_len), lengths, np.bincount(rows))
