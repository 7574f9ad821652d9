"""How alike the rows of an embedding table are: the mean cosine of all pairs, in one pass.

    mean over i != j of cos(e_i, e_j) = (|u|^2 - n) / (n (n - 1)),    u = sum of e_i / |e_i|

n (n - 1) pairs for O(n D) work. Masked language modelling draws words together, replaced-token detection pushes them
apart, so this number tells what pulls on a table (DeBERTaV3, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_cosine(parts: Iterable[Tensor]) -> float:
    """Mean cosine of all pairs of different rows of a table, which comes as consecutive parts [n, D]; two rows or more.

    In float64, so that threads and devices differ by about 1e-12 only.
    """
    count, sums = 0, []
    for part in parts:
        count += len(part)
        sums.append(F.normalize(part.double(), dim=-1, eps=1e-30).sum(0))
    directions = torch.stack(sums).sum(0)
    return float((directions @ directions - count) / (count * (count - 1)))
