"""DeBERTa's masked language model and its enhanced mask decoder: the generator of RTD, and the MLM baseline alone.

Tokens are hidden at some positions, predicted there, and drawn from the prediction:

    x  --hide-->  x~  -->  H = layers 1..n-1  -->  last layer, for hidden tokens alone  -->  tied soft-max over V

Only hidden tokens are ever predicted, so the last layer is asked for them alone: its keys and values are computed once
from H, and just the hidden tokens' queries run through it.

With the enhanced mask decoder (DeBERTa, section 3.2; on by default) a query is H + P, P the raw embedding of the
token's place in its segment, and runs through the last layer twice, both times against H. This is the only place where
absolute positions enter. It equals the reference code, which sends all tokens twice after an ordinary pass whose result
it drops, for a third less of the body's arithmetic. Without the decoder a query is H and runs once: an ordinary
encoder, whose weights `transformers` can use for fill-mask.

Shapes: B rows, L tokens in a row, K masked positions in a row (fixed, -1 where a row has fewer), V table rows, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.deberta import Deberta, initialise
from model.head import project_and_sample
from model.modules import Linear
from pipeline.config import ModelConfig

FIRST_PIECE = 4
"""[PAD], [CLS], [SEP] and [UNK] are 0..3; ordinary pieces follow, and [MASK] comes after the last of them."""


class MaskedLMOutput(NamedTuple):
    """Loss over the masked tokens, and what to put in their place."""

    loss_sum: Tensor
    """Scalar fp32."""
    tokens: Tensor
    """Scalar int64: how many were masked."""
    sampled: Tensor
    """[B, K] int64 drawn ids; without meaning where the position is -1."""


class LMHead(nn.Module):
    """LayerNorm(gelu(dense(h))), and a bias for every word: what stands between the last layer and the tied table."""

    def __init__(self, config: ModelConfig, vocab_rows: int) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_rows))

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] to the vectors [..., D] that are compared with word embeddings."""
        return self.LayerNorm(F.gelu(self.dense(states)))


class LMPredictions(nn.Module):
    """A level of names that checkpoints have."""

    def __init__(self, config: ModelConfig, vocab_rows: int) -> None:
        super().__init__()
        self.lm_head = LMHead(config, vocab_rows)


class MaskedLM(nn.Module):
    """Encoder and head with one table for input and output: E[ids] goes in, and states are compared with E at the end.

    Args:
        config: of the networks.
        num_layers: depth, at least 2 with the enhanced mask decoder.
        vocab_rows: V; of these ids `mask_id` is [MASK] and the ones after it are unused.
        mask_id: id of [MASK].
        rng: draws the weights.
    """

    def __init__(
        self, config: ModelConfig, num_layers: int, vocab_rows: int, mask_id: int, rng: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.mask_id = mask_id
        words, places = nn.Embedding(vocab_rows, config.hidden_size), None
        if config.enhanced_mask_decoder:
            places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.deberta = Deberta(config, num_layers, words, places)
        self.lm_predictions = LMPredictions(config, vocab_rows)
        initialise(self, config.initializer_range, rng)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        masked_positions: Tensor,
        shown: Tensor,
        noise: Tensor,
        temperature: float = 1.0,
    ) -> MaskedLMOutput:
        """Predict the original `input_ids` [B, L] at `masked_positions` [B, K], where the input shows `shown` [B, K].

        `noise` [B, K, 2], uniform in [0, 1), decides the draws: `torch.rand(B, K, 2, generator=...)`. Special tokens
        and unused rows are never drawn. Dropout is active in training mode, also for the distribution drawn from.
        """
        states = self.masked_states(write_at(input_ids, masked_positions, shown), segment_ids, masked_positions)
        is_real = masked_positions >= 0
        targets = read_at(input_ids, masked_positions).masked_fill(~is_real, -1)
        head = self.lm_predictions.lm_head
        loss_sum, sampled = project_and_sample(
            hidden=head(states).flatten(0, 1),
            weight=self.deberta.embeddings.word_embeddings.weight,
            bias=head.bias,
            targets=targets.flatten(),
            noise=noise.flatten(0, 1),
            candidates=range(FIRST_PIECE, self.mask_id),
            temperature=temperature,
        )
        return MaskedLMOutput(loss_sum, is_real.sum(), sampled.view_as(masked_positions))

    def masked_states(self, shown_ids: Tensor, segment_ids: Tensor, masked_positions: Tensor) -> Tensor:
        """Final states [B, K, D] of the masked tokens of `shown_ids` [B, L], which hides them already."""
        encoder, places = self.deberta.encoder, self.deberta.embeddings.position_embeddings
        relations = encoder.relations(segment_ids)
        hidden = encoder(self.deberta.embeddings(shown_ids, segment_ids), relations, skip_last=1)
        last = encoder.layers[-1]
        memory = last.memory(hidden, relations.at(masked_positions))
        queries = read_at(hidden, masked_positions)
        if places is None:
            return last.answer(queries, memory)
        place = torch.arange(shown_ids.shape[1], device=shown_ids.device) - segment_starts(segment_ids)
        # Beyond the table's end the last place stands for all, as the last bucket does for distances.
        place = read_at(place, masked_positions).clamp(max=places.num_embeddings - 1)
        queries = queries + places(place)
        return last.answer(last.answer(queries, memory), memory)


def segment_starts(segment_ids: Tensor) -> Tensor:
    """Place in the row [B, L] at which each token's segment begins: where its [CLS] is."""
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    begins = segment_ids != segment_ids.roll(1, dims=1)
    return torch.where(begins, place, 0).cummax(dim=1).values


def read_at(values: Tensor, positions: Tensor) -> Tensor:
    """Entries of `values` [B, L] or [B, L, D] at `positions` [B, K]; where a position is -1, the entry at 0."""
    positions = positions.clamp(min=0)
    return torch.take_along_dim(values, positions if values.ndim == 2 else positions[..., None], dim=1)


def write_at(values: Tensor, positions: Tensor, entries: Tensor) -> Tensor:
    """A copy of `values` [B, L] with `entries` [B, K] at `positions` [B, K]; nothing is written where those are -1."""
    length = values.shape[1]
    # One spare column takes what is not to be written: the shapes stay fixed, whatever the number of masked tokens.
    target = positions.masked_fill(positions < 0, length)
    return F.pad(values, (0, 1)).scatter(1, target, entries)[:, :length]
