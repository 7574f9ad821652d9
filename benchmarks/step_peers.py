"""The training steps that one composes from `transformers`, for `step.py` and `gpu.py` to set beside ours.

Generator and discriminator are `DebertaV2ForMaskedLM` and `DebertaV2Model`; embeddings are shared by GDES as one summed
table. AdamW is torch's fused one, as in ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model

WEIGHT = 50.0
AS_SHIPPED = "transformers as shipped"
MASKED_HEAD = "transformers, masked head"
COMPILED = "transformers, masked head, compiled"
DISENTANGLED_FLASH = "transformers, masked head, disentangled-flash"


class Batch(NamedTuple):
    """ids and segments [B, L], masked positions [B, K]."""

    ids: Tensor
    segments: Tensor
    masked: Tensor


class Composed(nn.Module):
    """Generator and discriminator from `transformers`, E_D = sg(E_G) + E_delta as one table."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.generator = DebertaV2ForMaskedLM(hf_config(options, options.layers // 2))
        self.discriminator = DebertaV2Model(hf_config(options, options.layers))
        self.discriminator.embeddings.word_embeddings.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros(options.vocab, options.hidden))
        self.norm = nn.LayerNorm(options.hidden)
        width = options.hidden
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    @property
    def table(self) -> Tensor:
        """E_G [V, D]."""
        return self.generator.deberta.embeddings.word_embeddings.weight

    def masked_logits(self, ids: Tensor, batch: Batch, everywhere: bool) -> Tensor:
        """[B * K, V], computed at all positions first or at the masked ones alone."""
        if everywhere:
            logits = self.generator(ids, attention_mask=batch.segments).logits
            return logits.gather(1, batch.masked[..., None].expand(-1, -1, logits.shape[-1])).flatten(0, 1)
        hidden = self.generator.deberta(ids, attention_mask=batch.segments).last_hidden_state
        hidden = hidden.gather(1, batch.masked[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.generator.lm_predictions(hidden, self.generator.deberta.embeddings.word_embeddings).flatten(0, 1)

    def judge(self, ids: Tensor, batch: Batch) -> Tensor:
        """Logits [B, L] of the discriminator."""
        embedded = F.embedding(ids, self.table.detach() + self.delta)
        hidden = self.discriminator(inputs_embeds=embedded, attention_mask=batch.segments).last_hidden_state
        return self.head(self.norm(hidden + hidden[:, :1])).squeeze(-1)


def composed(options: argparse.Namespace, batch: Batch, name: str) -> Callable[[], None]:
    """The step one writes with `transformers`; the way of that name."""
    with torch.device(options.device):
        model = Composed(options)
    model.to(options.device, getattr(torch, options.dtype)).train()
    if name == DISENTANGLED_FLASH:
        from disentangled_flash import enable_deberta_training

        for network in (model.generator.deberta, model.discriminator):
            enable_deberta_training(network, backend="triton")
    masked_logits, judge = model.masked_logits, model.judge
    if name == COMPILED:
        masked_logits, judge = torch.compile(masked_logits), torch.compile(judge)
    own = {id(parameter) for parameter in model.generator.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    optimizers = [torch.optim.AdamW(owned, 1e-4, fused=True) for owned in (model.generator.parameters(), rest)]

    def step() -> None:
        hidden = batch.ids.scatter(1, batch.masked, options.vocab - 100)
        logits = masked_logits(hidden, batch, name == AS_SHIPPED)
        F.cross_entropy(logits.float(), batch.ids.gather(1, batch.masked).flatten()).backward()
        update(optimizers[0])
        drawn = torch.multinomial(logits.detach().float().softmax(-1), 1).view_as(batch.masked)
        corrupted = batch.ids.scatter(1, batch.masked, drawn)
        replaced = (corrupted != batch.ids).float()
        (WEIGHT * F.binary_cross_entropy_with_logits(judge(corrupted, batch).float(), replaced)).backward()
        update(optimizers[1])

    return step


def peers(options: argparse.Namespace, batch: Batch) -> dict[str, Callable[[], Callable[[], None]]]:
    """Each way's name and what builds its step, as far as they run here."""
    names = [MASKED_HEAD, AS_SHIPPED]
    if options.device == "cuda":
        names.append(COMPILED)
        if find_spec("disentangled_flash"):
            names.append(DISENTANGLED_FLASH)
    return {name: lambda name=name: composed(options, batch, name) for name in names}


def update(optimizer: torch.optim.Optimizer) -> None:
    """One AdamW step on fresh gradients."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def hf_config(options: argparse.Namespace, layers: int) -> DebertaV2Config:
    """DeBERTaV3 spelled out for `transformers`, whose defaults are another architecture."""
    return DebertaV2Config(
        vocab_size=options.vocab, hidden_size=options.hidden, num_hidden_layers=layers,
        num_attention_heads=options.hidden // 64, intermediate_size=4 * options.hidden, layer_norm_eps=1e-7,
        max_position_embeddings=512, relative_attention=True, position_buckets=256, max_relative_positions=-1,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False,
        type_vocab_size=0, legacy=False,
    )  # fmt: skip
