"""Masked positions: exactly the wanted number, every ordinary position alike, and nothing but the sample decides."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.masking import Masking, choose, choose_windowed, mask_width
from pipeline.config import PretrainConfig
from tokenizer.words import begins_word


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
    masked = choose(ids, torch.arange(20), Fraction(str(fraction)), seed)
    assert masked.shape == (20, mask_width(length, Fraction(str(fraction))))
    for row, positions in zip(ids, masked.tolist(), strict=True):
        chosen = [position for position in positions if position >= 0]
        ordinary = int((row >= 4).sum())
        assert len(chosen) == math.ceil(ordinary * Fraction(str(fraction)))
        assert chosen == sorted(set(chosen)) == positions[: len(chosen)]
        assert all(row[position] >= 4 for position in chosen)


def test_decimal_fractions_are_exact() -> None:
    assert mask_width(512, Fraction("0.15")) == 77
    assert mask_width(20, Fraction("0.15")) == 3  # in binary floating point 0.15 * 20 could be a little more
    assert mask_width(100, Fraction("0.07")) == 7


def test_every_position_is_as_likely_as_any_other() -> None:
    length, count = 64, 30_000
    ids = torch.full((count, length), 10)
    ids[:, 0], ids[:, -1] = 1, 2
    masked = choose(ids, torch.arange(count), Fraction("0.15"), seed=7)
    times = torch.bincount(masked.flatten(), minlength=length).double()
    assert times[0] == times[-1] == 0
    expected = masked.numel() / (length - 2)
    chi_square = ((times[1:-1] - expected) ** 2 / expected).sum()
    degrees = length - 3
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_pairs_of_positions_are_independent() -> None:
    length, count = 32, 40_000
    ids = torch.full((count, length), 10)
    masked = choose(ids, torch.arange(count), Fraction("0.25"), seed=1)
    chosen = torch.zeros(count, length, dtype=torch.double).scatter_(1, masked, 1.0)
    together = (chosen.T @ chosen / count)[~torch.eye(length, dtype=torch.bool)]
    expected = 8 * 7 / (32 * 31)
    assert (together - expected).abs().max() < 6 * (expected / count) ** 0.5


def test_only_the_sample_decides_not_its_company() -> None:
    ids, slots = rows(50, 40), torch.arange(1000, 1050)
    together = choose(ids, slots, Fraction("0.15"), seed=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(ids[order], slots[order], Fraction("0.15"), seed=3), together[order])
    assert torch.equal(choose(ids[7:8].int(), slots[7:8], Fraction("0.15"), seed=3), together[7:8])


@pytest.mark.parametrize("change", ["slot", "seed"])
def test_another_sample_or_seed_masks_other_positions(change: str) -> None:
    ids = torch.full((1, 200), 10).expand(100, -1)
    slots = torch.zeros(100, dtype=torch.int64)
    first = choose(ids, slots, Fraction("0.15"), seed=3)
    other = choose(ids, slots + (change == "slot"), Fraction("0.15"), seed=3 + (change == "seed"))
    shared = (first[0][:, None] == other[0]).sum()
    assert shared < 15  # of 30; 4.5 are expected by chance


def test_windowed_masking_is_the_reference_codes_with_its_blind_end() -> None:
    length, count = 512, 2000
    ids = torch.full((count, length), 10)
    ids[:, 0], ids[:, -1] = 1, 2
    masked = choose_windowed(ids, torch.arange(count), Fraction("0.15"), seed=7)
    assert masked.shape == (count, mask_width(length, Fraction("0.15")))
    assert (masked >= 0).all()
    assert ((masked - 1) // 6).equal(torch.arange(77).expand(count, -1))  # one in each window of six, up to 77 of them
    times = torch.bincount(masked.flatten(), minlength=length) / count
    assert times[1:101].mean().item() == pytest.approx(1 / 6, abs=0.01)
    assert times[463:].sum() == 0  # recipe: the last position that can be masked is 462


def test_windowed_masking_of_packed_and_short_rows() -> None:
    ids = torch.tensor([[1, 9, 9, 9, 2, 1, 9, 9, 2, 0, 0, 0, 0], [1, 9, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    masked = choose_windowed(ids, torch.arange(2), Fraction("0.15"), seed=3)
    assert (masked >= 0).sum(1).tolist() == [1, 1]
    assert all(row[place] == 9 for row, place in zip(ids, masked[:, 0], strict=True))


# What is shown, and runs of words

PIECES = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"▁w{n}" if n % 3 == 0 else f"n{n}" for n in range(60)), "天", "地"]
MASK_ID = len(PIECES)


def text(count: int, length: int, longest_word: int = 3) -> Tensor:
    """Rows of [CLS], words of up to so many pieces, [SEP]."""
    rng = torch.Generator().manual_seed(count)
    begins = torch.rand(count, length, generator=rng) < 1.5 / longest_word
    numbers = torch.randint(0, 20, (count, length), generator=rng)
    ids = 4 + torch.where(begins, 3 * numbers, 3 * numbers + 1)
    ids[:, 0], ids[:, -1] = 1, 2
    return ids


def masking(**keys: object) -> Masking:
    return Masking(PretrainConfig(**keys), MASK_ID, begins_word(PIECES))


@pytest.mark.parametrize("keys", [{}, {"masking": "windowed"}, {"objective": "mlm"}, {"mask_fraction": 0.4}], ids=str)
def test_the_count_is_known_before_the_choice(keys: dict[str, object]) -> None:
    ids = rows(200, 70)
    ids[ids == MASK_ID] = 7
    mask = masking(**keys)
    found = mask(ids, torch.arange(200))
    assert mask.count(ids).equal((found.positions >= 0).sum(1))


def test_rtd_shows_the_mask_token_at_every_masked_position() -> None:
    found = masking()(text(10, 40), torch.arange(10))
    assert (found.shown == MASK_ID).all()


def test_mlm_hides_swaps_and_keeps_in_the_proportion_8_1_1() -> None:
    ids = text(4000, 100)
    found = masking(objective="mlm")(ids, torch.arange(4000))
    original = ids.gather(1, found.positions)
    total = found.positions.numel()
    hidden, kept = found.shown == MASK_ID, found.shown == original
    swapped = found.shown[~hidden & ~kept]
    for share, wanted in ((hidden, 0.8), (kept, 0.1 + 0.1 / 62), (~hidden & ~kept, 0.1 - 0.1 / 62)):
        deviation = (wanted * (1 - wanted) / total) ** 0.5
        assert share.sum().item() / total == pytest.approx(wanted, abs=5 * deviation)
    times = torch.bincount(swapped - 4, minlength=MASK_ID - 4).double()  # any ordinary piece, each alike
    assert len(times) == MASK_ID - 4 and times.min() > 0.5 * times.mean()


def test_mlm_masks_whole_runs_of_words_but_for_the_last() -> None:
    ids = text(300, 120)
    found = masking(objective="mlm", max_ngram=2)(ids, torch.arange(300))
    begins = torch.tensor([*begins_word(PIECES), True])
    cut = 0
    for row, positions in zip(ids, found.positions.tolist(), strict=True):
        chosen = {place for place in positions if place >= 0}
        assert len(chosen) == math.ceil(118 * 0.15)
        cut += sum(place + 1 < 119 and not begins[row[place + 1]] and place + 1 not in chosen for place in chosen)
        # What is masked starts where a word does; only the last unit taken may end within one.
        assert all(begins[row[place]] or place == 1 or place - 1 in chosen for place in chosen)
    assert cut <= 300


def test_runs_of_words_come_in_the_proportion_one_to_their_length() -> None:
    ids = torch.full((2000, 202), 4)  # every piece is a word
    ids[:, 0], ids[:, -1] = 1, 2
    mask = masking(objective="mlm", max_ngram=3)
    units = mask._runs_of_words(ids, torch.arange(2000))[:, 1:-4]  # the last run may be cut short
    lengths = torch.cat([torch.unique_consecutive(row, return_counts=True)[1][:-1] for row in units])
    shares = torch.bincount(lengths)[1:] / len(lengths)
    assert shares.tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)


def test_mlm_masks_every_position_alike() -> None:
    length, count = 64, 30_000
    ids = torch.full((count, length), 4)
    ids[:, 0], ids[:, -1] = 1, 2
    found = masking(objective="mlm")(ids, torch.arange(count))
    times = torch.bincount(found.positions.flatten(), minlength=length).double() / count
    # Neighbours are masked together, so the rows vary more than with single tokens: five deviations of one position.
    wanted = 10 / 62
    assert (times[1:-1] - wanted).abs().max() < 6 * (wanted * (1 - wanted) / count) ** 0.5


def test_words_begin_at_spaces_and_at_every_piece_of_an_unspaced_script() -> None:
    assert begins_word(["▁the", "re", "▁", "天", "地上", "ไทย", "."]) == [True, False, True, True, True, True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_choose_alike() -> None:
    ids, slots = rows(64, 512), torch.arange(64)
    words = text(64, 512)
    on_cpu, there = (masking(objective="mlm")(words.to(d), slots.to(d)) for d in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, there, strict=True))
    on_gpu = choose(ids.cuda(), slots.cuda(), Fraction("0.15"), seed=5)
    assert torch.equal(on_gpu.cpu(), choose(ids, slots, Fraction("0.15"), seed=5))
