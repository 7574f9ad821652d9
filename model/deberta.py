"""The DeBERTaV3 encoder: word embeddings without positions, post-norm layers, one relative table for all of them.

Every module has the name that `transformers` gives it in `DebertaV2Model`, so the weights of either load into the other
as they are. Positions enter through the attention alone (see `model.attention`); a row may hold several segments, and
each is encoded as if it stood alone.
"""

from __future__ import annotations

from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import AttentionChoice, DisentangledSelfAttention, Memory, Relations, reachable_rows, suits_kernels
from model.eager_attention import EagerRelations, relative_index, segment_mask
from model.modules import Dropout, Linear, has_triton
from pipeline.config import ModelConfig
from pipeline.errors import UserError

Words = TypeVar("Words", bound=nn.Module)
"""What turns ids into word rows: an `nn.Embedding`, or a sharing module of `model.rtd` that takes further arguments."""


class Embeddings(nn.Module, Generic[Words]):
    """LayerNorm of the word rows, padding set to zero, dropout; no position is added here.

    `positions` is not used in this module: it belongs to the enhanced mask decoder, which adds it near the output, and
    is held here because this is where checkpoints have it.
    """

    def __init__(self, config: ModelConfig, words: Words, positions: nn.Embedding | None = None) -> None:
        super().__init__()
        self.word_embeddings = words
        self.position_embeddings = positions
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, segment_ids: Tensor, *shared: Tensor) -> Tensor:
        """Ids and segments [B, L] to the first hidden states [B, L, D]."""
        rows = self.LayerNorm(self.word_embeddings(input_ids, *shared))
        return self.dropout(rows * (segment_ids > 0).unsqueeze(-1))


class AddNorm(nn.Module):
    """The end of each half of a layer: LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config: ModelConfig, in_features: int) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """[..., in_features] and the residual [..., D] to [..., D]."""
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class Attention(nn.Module):
    """Attention half of a layer. The residual is the query's own state, also where keys come from elsewhere."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(config)
        self.output = AddNorm(config, config.hidden_size)

    def forward(self, hidden: Tensor, relations: Relations) -> Tensor:
        """The tokens of `hidden` [B, L, D] look at each other: [B, L, D]."""
        return self.output(self.self(hidden, relations), hidden)

    def answer(self, queries: Tensor, memory: Memory) -> Tensor:
        """`queries` [B, Q, D] look at `memory`: [B, Q, D]."""
        return self.output(self.self.answer(queries, memory), queries)


class Intermediate(nn.Module):
    """First feed-forward projection with the exact (erf) GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] to [..., intermediate_size]."""
        return F.gelu(self.dense(states))


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config, config.intermediate_size)

    @property
    def heads(self) -> int:
        """H."""
        return self.attention.self.heads

    def forward(self, hidden: Tensor, relations: Relations) -> Tensor:
        """The layer's input [B, L, D] to its output."""
        return self._feed_forward(self.attention(hidden, relations))

    def memory(self, hidden: Tensor, relations: Relations) -> Memory:
        """What queries of this layer attend to, given its input `hidden` [B, L, D]."""
        return self.attention.self.memory(hidden, relations)

    def answer(self, queries: Tensor, memory: Memory) -> Tensor:
        """New states of `queries` [B, Q, D]; where they are the layer's input, these are the layer's output."""
        return self._feed_forward(self.attention.answer(queries, memory))

    def _feed_forward(self, attended: Tensor) -> Tensor:
        return self.output(self.intermediate(attended), attended)


class Encoder(nn.Module):
    """The layers and the table of relative positions they share."""

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.buckets = config.position_buckets
        self.max_distance = config.max_position_embeddings
        self.attention: AttentionChoice = "auto"
        self.checkpoint_activations = False
        """Whether a backward pass computes each layer again instead of keeping what is within it."""
        self.layer = nn.ModuleList(Layer(config) for _ in range(num_layers))
        self.rel_embeddings = nn.Embedding(2 * config.position_buckets, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def set_up(self, attention: AttentionChoice, compiled: bool, checkpoint_activations: bool) -> None:
        """Choose how the layers are computed; what they compute is the same, but for rounding.

        Raises:
            UserError: `attention` is fused where its kernels cannot run.
        """
        if attention == "fused" and not (torch.cuda.is_available() and has_triton()):
            raise UserError(
                "pretrain.attention fused needs a GPU, and Triton, which comes with torch for GPUs; use auto"
            )
        self.attention, self.checkpoint_activations = attention, checkpoint_activations
        if compiled:
            from torch._inductor import config as inductor_config  # takes seconds

            # Nothing is chosen by timing it: a resumed run has to find the same kernels.
            options = {"deterministic": True} if hasattr(inductor_config, "deterministic") else {}
            for layer in self.layers:
                layer.compile(dynamic=False, options=options)

    @property
    def layers(self) -> list[Layer]:
        """`layer`, with its type."""
        return cast("list[Layer]", list(self.layer))

    def relations(self, segment_ids: Tensor) -> Relations:
        """What all layers need to know about the positions and segments [B, L] of a batch."""
        place = (segment_ids.shape[1], self.buckets, self.max_distance, segment_ids.device)
        table = self.LayerNorm(self.rel_embeddings(reachable_rows(*place)))
        if self.attention == "fused" or (self.attention == "auto" and suits_kernels(table, self.layers[0].heads)):
            from model.fused_attention import FusedRelations  # needs Triton, which comes with torch for GPUs

            return FusedRelations.of(table, segment_ids, self.buckets, self.max_distance)
        return EagerRelations(table, relative_index(*place), segment_mask(segment_ids, table.dtype))

    def forward(self, hidden: Tensor, relations: Relations, skip_last: int = 0) -> Tensor:
        """`hidden` [B, L, D] through all layers but the last `skip_last`."""
        for layer in self.layers[: len(self.layer) - skip_last]:
            if self.checkpoint_activations and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, relations, use_reentrant=False)
            else:
                hidden = layer(hidden, relations)
        return hidden


class Deberta(nn.Module, Generic[Words]):
    """Embeddings and encoder: `transformers`' DebertaV2Model, for rows of one or several segments."""

    def __init__(
        self, config: ModelConfig, num_layers: int, words: Words, positions: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, words, positions)
        self.encoder = Encoder(config, num_layers)

    def forward(self, input_ids: Tensor, segment_ids: Tensor, *shared: Tensor) -> Tensor:
        """Last hidden states [B, L, D]. `segment_ids` [B, L]: 0 is padding, 1, 2, ... the segments packed in a row."""
        hidden = self.embeddings(input_ids, segment_ids, *shared)
        return self.encoder(hidden, self.encoder.relations(segment_ids))


@torch.no_grad()
def initialise(module: nn.Module, std: float, rng: torch.Generator | None = None) -> None:
    """Draw linear and embedding weights from normal(0, std), the padding row included, and zero the linear biases.

    LayerNorms stay at 1 and 0, as built; so do parameters that belong to no such module, and those start at zero.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std, generator=rng)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
