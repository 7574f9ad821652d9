"""Disentangled self-attention (DeBERTa, section 3.1): content and relative position in separate vectors.

With r = i - j the distance from key j to query i, b(r) its bucket, and one table R of bucket embeddings for all layers:

    score(i, j) = [ Qc_i . Kc_j  +  Qc_i . Kr_b(r)  +  Qr_b(r) . Kc_j ] / sqrt(3 d)
                    content-content  content-position   position-content

Kr and Qr are R through the layer's own key and query projections (shared keys), and both position terms read the same
bucket. This module has the projections; two others compute the rest: `model.eager_attention` in plain torch, the
reference, and `model.fused_attention` on GPUs.

Shapes: B rows, L tokens a row, Q queries (Q = L, or fewer), H heads, d size of a head, D = H * d, P reachable buckets.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from model.modules import Dropout, Linear, has_triton, joint_linear
from pipeline.config import ModelConfig

AttentionChoice = Literal["auto", "eager", "fused"]
KERNEL_HEAD_SIZES = (16, 32, 64, 128)


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
def reachable_rows(length: int, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """The rows [P] of the table that rows of `length` tokens can reach: the others are left out of every product.

    Buckets are odd, b(-r) = -b(r), and bucket b is row b + `buckets` of the table.
    """
    # Cached tensors outlive the call: made under inference_mode they could never take part in a backward pass.
    with torch.inference_mode(False):
        reach = log_bucket(length - 1, buckets, max_distance)
        return torch.arange(buckets - reach, buckets + reach + 1, device=device)


def computed_in(states: Tensor) -> torch.dtype:
    """The precision of what linear layers make of `states`."""
    kind = states.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return states.dtype


def suits_kernels(table: Tensor, heads: int) -> bool:
    """Whether the kernels of `model.fused_attention` are the faster way to attend, given a table [P, D]."""
    half = computed_in(table) in {torch.bfloat16, torch.float16}
    return table.is_cuda and half and table.shape[1] // heads in KERNEL_HEAD_SIZES and has_triton()


class Memory(Protocol):
    """What queries attend to: all that one layer derives from its input before it sees a query."""

    def attend(self, query: Tensor | None, dropout: float) -> Tensor:
        """Contexts [B, Q, H, d] of queries [B, Q, H, d], with so much dropout of the attention's weights.

        None stands for the tokens' own queries, where these are remembered.
        """


class Relations(Protocol):
    """How queries and keys of a batch relate, whatever they contain: computed once, used by every layer."""

    @property
    def table(self) -> Tensor:
        """[P, D] normalised embeddings of the reachable buckets."""

    def at(self, positions: Tensor) -> Relations:
        """The same for the queries at `positions` [B, Q] alone; where a position is -1, the context means nothing."""

    def remember(self, states: Tensor, positions: Tensor) -> Memory:
        """The memory of a layer.

        Args:
            states: [B, L, 3, H, d] queries, keys and values, or [B, L, 2, H, d] keys and values.
            positions: [P, 2, H, d] the table through the projections of queries and of keys.
        """


class DisentangledSelfAttention(nn.Module):
    """Multi-head attention with content-to-position and position-to-content terms and shared keys.

    `forward` is self-attention. The enhanced mask decoder has queries from elsewhere, twice: it takes the `memory` of
    keys and values once, and lets each of its queries look at that (`answer`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query_proj = Linear(config.hidden_size, config.hidden_size)
        self.key_proj = Linear(config.hidden_size, config.hidden_size)
        self.value_proj = Linear(config.hidden_size, config.hidden_size)
        self.pos_dropout = Dropout(config.hidden_dropout_prob)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, relations: Relations) -> Tensor:
        """The tokens of `hidden` [B, L, D] attend to each other: their contexts, [B, L, D]."""
        states = self._project(hidden, self.query_proj, self.key_proj, self.value_proj)
        return self._look(None, self._remember(states, relations))

    def memory(self, hidden: Tensor, relations: Relations) -> Memory:
        """What the queries of `relations` attend to in `hidden` [B, L, D]."""
        return self._remember(self._project(hidden, self.key_proj, self.value_proj), relations)

    def answer(self, queries: Tensor, memory: Memory) -> Tensor:
        """`queries` [B, Q, D] attend to `memory`: their contexts, [B, Q, D]."""
        return self._look(self.query_proj(queries).unflatten(-1, (self.heads, -1)), memory)

    def _project(self, states: Tensor, *projections: Linear) -> Tensor:
        """[..., D] through n projections in one product: [..., n, H, d]."""
        return joint_linear(states, *projections).unflatten(-1, (len(projections), self.heads, -1))

    def _remember(self, states: Tensor, relations: Relations) -> Memory:
        table = self.pos_dropout(relations.table)
        return relations.remember(states, self._project(table, self.query_proj, self.key_proj))

    def _look(self, query: Tensor | None, memory: Memory) -> Tensor:
        return memory.attend(query, self.dropout if self.training else 0.0).flatten(-2)
