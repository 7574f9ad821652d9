"""Disentangled attention on GPUs, through the operator of `model.attention_operator`: no L x L matrix is ever stored.

The operator knows distances, not buckets: the projected table is spread to a row for every distance that matters before
each call, a copy of at most 4 MB a layer.

Shapes: B rows, L tokens a row, Q queries (Q = L, or fewer), H heads, d size of a head, D = H * d, P reachable buckets,
R distances.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import computed_in, log_bucket
from model.attention_operator import Reach, disentangled_attention, distances, reach, tile_size


@functools.lru_cache(maxsize=16)
def _rows_of_distances(length: int, buckets: int, max_distance: int, tile: int, device: torch.device) -> Tensor:
    """The reachable row [R] of the table for each of the operator's distances."""
    first, last = distances(length, max_distance, tile)
    farthest = length - 1
    reached = log_bucket(farthest, buckets, max_distance)
    rows = [
        reached + int(math.copysign(log_bucket(min(abs(r), farthest), buckets, max_distance), r))
        for r in range(first, last)
    ]
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


class FusedRelations(NamedTuple):
    """See `model.attention.Relations`."""

    table: Tensor
    """[P, D]"""
    rows: Tensor
    """[R] int64: the row of `table` for each distance."""
    reach: Reach
    """Which tokens each token may attend to, [B, L] both."""
    slots: Tensor | None = None
    """[B, L] int32: which query is at each place, -1 where none is; None = query i is at place i."""

    @classmethod
    def of(cls, table: Tensor, segment_ids: Tensor, buckets: int, max_distance: int) -> FusedRelations:
        """Relations of rows with these segments [B, L]; a segment is a run of one number, and 0 is padding."""
        length = segment_ids.shape[1]
        tile = tile_size(length, computed_in(table), table.device)
        rows = _rows_of_distances(length, buckets, max_distance, tile, table.device)
        return cls(table, rows, reach(segment_ids))

    def at(self, positions: Tensor) -> FusedRelations:
        """Those of the queries at `positions` [B, Q], none of which occurs twice in a row but -1."""
        batch, length = self.reach.first.shape
        # One spare place takes the queries that are nowhere.
        slots = positions.new_full((batch, length + 1), -1, dtype=torch.int32)
        numbers = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device).expand_as(positions)
        slots = slots.scatter(1, positions.masked_fill(positions < 0, length), numbers)
        return self._replace(slots=slots[:, :length].contiguous())

    def remember(self, states: Tensor, positions: Tensor) -> FusedMemory:
        """States [B, L, 3 or 2, H, d], projected table [P, 2, H, d]."""
        # The backward pass of an embedding sums in fp32 and always in the same order.
        relative = F.embedding(self.rows, positions.flatten(1)).view(-1, *positions.shape[1:])
        return FusedMemory(states, relative, self.reach, self.slots)


class FusedMemory(NamedTuple):
    """See `model.attention.Memory`."""

    states: Tensor
    """[B, L, 3 or 2, H, d]"""
    relative: Tensor
    """[R, 2, H, d]"""
    reach: Reach
    slots: Tensor | None

    def attend(self, query: Tensor | None, dropout: float) -> Tensor:
        """[B, Q, H, d] to [B, Q, H, d]; zeros for padding, and for queries that are at no place."""
        scale = 1.0 / math.sqrt(3 * self.states.shape[-1])
        return disentangled_attention(self.states, self.relative, self.reach, scale, query, self.slots, dropout)
