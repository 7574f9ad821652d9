"""Disentangled attention in plain torch: what runs on CPUs, and the reference for the fused kernels.

A position term is a product of all tokens with the projected table followed by a gather: L * P dot products a head
instead of a vector for each of the L * L pairs. The projected table is the same for every row of the batch and is never
copied over it: heads are the leading dimension of every tensor here, so that one matrix product a head serves the whole
batch. Memory: several L x L matrices a row and head.

Shapes: B rows, L tokens a row, Q queries (Q = L, or fewer), H heads, d size of a head, D = H * d, P reachable buckets.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import log_bucket
from model.modules import dropout


@functools.lru_cache(maxsize=16)
def relative_index(length: int, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Which of the reachable rows of the table (`reachable_rows`) each pair of tokens reads, [L, L]."""
    with torch.inference_mode(False):  # as there
        of_distance = torch.tensor([log_bucket(r, buckets, max_distance) for r in range(length)], device=device)
        position = torch.arange(length, device=device)
        difference = position[:, None] - position[None, :]
        return of_distance[difference.abs()] * difference.sign() + log_bucket(length - 1, buckets, max_distance)


def segment_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] segment numbers to the [B, L, L] mask that keeps attention inside a segment.

    Padding is segment 0 and attends to itself, so no query is left without a key and no soft-max is empty.
    """
    apart = segment_ids[:, :, None] != segment_ids[:, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill_(apart, -math.inf)


class EagerRelations(NamedTuple):
    """See `model.attention.Relations`."""

    table: Tensor
    """[P, D]"""
    bucket: Tensor
    """[L, L] or [B, Q, L] int64: the row of `table` that query i and key j read."""
    mask: Tensor
    """[B, Q, L] to add to the scores: 0 within a segment, -inf between two."""

    def at(self, positions: Tensor) -> EagerRelations:
        """Those of the queries at `positions` [B, Q]; -1 stands for the first token."""
        positions = positions.clamp(min=0)
        mask = torch.take_along_dim(self.mask, positions[..., None], dim=1)
        return EagerRelations(self.table, self.bucket[positions], mask)

    def remember(self, states: Tensor, positions: Tensor) -> EagerMemory:
        """States [B, L, 3 or 2, H, d], projected table [P, 2, H, d]."""
        scale = 1.0 / math.sqrt(3 * states.shape[-1])
        *query, key, value = _heads_first(states)
        position_query, position_key = _heads_first(positions)
        # Scaling before the product keeps bf16 scores small; the table is the smaller of the two factors.
        scores = (position_query * scale @ key.flatten(1, 2).mT).unflatten(-1, key.shape[1:3])
        bucket = self.bucket.expand(len(key), *self.mask.shape)
        return EagerMemory(
            query=query[0] if query else None,
            key=key,
            value=value,
            position_key=position_key,
            bucket=bucket,
            bias=scores.transpose(1, 2).gather(-2, bucket).add_(self.mask),  # of [H, B, P, L]
        )


class EagerMemory(NamedTuple):
    """See `model.attention.Memory`."""

    query: Tensor | None
    """[H, B, L, d], the tokens' own"""
    key: Tensor
    """[H, B, L, d]"""
    value: Tensor
    """[H, B, L, d]"""
    position_key: Tensor
    """[H, P, d]"""
    bucket: Tensor
    """[H, B, Q, L], one index read H times"""
    bias: Tensor
    """[H, B, Q, L] position-to-content scores plus mask: the part of the scores that no query vector enters."""

    def attend(self, query: Tensor | None, dropped: float) -> Tensor:
        """[B, Q, H, d] to [B, Q, H, d]."""
        states = self.query if query is None else query.movedim(-2, 0).contiguous()
        assert states is not None, "neither given nor remembered"
        states = states * (1.0 / math.sqrt(3 * states.shape[-1]))
        positions = (states.flatten(1, 2) @ self.position_key.mT).unflatten(1, states.shape[1:3])  # [H, B, Q, P]
        scores = states @ self.key.mT
        scores = scores.add_(positions.gather(-1, self.bucket)).add_(self.bias)
        # torch computes a bf16 soft-max in fp32 and rounds its result.
        weights = dropout(scores.softmax(dim=-1), dropped)
        return (weights @ self.value).movedim(0, -2)


def _heads_first(states: Tensor) -> Tensor:
    """[..., n, H, d] to [n, H, ..., d]."""
    return states.movedim((-3, -2), (0, 1)).contiguous()
