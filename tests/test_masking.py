"""Masked positions: exactly the wanted number, every ordinary position alike, and nothing but the sample decides."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.masking import choose_masked, mask_width


def rows(count: int, length: int, seed: int = 0) -> Tensor:
    """Random ids, special ones among them, padded to various lengths."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (count, length), generator=rng)
    filled = torch.randint(0, length + 1, (count, 1), generator=rng)
    return ids.where(torch.arange(length) < filled, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.sampled_from([0.1, 0.15, 0.2, 0.3, 1 / 3, 0.99]), st.integers(-5, 2**60))
def test_exactly_the_wanted_share_of_ordinary_tokens(length: int, fraction: float, seed: int) -> None:
    ids = rows(20, length, seed=length)
    masked = choose_masked(ids, torch.arange(20), fraction, seed)
    assert masked.shape == (20, mask_width(length, fraction))
    for row, positions in zip(ids, masked.tolist(), strict=True):
        chosen = [position for position in positions if position >= 0]
        ordinary = int((row >= 4).sum())
        assert len(chosen) == math.ceil(ordinary * Fraction(str(fraction)))
        assert chosen == sorted(set(chosen)) == positions[: len(chosen)]
        assert all(row[position] >= 4 for position in chosen)


def test_decimal_fractions_are_exact() -> None:
    assert mask_width(512, 0.15) == 77
    assert mask_width(20, 0.15) == 3  # in binary floating point 0.15 * 20 could be a little more
    assert mask_width(100, 0.07) == 7


def test_every_position_is_as_likely_as_any_other() -> None:
    length, count = 64, 30_000
    ids = torch.full((count, length), 10)
    ids[:, 0], ids[:, -1] = 1, 2
    masked = choose_masked(ids, torch.arange(count), 0.15, seed=7)
    times = torch.bincount(masked.flatten(), minlength=length).double()
    assert times[0] == times[-1] == 0
    expected = masked.numel() / (length - 2)
    chi_square = ((times[1:-1] - expected) ** 2 / expected).sum()
    degrees = length - 3
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_pairs_of_positions_are_independent() -> None:
    length, count = 32, 40_000
    ids = torch.full((count, length), 10)
    masked = choose_masked(ids, torch.arange(count), 0.25, seed=1)
    chosen = torch.zeros(count, length, dtype=torch.double).scatter_(1, masked, 1.0)
    together = (chosen.T @ chosen / count)[~torch.eye(length, dtype=torch.bool)]
    expected = 8 * 7 / (32 * 31)
    assert (together - expected).abs().max() < 6 * (expected / count) ** 0.5


def test_only_the_sample_decides_not_its_company() -> None:
    ids, slots = rows(50, 40), torch.arange(1000, 1050)
    together = choose_masked(ids, slots, 0.15, seed=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose_masked(ids[order], slots[order], 0.15, seed=3), together[order])
    assert torch.equal(choose_masked(ids[7:8].int(), slots[7:8], 0.15, seed=3), together[7:8])


@pytest.mark.parametrize("change", ["slot", "seed"])
def test_another_sample_or_seed_masks_other_positions(change: str) -> None:
    ids = torch.full((1, 200), 10).expand(100, -1)
    slots = torch.zeros(100, dtype=torch.int64)
    first = choose_masked(ids, slots, 0.15, seed=3)
    other = choose_masked(ids, slots + (change == "slot"), 0.15, seed=3 + (change == "seed"))
    shared = (first[0][:, None] == other[0]).sum()
    assert shared < 15  # of 30; 4.5 are expected by chance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_choose_alike() -> None:
    ids, slots = rows(64, 512), torch.arange(64)
    on_gpu = choose_masked(ids.cuda(), slots.cuda(), 0.15, seed=5)
    assert torch.equal(on_gpu.cpu(), choose_masked(ids, slots, 0.15, seed=5))
