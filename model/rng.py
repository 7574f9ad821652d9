"""Randomness by arithmetic: a number depends on what it is for, never on how many were drawn before it.

`derive` makes a seed of words and integers ("dropout", step, micro-batch); `mix` hashes whole arrays of counters
(sample, position). A resumed run, or one on another number of processes, therefore draws the same numbers without any
generator state being saved.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
import torch

Int64 = TypeVar("Int64", np.ndarray, torch.Tensor)


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: the start of a hash over the seed and the words and numbers that name it."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix(values: Int64) -> Int64:
    """SplitMix64's finaliser on int64 values: a bijection in which every input bit reaches every output bit.

    The same for numpy and torch on any device: products wrap, and `>>` with a mask is the logical shift int64 lacks.
    """
    values = (values ^ ((values >> 30) & (2**34 - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    values = (values ^ ((values >> 27) & (2**37 - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return values ^ ((values >> 31) & (2**33 - 1))
