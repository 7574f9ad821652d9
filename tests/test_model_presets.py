"""Every preset's networks, narrowed but as deep and with as many heads, against transformers with the same weights.

One preset keeps its full width too, at which products on CPUs take another way (see `model.modules`).

fp32, on valid tokens: hidden states of the discriminator under gdes and logits of the generator without mask decoder
within 1e-5, gradients of all parameters within 1e-4 of the parameter's largest. Last, what lies beyond
`max_position_embeddings`, where transformers is not the reference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DebertaV2ForMaskedLM, DebertaV2Model
from transformers_twin import (
    assert_same_gradients,
    discriminator_twin,
    gradients_of,
    masked_lm_twin,
    seeded,
    shaken,
)

from model.rtd import Discriminator, Generator
from pipeline.config import ModelConfig
from pipeline.configfile import load, presets

ROWS, MASK = 384, 300
LENGTHS = [8, 64, 128, 200, 512]
GRADIENT_LENGTH = 200
"""Longer rows cost gigabytes in transformers' graph of 24 layers."""
NARROW, FULL = 4, 64
"""Sizes of a head."""
CASES = [*((name, NARROW) for name in presets()), ("deberta_v3_xsmall", FULL)]


class Networks(NamedTuple):
    """Ours, and transformers' with the same weights."""

    config: ModelConfig
    generator: Generator
    discriminator: Discriminator
    generator_twin: DebertaV2ForMaskedLM
    discriminator_twin: DebertaV2Model

    def zero_grad(self) -> None:
        for network in (self.generator, self.discriminator, self.generator_twin, self.discriminator_twin):
            network.zero_grad()


def config(preset: str, head_size: int = NARROW, **changes: object) -> ModelConfig:
    """The preset's with heads of another size: its layers, heads, buckets, distances and constants are kept."""
    model = load(preset).pretrain.model
    width = head_size * model.num_attention_heads
    wide = {"hidden_size": width, "intermediate_size": width * model.intermediate_size // model.hidden_size}
    return model.model_copy(update=wide | changes)


def networks(preset: str, head_size: int = NARROW) -> Networks:
    """With weights about as strong as the preset's own are at full width, and E_Δ and all biases away from zero.

    Much stronger ones make 24 layers forget their input: gradients are then what rounding leaves of cancelling terms.
    """
    plain = config(preset, head_size, enhanced_mask_decoder=False)
    std = 0.1 / math.sqrt(head_size)
    generator = shaken(Generator(plain, ROWS, MASK, seeded(1)), std)
    discriminator = shaken(Discriminator(plain, ROWS, "gdes", seeded(2)), std)
    twins = masked_lm_twin(generator, plain), discriminator_twin(discriminator, generator, plain)
    return Networks(plain, generator, discriminator, *twins)


def named(value: tuple[str, int] | int) -> str:
    """A case or a length, as pytest shows it."""
    if isinstance(value, int):
        return str(value)
    return value[0] if value[1] == NARROW else f"{value[0]} in full width"


@pytest.fixture(scope="module", params=CASES, ids=named)
def preset(request: pytest.FixtureRequest) -> Networks:
    return networks(*request.param)


def rows(length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and segments [1, L] of a full row, and of one that is padded in its last third."""
    for tokens in (length, length - length // 3):
        ids = torch.randint(4, MASK, (1, length), generator=seeded(length + tokens))
        segments = (torch.arange(length) < tokens).long()[None]
        yield ids * segments, segments


def hide(ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """The ids with [MASK] at every sixth token, and these positions [1, K]."""
    positions = torch.arange(1, int(segments.sum()), 6)[None]
    return ids.scatter(1, positions, MASK), positions


def states(ours: Networks, ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """The discriminator's hidden states [L, D], ours and theirs; zero at padding, which both leave undefined."""
    found = ours.discriminator.deberta(ids, segments, ours.generator.word_rows(ids))
    expected = ours.discriminator_twin(ids, attention_mask=segments).last_hidden_state
    return found[0] * segments.mT, expected[0] * segments.mT


def logits(ours: Networks, ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's logits [K, V] at the hidden tokens, ours and theirs."""
    shown, positions = hide(ids, segments)
    head = ours.generator.lm_predictions.lm_head
    vectors = head(ours.generator.masked_states(shown, segments, positions))[0]
    found = vectors @ ours.generator.deberta.embeddings.word_embeddings.weight.T + head.bias
    return found, ours.generator_twin(shown, attention_mask=segments).logits[0, positions[0]]


@pytest.mark.parametrize(
    ("preset", "length"),
    [
        pytest.param(case, length, marks=pytest.mark.slow if length == max(LENGTHS) else ())
        for case in CASES
        for length in LENGTHS
        if length <= config(*case).max_position_embeddings
    ],
    indirect=["preset"],
    ids=named,
)
def test_outputs_equal_those_of_transformers(preset: Networks, length: int) -> None:
    for ids, segments in rows(length):
        with torch.no_grad():
            for found, expected in (states(preset, ids, segments), logits(preset, ids, segments)):
                assert (found - expected).abs().max() <= 1e-5


def test_discriminator_gradients_equal_those_of_transformers(preset: Networks) -> None:
    """E_Δ among them: it receives all that transformers' one table receives."""
    for ids, segments in rows(min(GRADIENT_LENGTH, preset.config.max_position_embeddings)):
        preset.zero_grad()
        for hidden in states(preset, ids, segments):
            (hidden * torch.randn(hidden.shape, generator=seeded(3))).sum().backward()
        expected = gradients_of(preset.discriminator_twin)
        expected["embeddings.word_embeddings.delta"] = expected.pop("embeddings.word_embeddings.weight")
        assert_same_gradients(gradients_of(preset.discriminator.deberta), expected)


def test_generator_loss_and_gradients_equal_those_of_transformers(preset: Networks) -> None:
    for ids, segments in rows(min(GRADIENT_LENGTH, preset.config.max_position_embeddings)):
        preset.zero_grad()
        shown, positions = hide(ids, segments)
        found = preset.generator(ids, segments, positions, torch.rand(*positions.shape, 2)).loss_sum
        theirs = preset.generator_twin(shown, attention_mask=segments).logits[0, positions[0]]
        expected = F.cross_entropy(theirs, ids[0, positions[0]], reduction="sum")
        assert abs(found - expected) <= 1e-5 * positions.numel()
        found.backward()
        expected.backward()
        assert_same_gradients(gradients_of(preset.generator), gradients_of(preset.generator_twin))


# Rows longer than max_position_embeddings


@pytest.mark.parametrize(("name", "length"), [("mdeberta_v3_base", 700), ("demo", 200)])
def test_keys_too_far_ahead_share_the_last_bucket_where_transformers_reads_an_untrained_row(
    name: str, length: int
) -> None:
    """We clamp distances as the published training code does: keys 511 ahead and farther read row 1 of the table.

    transformers reads row 0 from 512 on, which no row of up to 512 tokens ever trains (recipe 5.2). The two agree as
    soon as that row is a copy of row 1.
    """
    ours = networks(name)
    assert length > ours.config.max_position_embeddings
    ids, segments = next(rows(length))
    with torch.no_grad():
        found, expected = states(ours, ids, segments)
        assert (found - expected).abs().max() > 1e-4
        table = ours.discriminator_twin.encoder.rel_embeddings.weight
        table[0] = table[1]
        found, expected = states(ours, ids, segments)
        assert (found - expected).abs().max() <= 1e-5


def test_masked_tokens_beyond_the_table_of_places_read_its_last_row() -> None:
    demo = config("demo")
    longest, length = demo.max_position_embeddings, 200
    short = shaken(Generator(demo, ROWS, MASK, seeded(1)))
    table = short.deberta.embeddings.position_embeddings.weight.detach()
    extended = copy.deepcopy(short)
    extended.deberta.embeddings.position_embeddings = nn.Embedding.from_pretrained(
        torch.cat([table, table[-1:].expand(length - longest, -1)]), freeze=False
    )
    for ids, segments in rows(length):
        positions = hide(ids, segments)[1]
        noise = torch.rand(*positions.shape, 2, generator=seeded(4))
        found, expected = (network(ids, segments, positions, noise) for network in (short, extended))
        assert positions.max() >= longest
        assert found.loss_sum.equal(expected.loss_sum) and found.sampled.equal(expected.sampled)
