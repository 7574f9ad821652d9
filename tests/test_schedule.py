"""Learning rates and batch sizes of a run."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.schedule import BatchSizes, Schedule, schedules
from pipeline.config import PretrainConfig


def test_the_rate_rises_to_its_peak_and_falls_to_nothing_without_a_jump() -> None:
    rates = [Schedule(1.0, 10, 100, "linear").rate(step) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[99] == pytest.approx(1 / 90)
    assert rates[100] == 0.0
    assert all(abs(after - before) <= 0.1 + 1e-12 for before, after in itertools.pairwise(rates))
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_half_a_cosine_falls_slowly_first_and_last() -> None:
    schedule = Schedule(2.0, 10, 110, "cosine")
    assert [schedule.rate(step) for step in (4, 9, 10)] == [1.0, 2.0, 2.0]
    assert schedule.rate(60) == pytest.approx(1.0)
    assert schedule.rate(35) == pytest.approx(1 + math.cos(math.pi / 4))
    assert schedule.rate(110) == 0.0


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (5, 5), (20, 5), (1, 1)])
def test_short_runs_have_usable_rates(shape: str, warmup: int, steps: int) -> None:
    assert all(0 < Schedule(1.0, warmup, steps, shape).rate(step) <= 1 for step in range(steps))


def test_the_discriminator_follows_the_generator_unless_told_otherwise() -> None:
    config = PretrainConfig(learning_rate=0.5, warmup_steps=7, schedule="cosine", steps=50)
    assert schedules(config)["discriminator"] == schedules(config)["generator"] == Schedule(0.5, 7, 50, "cosine")
    own = {"learning_rate": 0.1, "warmup_steps": 0, "schedule": "linear"}
    config = PretrainConfig.model_validate({**config.model_dump(), "discriminator": own})
    assert schedules(config)["discriminator"] == Schedule(0.1, 0, 50, "linear")
    assert schedules(config)["generator"] == Schedule(0.5, 7, 50, "cosine")


def test_without_a_warm_up_every_batch_is_whole() -> None:
    sizes = BatchSizes(PretrainConfig(global_batch=64))
    assert {sizes.rows(step) for step in (0, 1, 10**9)} == {64}
    assert sizes.rows_before(10**9) == 64 * 10**9


def test_a_batch_grows_in_equal_jumps_over_its_warm_up() -> None:
    sizes = BatchSizes(PretrainConfig(global_batch=64, batch_warmup_steps=6, batch_warmup_rows=16, micro_batch=16))
    assert [sizes.rows(step) for step in range(8)] == [16, 16, 32, 32, 48, 48, 64, 64]


@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 60))
def test_no_sample_is_left_out_or_read_twice(jumps: int, first: int, warmup: int) -> None:
    config = PretrainConfig(
        global_batch=jumps * first, micro_batch=1, batch_warmup_steps=warmup, batch_warmup_rows=first
    )
    sizes = BatchSizes(config)
    for step in range(warmup + 3):
        assert sizes.rows_before(step + 1) - sizes.rows_before(step) == sizes.rows(step)
        assert sizes.rows(step) <= sizes.rows(step + 1)
    assert sizes.rows_before(0) == 0
    assert sizes.rows(warmup) == jumps * first
    if warmup:
        assert sizes.rows(0) == first or warmup < jumps
