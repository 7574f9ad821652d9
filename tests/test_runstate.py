"""What a run counts: skipped steps, and losses that jump."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from model.runstate import RunState
from pipeline.config import SpikesConfig

CONFIG = SpikesConfig(factor=2.0, window_steps=10)


def test_skipped_steps_are_counted_in_all_and_in_a_row() -> None:
    state = RunState()
    for skipped in (False, True, True, False, True):
        state.note_skip(skipped)
    assert (state.skipped_steps, state.skipped_in_a_row) == (3, 1)


def test_only_a_jump_beyond_the_factor_is_a_spike() -> None:
    state = RunState()
    assert all(state.spikes({"loss": 10.0 - step / 10}, CONFIG) is None for step in range(10))
    mean = state.mean_losses["loss"]
    assert mean == pytest.approx(sum(10.0 - step / 10 for step in range(10)) / 10)
    assert state.spikes({"loss": 1.99 * mean}, CONFIG) is None
    assert state.mean_losses["loss"] == pytest.approx(mean + 0.99 * mean / 10)
    assert state.spikes({"loss": 2.01 * state.mean_losses["loss"]}, CONFIG) == "loss"


def test_no_step_of_the_first_window_is_a_spike_and_none_without_a_factor() -> None:
    state = RunState()
    assert not any(state.spikes({"loss": 10.0**step}, CONFIG) for step in range(10))
    assert not any(RunState().spikes({"loss": 10.0**step}, SpikesConfig()) for step in range(300))


def test_each_loss_has_a_mean_of_its_own() -> None:
    state = RunState()
    for _ in range(10):
        state.spikes({"a": 10.0, "b": 0.1}, CONFIG)
    assert state.spikes({"a": 10.0, "b": 0.3}, CONFIG) == "b"


def test_a_state_read_back_decides_alike() -> None:
    state = RunState(tokens_by_language={"en": 5})
    for step in range(25):
        state.spikes({"loss": 3.0 + step % 3}, CONFIG)
    copy = RunState(**json.loads(json.dumps(asdict(state))))
    assert copy == state
    for loss in (4.0, 5.0, 7.5, 9.0):
        assert copy.spikes({"loss": loss}, CONFIG) == state.spikes({"loss": loss}, CONFIG)
