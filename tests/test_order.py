"""The order of training rows: a permutation an epoch, fair shares of languages, any sample at once."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model.order import CYCLE, TrainingOrder, apportion, permute


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3000),
    block_rows=st.integers(1, 200),
    seed=st.integers(-(2**40), 2**40),
    epoch=st.integers(0, 10**9),
)
def test_every_epoch_reads_every_row_once(rows: int, block_rows: int, seed: int, epoch: int) -> None:
    order = TrainingOrder([rows], [1.0], seed, block_rows)
    read = order.samples(np.arange(epoch * rows, (epoch + 1) * rows)).row
    assert np.array_equal(np.sort(read), np.arange(rows))


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=40))
def test_languages_keep_their_shares_at_every_moment(weights: list[float]) -> None:
    order = TrainingOrder([1000] * len(weights), weights, seed=1)
    language = order.samples(np.arange(CYCLE, 2 * CYCLE)).language
    slots = np.arange(1, CYCLE + 1)
    for number, quota in enumerate(order.quota):
        ahead = np.cumsum(language == number) - slots * (quota / CYCLE)
        assert np.abs(ahead).max() <= 1  # at every slot, so no stretch of slots is off by more than 2
    assert order.quota.sum() == CYCLE
    assert np.all(np.abs(order.quota - np.array(weights) / sum(weights) * CYCLE) <= len(weights))


def test_a_language_runs_through_its_rows_in_turn_with_others() -> None:
    rows = [700, 90, 5]
    order = TrainingOrder(rows, [5.0, 2.0, 1.0], seed=3, block_rows=64)
    samples = order.samples(np.arange(4000))
    for number, count in enumerate(rows):
        read = samples.row[samples.language == number]
        epochs = [read[start : start + count] for start in range(0, len(read) - count + 1, count)]
        assert len(epochs) >= 3
        assert all(np.array_equal(np.sort(epoch), np.arange(count)) for epoch in epochs)
        assert len({epoch.tobytes() for epoch in epochs}) > 1  # another order in another epoch


def test_neighbours_are_read_together() -> None:
    order = TrainingOrder([100_000], [1.0], seed=0, block_rows=1000)
    read = order.samples(np.arange(50_000)).row.reshape(50, 1000)
    assert all(len(np.unique(block // 1000)) <= 2 for block in read)


def test_any_sample_is_found_at_once_and_by_itself() -> None:
    order = TrainingOrder([10**10, 10**7, 31], [3.0, 2.0, 1.0], seed=9)
    far = np.arange(10**15, 10**15 + 1000)
    began = time.perf_counter()
    together = order.samples(far)
    assert time.perf_counter() - began < 0.5
    shuffled = np.random.default_rng(0).permutation(1000)
    alone = order.samples(far[shuffled])
    assert np.array_equal(alone.row, together.row[shuffled])
    assert np.array_equal(alone.language, together.language[shuffled])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), st.integers(60, 5000))
def test_apportion_gives_away_every_seat_and_leaves_nobody_out(weights: list[float], seats: int) -> None:
    given_away = apportion(weights, seats)
    assert given_away.sum() == seats
    assert given_away.min() >= 1


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(-(2**63), 2**63 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    values = np.arange(size)
    permuted = permute(values, np.full(size, size), np.full(size, key))
    assert np.array_equal(np.sort(permuted), values)


def test_permute_sends_a_value_anywhere() -> None:
    keys = np.random.default_rng(0).integers(-(2**62), 2**62, 20_000)
    places = permute(np.zeros(20_000, dtype=np.int64), np.full(20_000, 37), keys)
    counts = np.bincount(places, minlength=37)
    chi_square = ((counts - 20_000 / 37) ** 2 / (20_000 / 37)).sum()
    assert chi_square < 36 + 5 * np.sqrt(2 * 36)
