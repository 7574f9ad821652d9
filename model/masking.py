"""Which tokens are masked and what stands in their place: arithmetic on (seed, sample number, position) alone.

Every token gets a hash of (seed, slot, unit), where its unit is the token itself or the run of words it belongs to. The
tokens with the smallest hashes are masked, exactly as many as wanted. No generator, no loop over rows, integers only:
CPU and GPU choose the same tokens, whatever the batch around a sample.

    rtd             unit = token                    [MASK] everywhere
    mlm             unit = run of 1..n whole words  80 % [MASK], 10 % another piece, 10 % the token itself
    rtd, windowed   one token of every six, from the left, until 15 % of the row is reached

The last is the reference code's choice. One in six is more than 15 %, so it never reaches the last tenth of a row
(P(mask) is 0.167 at the beginning and almost nothing at the end); it is there for comparison. The others treat all
positions alike.

Shapes: B rows, L tokens in a row, K = ceil(fraction * L) most masked positions of a row, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from model.masked_lm import FIRST_PIECE
from model.rng import derive, mix
from pipeline.config import PretrainConfig

_LAST = torch.iinfo(torch.int64).max
_MASK_SHARE, _SWAP_SHARE = Fraction(8, 10), Fraction(1, 10)


class Masked(NamedTuple):
    """The masked tokens of some rows."""

    positions: Tensor
    """[B, K] int64, ascending; -1 fills the rows that have fewer."""
    shown: Tensor
    """[B, K] int64: what the network sees there; without meaning where the position is -1."""


class Masking:
    """The masking of a run.

    Args:
        config: of the stage.
        mask_id: id of [MASK], the one after the last piece.
        begins_word: for each piece, whether a word begins with it (`tokenizer.words`); only `mlm` looks.
    """

    def __init__(self, config: PretrainConfig, mask_id: int, begins_word: Sequence[bool] = ()) -> None:
        self._config, self._mask_id = config, mask_id
        self._fraction = Fraction(str(config.mask_fraction))
        # [MASK] counts as a word of its own.
        self._begins_word = torch.tensor([*begins_word, True])

    def count(self, input_ids: Tensor) -> Tensor:
        """How many tokens of each row of `input_ids` [B, L] will be masked, [B], without choosing them."""
        if self._config.masking == "windowed":
            windows = -(-(input_ids >= FIRST_PIECE).sum(1) // _window_size(self._fraction))
            return torch.minimum(windows, _window_budget(input_ids, self._fraction))
        return _wanted(input_ids, self._fraction)

    def __call__(self, input_ids: Tensor, slots: Tensor) -> Masked:
        """Mask rows of `input_ids` [B, L]; `slots` [B] int64 are the samples' numbers."""
        seed, fraction = self._config.seed, self._fraction
        if self._config.objective == "mlm":
            units = self._runs_of_words(input_ids, slots)
            positions = choose(input_ids, slots, fraction, seed, units)
            return Masked(positions, self._shown(input_ids, slots, positions))
        choice = choose_windowed if self._config.masking == "windowed" else choose
        positions = choice(input_ids, slots, fraction, seed)
        return Masked(positions, torch.full_like(positions, self._mask_id))

    def _runs_of_words(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """Number of the run of words that each token belongs to, [B, L]; no run reaches over a special token.

        Runs of n words, 1 <= n <= max_ngram, come in the proportion 1/n (SpanBERT and DeBERTa, section 5).
        """
        self._begins_word = self._begins_word.to(input_ids.device)
        special = input_ids < FIRST_PIECE
        alone = special | special.roll(1, dims=1)
        begins = self._begins_word[input_ids] | alone
        word = begins.cumsum(1) - begins[:, :1].long()
        length = _run_lengths(_hashes(slots, self._config.seed, "ngram", input_ids.shape[1]), self._config.max_ngram)
        first_word = (length.cumsum(1) - length).clamp(max=input_ids.shape[1])
        opens = torch.zeros(len(word), word.shape[1] + 1, dtype=torch.bool, device=word.device)
        opens.scatter_(1, first_word, True)
        return (alone | (begins & opens.gather(1, word))).cumsum(1)

    def _shown(self, input_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """[MASK] at eight of ten positions, any piece at one of ten, and the token itself at the last."""
        where = positions.clamp(min=0)
        chance = _uniform(_hashes(slots, self._config.seed, "shown", input_ids.shape[1]).gather(1, where))
        piece = _uniform(_hashes(slots, self._config.seed, "swap", input_ids.shape[1]).gather(1, where))
        shown = FIRST_PIECE + piece % (self._mask_id - FIRST_PIECE)
        shown = shown.where(chance >= _threshold(_MASK_SHARE), self._mask_id)
        return shown.where(chance < _threshold(_MASK_SHARE + _SWAP_SHARE), input_ids.gather(1, where))


def mask_width(seq_len: int, fraction: Fraction) -> int:
    """K: the most positions that can be masked in a row of `seq_len` tokens."""
    return -int(-fraction * seq_len // 1)


def choose(input_ids: Tensor, slots: Tensor, fraction: Fraction, seed: int, units: Tensor | None = None) -> Tensor:
    """The positions to mask, ascending, [B, K] int64; -1 fills the rows that have fewer.

    Of a row's n ordinary tokens exactly ceil(fraction * n) are chosen; [PAD], [CLS], [SEP] and [UNK] never are.

    Args:
        input_ids: [B, L] integers.
        slots: [B] int64, the number of each sample.
        fraction: exact, so that 0.15 is 3/20.
        seed: of the run.
        units: [B, L] int64, ascending along a row: tokens of one unit are chosen together, but for the last one chosen,
            of which only as many as are wanted. None: every token is a unit.
    """
    length = input_ids.shape[1]
    position = torch.arange(length, device=input_ids.device)
    hashes = _hashes(slots, seed, "mask", length + 1)
    hashes = hashes[:, :length] if units is None else hashes.gather(1, units)
    # The position in the low bits makes equal hashes impossible, so every device sorts alike, and keeps units together.
    rank = (hashes & ~0xFFFF) | position
    rank = rank.masked_fill(input_ids < FIRST_PIECE, _LAST)
    chosen = rank.topk(mask_width(length, fraction), largest=False, sorted=True).indices
    column = torch.arange(chosen.shape[1], device=input_ids.device)
    return _ascending(chosen.masked_fill(column >= _wanted(input_ids, fraction)[:, None], length), length)


def choose_windowed(input_ids: Tensor, slots: Tensor, fraction: Fraction, seed: int) -> Tensor:
    """The reference code's positions, as `choose` returns them: one in each window of ordinary tokens, up to a budget.

    A window has int(1 / fraction) tokens; the budget is `fraction` of all tokens but padding, rounded.
    """
    length = input_ids.shape[1]
    ordinary = input_ids >= FIRST_PIECE
    window = (ordinary.cumsum(1) - 1).clamp(min=0) // _window_size(fraction)
    position = torch.arange(length, device=input_ids.device)
    rank = (_hashes(slots, seed, "mask", length) & ~0xFFFF) | position
    rank = rank.masked_fill(~ordinary, _LAST)
    lowest = torch.full_like(rank, _LAST).scatter_reduce_(1, window, rank, "amin")  # [B, W], W <= L
    chosen = ordinary & (rank == lowest.gather(1, window))
    chosen &= chosen.cumsum(1) <= _window_budget(input_ids, fraction)[:, None]
    return _ascending(torch.where(chosen, position, length), length)[:, : mask_width(length, fraction)]


def _ascending(positions: Tensor, length: int) -> Tensor:
    """Sort each row of `positions`; entries equal to `length` go to its end and become -1."""
    ordered = positions.sort(dim=1).values
    return ordered.masked_fill(ordered == length, -1)


def _wanted(input_ids: Tensor, fraction: Fraction) -> Tensor:
    """ceil(fraction * n) for the n ordinary tokens of each row, [B]."""
    return -(-(input_ids >= FIRST_PIECE).sum(1) * fraction.numerator // fraction.denominator)


def _window_size(fraction: Fraction) -> int:
    return int(1 / fraction)


def _window_budget(input_ids: Tensor, fraction: Fraction) -> Tensor:
    """round(fraction * n), at least 1, for the n tokens of each row that are no padding, [B]."""
    tokens = (input_ids > 0).sum(1)
    return (tokens.double() * float(fraction)).round().long().clamp(min=1)


def _run_lengths(hashes: Tensor, longest: int) -> Tensor:
    """Lengths 1..`longest` in the proportion 1/n, one for each hash."""
    total = sum(Fraction(1, n) for n in range(1, longest + 1))
    shares = [Fraction(1, n) / total for n in range(1, longest)]
    bounds = [_threshold(sum(shares[: n + 1], Fraction())) for n in range(len(shares))]
    chance = _uniform(hashes)
    return torch.stack([torch.ones_like(chance), *(chance >= bound for bound in bounds)]).long().sum(0)


def _hashes(slots: Tensor, seed: int, purpose: str, count: int) -> Tensor:
    """Numbers 0..`count` - 1 of each sample hashed for one purpose, [B, count] int64."""
    number = torch.arange(count, device=slots.device)
    return mix(mix(slots + derive(seed, purpose) // 2)[:, None] + number)


def _uniform(hashes: Tensor) -> Tensor:
    """Hashes as uniform integers in 0..2**62 - 1."""
    return hashes & (2**62 - 1)


def _threshold(share: Fraction) -> int:
    """The integer below which `_uniform` falls with this probability."""
    return int(share * 2**62)
