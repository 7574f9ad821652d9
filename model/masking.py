"""Which tokens are masked: a uniform choice that depends on the seed and the sample's number alone.

Every position of a sample gets a hash of (seed, slot, position); the positions with the smallest hashes among those
that may be masked are taken. No generator, no loop over rows, integers only: CPU and GPU choose the same positions. The
reference code's windowed choice never reaches the last tenth of a row; this one treats all positions alike.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from model.rng import derive, mix
from model.rtd import FIRST_PIECE


def mask_width(seq_len: int, mask_fraction: float) -> int:
    """K: the most positions that can be masked in a row of `seq_len` tokens."""
    return -int(-Fraction(str(mask_fraction)) * seq_len // 1)


def choose_masked(input_ids: Tensor, slots: Tensor, mask_fraction: float, seed: int) -> Tensor:
    """The positions to mask, ascending, [B, K] int64; -1 fills the rows that have fewer.

    Of a row's n ordinary tokens exactly ceil(mask_fraction * n) are chosen; [PAD], [CLS], [SEP] and [UNK] never are.

    Args:
        input_ids: [B, L] integers.
        slots: [B] int64, the number of each sample.
        mask_fraction: as a decimal fraction, so that 0.15 is exactly 3/20.
        seed: of the run.
    """
    length = input_ids.shape[1]
    share = Fraction(str(mask_fraction))
    maskable = input_ids >= FIRST_PIECE
    position = torch.arange(length, device=input_ids.device)
    hashes = mix(mix(slots + derive(seed, "mask") // 2)[:, None] + position)
    # The position itself in the low bits makes equal hashes impossible, so every device sorts alike.
    rank = (hashes & ~0xFFFF) | position
    rank = rank.masked_fill(~maskable, torch.iinfo(torch.int64).max)
    chosen = rank.topk(mask_width(length, mask_fraction), largest=False, sorted=True).indices
    wanted = -(-maskable.sum(1, keepdim=True) * share.numerator // share.denominator)
    column = torch.arange(chosen.shape[1], device=input_ids.device)
    # Unused entries sort behind the positions and become -1 there.
    ascending = chosen.masked_fill(column >= wanted, length).sort(dim=1).values
    return ascending.masked_fill(ascending == length, -1)
