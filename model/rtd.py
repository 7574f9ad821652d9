"""Replaced-token detection with gradient-disentangled embedding sharing: DeBERTaV3 (section 3) in code.

A small generator fills masked tokens in, a discriminator says of every token whether it is the original:

    x       --mask-->   G   --sample-->   x'   -->   D
            L_MLM = cross-entropy at masked tokens        L_RTD = binary cross-entropy at all tokens

Both networks start from word embeddings. What they share decides what pulls on them (E_G: the generator's table, E_D:
what the discriminator sees, sg: stop-gradient):

| sharing | E_D          | L_MLM moves | L_RTD moves | |
|---------|--------------|-------------|-------------|-|
| `nes`   | E_D          | E_G         | E_D         | no sharing: each learns from scratch |
| `es`    | E_G          | E_G         | E_G         | ELECTRA: MLM draws like words together, RTD apart |
| `gdes`  | sg(E_G) + E_Δ| E_G         | E_Δ         | D builds on what G learnt, and RTD cannot disturb that |

E_Δ starts at zero. The sum sg(E_G) + E_Δ is only ever formed for the rows of a batch: two lookups in place of a V x D
addition at each step, and no copy that could go stale. Only `folded` builds the table, for export.

One training step, decoupled (the paper's; `nes` and `gdes`): two modules, two optimisers, and D sees the E_G that the
generator's step has just produced.

    mlm = generator(input_ids, segment_ids, masked_positions, noise)
    (mlm.loss_sum / mlm.tokens).backward();   step(G)
    rtd = discriminate(generator, discriminator, input_ids, segment_ids, masked_positions, mlm.sampled)
    (rtd.loss_sum / rtd.tokens).backward();   step(D)

or joint (required by `es`, where one table takes both gradients): `JointRTD` and one optimiser on
mlm.loss_sum / mlm.tokens + lambda * rtd.loss_sum / rtd.tokens. Losses come as a sum and its number of tokens, so that
means over micro-batches and processes can weigh every token alike: add the sums, add the tokens, divide once.

Shapes: B rows, L tokens in a row, K masked positions in a row (fixed, -1 where a row has fewer), V table rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.deberta import Deberta, initialise
from model.masked_lm import MaskedLM, MaskedLMOutput, segment_starts, write_at
from model.modules import Linear
from pipeline.config import ModelConfig

Sharing = Literal["gdes", "nes", "es"]


class NoSharing(nn.Embedding):
    """NES: E_D[ids]. The discriminator has a table of its own, and each loss moves one table."""

    def forward(self, ids: Tensor, generator_rows: Tensor) -> Tensor:  # type: ignore[override]
        """Rows [B, L, D] for `ids` [B, L]; the generator's rows are not looked at."""
        return super().forward(ids)

    def folded(self, generator_table: Tensor) -> Tensor:
        """The table [V, D] the discriminator effectively has."""
        return self.weight


class FullSharing(nn.Module):
    """ES: E_G[ids]. No parameter here: the rows come with their graph, so L_RTD moves E_G beside L_MLM."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()

    def forward(self, ids: Tensor, generator_rows: Tensor) -> Tensor:
        """The generator's rows [B, L, D] for `ids` [B, L], as they are."""
        return generator_rows

    def folded(self, generator_table: Tensor) -> Tensor:
        """The table [V, D] the discriminator effectively has."""
        return generator_table


class GradientDisentangledSharing(nn.Module):
    """GDES: sg(E_G[ids]) + E_Δ[ids]. L_RTD stops at the generator's rows and moves E_Δ, which starts at zero."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(num_embeddings, embedding_dim))

    def forward(self, ids: Tensor, generator_rows: Tensor) -> Tensor:
        """The generator's rows [B, L, D] for `ids` [B, L], corrected by those of E_Δ."""
        return generator_rows.detach() + F.embedding(ids, self.delta)

    def folded(self, generator_table: Tensor) -> Tensor:
        """The table [V, D] the discriminator effectively has; for export alone."""
        return generator_table.detach() + self.delta


SharingModule = NoSharing | FullSharing | GradientDisentangledSharing
SHARINGS: dict[Sharing, Callable[[int, int], SharingModule]] = {
    "nes": NoSharing,
    "es": FullSharing,
    "gdes": GradientDisentangledSharing,
}


class DiscriminatorOutput(NamedTuple):
    """Replaced-token-detection loss over all tokens but padding."""

    loss_sum: Tensor
    """Scalar fp32."""
    tokens: Tensor
    """Scalar int64: how many were judged, [CLS] and [SEP] included."""
    logits: Tensor
    """[B, L] fp32: positive where the token looks replaced."""


class Generator(MaskedLM):
    """Masked language model: as wide as the discriminator and less deep, its output tied to its word embeddings E_G.

    Gradients: L_MLM reaches every parameter here. L_RTD reaches none, but E_G under `es`.
    """

    def __init__(self, config: ModelConfig, vocab_rows: int, mask_id: int, rng: torch.Generator | None = None) -> None:
        """Of V = `vocab_rows` ids, `mask_id` is [MASK] and the ones after it are unused; `rng` draws the weights."""
        super().__init__(config, config.generator_num_hidden_layers, vocab_rows, mask_id, rng)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        masked_positions: Tensor,
        noise: Tensor,
        temperature: float = 1.0,
    ) -> MaskedLMOutput:
        """`MaskedLM.forward` with [MASK] at every masked position: RTD neither keeps nor swaps masked tokens."""
        shown = torch.full_like(masked_positions, self.mask_id)
        return super().forward(input_ids, segment_ids, masked_positions, shown, noise, temperature)

    def word_rows(self, ids: Tensor) -> Tensor:
        """E_G[ids]: [B, L] to [B, L, D], with its graph; whether to cut it is the sharing's business.

        The module is called, not its weight indexed: ZeRO stage 3 gathers the table when its module is called.
        """
        return self.deberta.embeddings.word_embeddings(ids)


class RTDHead(nn.Module):
    """Is this token a replacement? LayerNorm(h_i + h_CLS) -> dense -> gelu -> one number, no dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden: Tensor, starts: Tensor) -> Tensor:
        """States [B, L, D] and the place [B, L] of each token's own [CLS] to logits [B, L]."""
        rows = torch.arange(len(hidden), device=hidden.device)[:, None] * hidden.shape[1] + starts
        # Read through an embedding lookup: its backward sums a segment's many gradients of one [CLS] in fp32 on GPUs.
        context = F.embedding(rows, hidden.flatten(0, 1))
        return self.classifier(F.gelu(self.dense(self.LayerNorm(hidden + context)))).squeeze(-1)


class Discriminator(nn.Module):
    """Replaced-token detector: the network that is kept, fine-tuned and published.

    It never owns E_G. Its forward takes the generator's rows for the batch, so generator and discriminator can live in
    two engines with two optimisers. Its word table is a sharing module: E_Δ under `gdes`, E_D under `nes`, nothing
    under `es`.

    Gradients: L_RTD reaches every parameter here, and E_G under `es` alone. L_MLM reaches none.
    """

    def __init__(
        self, config: ModelConfig, vocab_rows: int, sharing: Sharing, rng: torch.Generator | None = None
    ) -> None:
        super().__init__()
        words = SHARINGS[sharing](vocab_rows, config.hidden_size)
        self.deberta = Deberta(config, config.num_hidden_layers, words)
        self.mask_predictions = RTDHead(config)
        initialise(self, config.initializer_range, rng)

    def forward(
        self, input_ids: Tensor, segment_ids: Tensor, replaced: Tensor, generator_rows: Tensor
    ) -> DiscriminatorOutput:
        """Judge the corrupted `input_ids` [B, L] against `replaced` [B, L] bool.

        `generator_rows` [B, L, D] is E_G[input_ids] with its graph, whatever the sharing. Every token of a segment
        counts, [CLS] and [SEP] too; padding does not.
        """
        hidden = self.deberta(input_ids, segment_ids, generator_rows)
        logits = self.mask_predictions(hidden, segment_starts(segment_ids)).float()
        losses = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        valid = segment_ids > 0
        return DiscriminatorOutput((losses * valid).sum(), valid.sum(), logits)

    def word_table(self, generator_table: Tensor) -> Tensor:
        """The [V, D] table to publish, given E_G: E_G + E_Δ under `gdes`, E_D under `nes`, E_G under `es`."""
        return self.deberta.embeddings.word_embeddings.folded(generator_table)


def corrupt(input_ids: Tensor, masked_positions: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Put the samples in: corrupted ids [B, L], and which of them differ from the original [B, L] bool.

    A sample that happens to be the original token counts as original.
    """
    corrupted = write_at(input_ids, masked_positions, sampled)
    return corrupted, corrupted != input_ids


def discriminate(
    generator: Generator,
    discriminator: Callable[[Tensor, Tensor, Tensor, Tensor], DiscriminatorOutput],
    input_ids: Tensor,
    segment_ids: Tensor,
    masked_positions: Tensor,
    sampled: Tensor,
) -> DiscriminatorOutput:
    """The discriminator's half of a step: corrupt, look E_G up as it is now, judge.

    `discriminator` is a `Discriminator` or an engine around one; `generator` is the bare module. No gradient passes
    through the draw: the backward pass reaches the discriminator, and E_G under `es` alone.
    """
    corrupted, replaced = corrupt(input_ids, masked_positions, sampled)
    return discriminator(corrupted, segment_ids, replaced, generator.word_rows(corrupted))


class JointRTD(nn.Module):
    """Both networks in one module, for one optimiser and one backward pass over L_MLM + lambda * L_RTD.

    Gradients: E_G receives that of L_MLM, and under `es` also lambda times that of L_RTD. All else is as in the two
    networks' own docstrings. The discriminator sees E_G before the step, not after it as in the decoupled update.
    """

    def __init__(self, generator: Generator, discriminator: Discriminator) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        masked_positions: Tensor,
        noise: Tensor,
        temperature: float = 1.0,
    ) -> tuple[MaskedLMOutput, DiscriminatorOutput]:
        """Arguments as for `Generator.forward`; the outputs of both networks."""
        mlm = self.generator(input_ids, segment_ids, masked_positions, noise, temperature)
        rtd = discriminate(self.generator, self.discriminator, input_ids, segment_ids, masked_positions, mlm.sampled)
        return mlm, rtd
