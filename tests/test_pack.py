"""Packing: every piece exactly once and in order, rows of one length, nearly full, the same every time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.pack import Rows, best_fit_decreasing, pack
from tokenizer.special import CLS_ID, PAD_ID, SEP_ID

LENGTHS = st.lists(st.integers(0, 90), max_size=60)
MAX_SEQ_LEN = st.integers(8, 64)


def documents(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids that are all different, from 10 on, and the documents' offsets."""
    offsets = np.concatenate(([0], np.cumsum(np.array(lengths, dtype=np.int64))))
    return np.arange(10, 10 + offsets[-1], dtype=np.int32), offsets


def segments(rows: Rows) -> list[list[int]]:
    """The segments as their lengths say, after checking that the rest of each row is padding."""
    found, lengths = [], iter(rows.segment_lengths.tolist())
    for row, count in zip(rows.input_ids, rows.segment_counts.tolist(), strict=True):
        place = 0
        for _ in range(count):
            length = next(lengths)
            found.append(row[place : place + length].tolist())
            place += length
        assert (row[place:] == PAD_ID).all()
    assert next(lengths, None) is None
    return found


@settings(deadline=None)
@given(LENGTHS, MAX_SEQ_LEN)
def test_documents_keep_every_piece_once_and_in_order(lengths: list[int], max_seq_len: int) -> None:
    ids, offsets = documents(lengths)
    rows = pack(ids, offsets, max_seq_len, "documents")
    assert rows.input_ids.shape == (len(rows.segment_counts), max_seq_len)
    assert rows.input_ids.dtype == np.int32
    limit = max_seq_len - 2
    expected = [
        [CLS_ID, *ids[start : min(start + limit, end)].tolist(), SEP_ID]
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        for start in range(begin, end, limit)
    ]
    assert sorted(segments(rows)) == sorted(expected)
    assert rows.tokens == sum(map(len, expected))


@settings(deadline=None)
@given(LENGTHS, MAX_SEQ_LEN)
def test_stream_is_one_text_cut_at_full_rows(lengths: list[int], max_seq_len: int) -> None:
    ids, offsets = documents(lengths)
    rows = pack(ids, offsets, max_seq_len, "stream")
    found = segments(rows)
    assert (rows.segment_counts == 1).all()
    assert all(segment[0] == CLS_ID and segment[-1] == SEP_ID for segment in found)
    assert [piece for segment in found for piece in segment[1:-1]] == ids.tolist()
    assert all(len(segment) == max_seq_len for segment in found[:-1])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(50, 3000), st.floats(0.9, 1.4), st.sampled_from([128, 256, 512, 1024]))
def test_rows_of_web_like_documents_are_98_percent_full(
    seed: int, median: float, spread: float, max_seq_len: int
) -> None:
    """Lengths of web documents are about log-normal; those of our real text have spreads around 1."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), spread, 3000)
    ids, offsets = documents(np.maximum(1, drawn).astype(np.int64).tolist())
    rows = pack(ids, offsets, max_seq_len, "documents")
    assert rows.tokens / rows.input_ids.size >= 0.98


@settings(deadline=None)
@given(st.lists(st.integers(3, 64), min_size=1, max_size=200))
def test_no_two_segments_overlap_and_no_two_rows_could_be_one(lengths: list[int]) -> None:
    rows, places = best_fit_decreasing(np.array(lengths), 64)
    used: Counter[tuple[int, int]] = Counter()
    for row, place, length in zip(rows.tolist(), places.tolist(), lengths, strict=True):
        assert place + length <= 64
        used.update((row, column) for column in range(place, place + length))
    assert max(used.values()) == 1
    filled = sorted(np.bincount(rows, weights=lengths))
    assert len(filled) == 1 or filled[0] + filled[1] > 64


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    rows, places = best_fit_decreasing(np.array([5, 2, 8, 3, 7]), 10)
    assert rows.tolist() == [2, 0, 0, 1, 1]
    assert places.tolist() == [0, 8, 0, 7, 0]


def test_many_segments_give_the_same_rows_every_time() -> None:
    ids, offsets = documents(np.random.default_rng(3).integers(1, 40, 20_000).tolist())
    rows, again = pack(ids, offsets, 32, "documents"), pack(ids, offsets, 32, "documents")
    assert rows.input_ids.tobytes() == again.input_ids.tobytes()
    assert sorted(piece for segment in segments(rows) for piece in segment[1:-1]) == ids.tolist()


@pytest.mark.parametrize("packing", ["documents", "stream"])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack_gives_no_rows(packing: str, lengths: list[int]) -> None:
    rows = pack(*documents(lengths), 16, packing)  # type: ignore[arg-type]
    assert (rows.input_ids.shape, len(rows.segment_lengths), rows.tokens) == ((0, 16), 0, 0)


def test_the_longest_rows_the_format_allows() -> None:
    ids, offsets = documents([65_533, 1, 200_000])
    rows = pack(ids, offsets, 65_535, "documents")
    assert sorted(piece for segment in segments(rows) for piece in segment[1:-1]) == ids.tolist()
    assert rows.segment_lengths.max() == 65_535
