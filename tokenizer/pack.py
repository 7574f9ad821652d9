"""Cuts documents into segments and packs segments into rows of exactly `max_seq_len` ids, in pure numpy.

Documents come as flat ids and offsets: document d is `ids[offsets[d] : offsets[d + 1]]`. A segment is a run of at most
`max_seq_len - 2` pieces between [CLS] and [SEP].

`documents`: segments lie side by side in a row and none holds pieces of two documents. Which share a row is decided by
best-fit decreasing over windows of `WINDOW` segments: longest first, each into the fullest row that still has room. Its
use for language models, and why it beats cutting documents wherever a row ends: Ding et al. 2024, "Fewer Truncations
Improve Language Modeling". Rows are found by their free places, with one integer that has a bit for every number of
free places in use: O(max_seq_len / 64) a segment. The window bounds what this needs beside the ids and the rows.

`stream`: all pieces are one text, cut every `max_seq_len - 2` pieces, one segment a row; only the last row is padded.
This is how the published models were trained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenizer.special import CLS_ID, SEP_ID

WINDOW = 8192  # segments
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


Placement = Callable[[Int64, int], tuple[Int64, Int64]]  # lengths, capacity -> row and place of every segment


def pack(ids: Int32, offsets: Int64, max_seq_len: int, packing: Literal["documents", "stream"]) -> Rows:
    """Pack documents the way the config says.

    Args:
        ids: int32 [pieces], the pieces of all documents one after the other.
        offsets: int64 [documents + 1], rising from 0 to len(ids); documents may be empty.
    """
    if packing == "documents":
        return _pack(ids, offsets, max_seq_len, best_fit_decreasing)
    return _pack(ids, np.array([0, len(ids)]), max_seq_len, one_a_row)


def _pack(ids: Int32, offsets: Int64, max_seq_len: int, place: Placement) -> Rows:
    starts, sizes = cut(offsets, max_seq_len - SPECIALS)
    windows = []
    for first in range(0, len(starts), WINDOW):
        window = slice(first, first + WINDOW)
        rows, places = place(sizes[window] + SPECIALS, max_seq_len)
        windows.append(_fill(ids, starts[window], sizes[window], rows, places, max_seq_len))
    return _concatenate(windows, max_seq_len)


def cut(offsets: Int64, limit: int) -> tuple[Int64, Int64]:
    """Cut every document into runs of `limit` pieces and a shorter last one.

    Returns:
        starts int64 [segments] and sizes int64 [segments]: segment s is `ids[starts[s] : starts[s] + sizes[s]]`.
        Segments follow each other without a gap.
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
    rows, places = np.empty_like(lengths), np.empty_like(lengths)
    rows_with: dict[int, list[int]] = defaultdict(list)  # free places -> rows
    in_use = 0  # bit f is set while a row with f free places exists
    opened = 0
    for segment in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[segment])
        if fitting := in_use >> length:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[free].pop()
            in_use ^= 0 if rows_with[free] else 1 << free
        else:
            free, row, opened = capacity, opened, opened + 1
        rows[segment], places[segment] = row, capacity - free
        rows_with[free - length].append(row)
        in_use |= 1 << (free - length)
    return rows, places


def one_a_row(lengths: Int64, capacity: int) -> tuple[Int64, Int64]:
    """Give every segment a row of its own."""
    return np.arange(len(lengths)), np.zeros_like(lengths)


def _fill(ids: Int32, starts: Int64, sizes: Int64, rows: Int64, places: Int64, max_seq_len: int) -> Rows:
    """Write segments that follow each other in `ids` to their places, with [CLS] before and [SEP] after each."""
    count = int(rows.max()) + 1
    flat = np.zeros(count * max_seq_len, dtype=np.int32)
    firsts = rows * max_seq_len + places
    flat[firsts] = CLS_ID
    flat[firsts + sizes + 1] = SEP_ID
    source = ids[starts[0] : starts[-1] + sizes[-1]]
    targets = np.arange(len(source))  # of the pieces in `flat`: their index in `source` and the shift of their segment
    targets += np.repeat(firsts + 1 - (starts - starts[0]), sizes)
    flat[targets] = source
    lengths = (sizes + SPECIALS)[np.argsort(firsts)].astype(np.uint16)
    return Rows(flat.reshape(count, max_seq_len), lengths, np.bincount(rows))


def _concatenate(windows: list[Rows], max_seq_len: int) -> Rows:
    nothing = Rows(np.empty((0, max_seq_len), np.int32), np.empty(0, np.uint16), np.empty(0, np.int64))
    together = [nothing, *windows]
    return Rows(
        np.concatenate([window.input_ids for window in together]),
        np.concatenate([window.segment_lengths for window in together]),
        np.concatenate([window.segment_counts for window in together]),
    )
