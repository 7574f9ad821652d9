"""Disentangled self-attention (DeBERTa, section 3.1): content and relative position in separate vectors.

With r = i - j the distance from key j to query i, b(r) its bucket, and one table R of bucket embeddings for all layers:

    score(i, j) = [ Qc_i . Kc_j  +  Qc_i . Kr_b(r)  +  Qr_b(r) . Kc_j ] / sqrt(3 d)
                    content-content  content-position   position-content

Kr and Qr are R through the layer's own key and query projections (shared keys), and both position terms read the same
bucket. So each is a product of all tokens with the table followed by a gather: L * P dot products a head instead of a
vector for each of the L * L pairs. The projected table is the same for every row of the batch and is never copied over
it: heads are the leading dimension of every tensor here, so that one matrix product a head serves the whole batch.

Shapes: B rows, L tokens a row, Q queries (Q = L, or fewer), H heads, d size of a head, D = H * d, P reachable buckets.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.modules import Dropout, Linear
from pipeline.config import ModelConfig


def log_bucket(distance: int, buckets: int, max_distance: int) -> int:
    """Bucket of a distance >= 0: itself up to buckets / 2, then growing with its logarithm up to buckets - 1.

    A distance of max_distance or more shares the last bucket instead of reading a row that was never trained.
    """
    middle, farthest = buckets // 2, max_distance - 1
    distance = min(distance, farthest)
    if distance <= middle:
        return distance
    growth = math.log(distance / middle) / math.log(farthest / middle)
    return middle + math.ceil(growth * (middle - 1))


@functools.lru_cache(maxsize=16)
def relative_index(length: int, buckets: int, max_distance: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For rows of `length` tokens: the reachable rows of the table [P], and which of them each pair reads [L, L].

    Buckets are odd, b(-r) = -b(r), and bucket b is row b + `buckets` of the table. Short rows reach few buckets; the
    others are left out of every product.
    """
    # Cached tensors outlive the call: made under inference_mode they could never take part in a backward pass.
    with torch.inference_mode(False):
        of_distance = torch.tensor([log_bucket(r, buckets, max_distance) for r in range(length)], device=device)
        position = torch.arange(length, device=device)
        difference = position[:, None] - position[None, :]
        reach = log_bucket(length - 1, buckets, max_distance)
        rows = torch.arange(buckets - reach, buckets + reach + 1, device=device)
        return rows, of_distance[difference.abs()] * difference.sign() + reach


class Relations(NamedTuple):
    """How queries and keys of a batch relate, whatever they contain: computed once, used by every layer."""

    table: Tensor
    """[P, D] normalised embeddings of the reachable buckets."""
    bucket: Tensor
    """[L, L] or [B, Q, L] int64: the row of `table` that query i and key j read."""
    mask: Tensor
    """[B, Q, L] to add to the scores: 0 within a segment, -inf between two."""

    def at(self, positions: Tensor) -> Relations:
        """The same for the queries at `positions` [B, Q] alone."""
        mask = torch.take_along_dim(self.mask, positions[..., None], dim=1)
        return Relations(self.table, self.bucket[positions], mask)


def segment_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] segment numbers to the [B, L, L] mask that keeps attention inside a segment.

    Padding is segment 0 and attends to itself, so no query is left without a key and no soft-max is empty.
    """
    apart = segment_ids[:, :, None] != segment_ids[:, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill_(apart, -math.inf)


class Memory(NamedTuple):
    """What queries attend to: all that one layer derives from its input before it sees a query."""

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


class DisentangledSelfAttention(nn.Module):
    """Multi-head attention with content-to-position and position-to-content terms and shared keys.

    The work is split in two: `memory` is everything about the keys, `forward` lets queries look at them. Ordinary
    self-attention does one after the other; the enhanced mask decoder asks one memory twice.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.scale = 1.0 / math.sqrt(3 * (config.hidden_size // config.num_attention_heads))
        self.query_proj = Linear(config.hidden_size, config.hidden_size)
        self.key_proj = Linear(config.hidden_size, config.hidden_size)
        self.value_proj = Linear(config.hidden_size, config.hidden_size)
        self.pos_dropout = Dropout(config.hidden_dropout_prob)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def split(self, states: Tensor) -> Tensor:
        """[..., D] to heads first: [H, ..., d]."""
        return states.unflatten(-1, (self.heads, -1)).movedim(-2, 0).contiguous()

    def memory(self, hidden: Tensor, relations: Relations) -> Memory:
        """Keys, values and query-independent scores for `hidden` [B, L, D] as the queries of `relations` need them."""
        key = self.split(self.key_proj(hidden))
        table = self.pos_dropout(relations.table)
        # Scaling before the product keeps bf16 scores small; the table is the smaller of the two factors.
        position_query = self.split(self.query_proj(table)) * self.scale
        scores = (position_query @ key.flatten(1, 2).mT).unflatten(-1, key.shape[1:3])  # [H, P, B, L]
        bucket = relations.bucket.expand(self.heads, *relations.mask.shape)
        return Memory(
            key=key,
            value=self.split(self.value_proj(hidden)),
            position_key=self.split(self.key_proj(table)),
            bucket=bucket,
            bias=scores.transpose(1, 2).gather(-2, bucket).add_(relations.mask),
        )

    def forward(self, queries: Tensor, memory: Memory) -> Tensor:
        """`queries` [B, Q, D] attend to `memory`: their contexts, [B, Q, D]."""
        query = self.split(self.query_proj(queries)) * self.scale
        positions = (query.flatten(1, 2) @ memory.position_key.mT).unflatten(1, query.shape[1:3])  # [H, B, Q, P]
        scores = query @ memory.key.mT
        scores = scores.add_(positions.gather(-1, memory.bucket)).add_(memory.bias)
        # torch computes a bf16 soft-max in fp32 and rounds its result.
        weights = self.dropout(scores.softmax(dim=-1))
        return (weights @ memory.value).movedim(0, -2).flatten(-2)
