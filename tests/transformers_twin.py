"""Small networks for the tests of `model`, and transformers' networks with the same weights to compare them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model

from model.rtd import Discriminator, Generator, Sharing
from pipeline.config import ModelConfig

ROWS, MASK = 128, 100
CONFIG = ModelConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    generator_num_hidden_layers=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=64,
)

# Ours


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks(sharing: Sharing, config: ModelConfig = CONFIG) -> tuple[Generator, Discriminator]:
    return Generator(config, ROWS, MASK, seeded(1)), Discriminator(config, ROWS, sharing, seeded(2))


def shaken(module: nn.Module, std: float = 0.2) -> Any:
    """The module with larger weights, biases and norms included, so that a part left out of a computation shows."""
    rng = seeded(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=std, generator=rng))
    return module.eval()


def text(*lengths: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """One packed row [1, L]: segments of `lengths`, each [CLS] ... [SEP], and padding."""
    rng, ids, segments = seeded(sum(lengths)), [], []
    for number, length in enumerate(lengths, 1):
        ids.append(
            torch.cat([torch.tensor([1]), torch.randint(4, MASK, (length - 2,), generator=rng), torch.tensor([2])])
        )
        segments.append(torch.full((length,), number))
    end = torch.zeros(padding, dtype=torch.long)
    return torch.cat([*ids, end])[None], torch.cat([*segments, end])[None]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two rows of 40: ids, segments, masked positions (-1 where the second row has none left), noise."""
    first, second = text(12, 28), text(9, 20, padding=11)
    ids, segments = (torch.cat(pair) for pair in zip(first, second, strict=True))
    masked = torch.tensor([[1, 5, 10, 13, 30, 38], [2, 7, 10, 27, -1, -1]])
    return ids, segments, masked, torch.rand(2, 6, 2, generator=seeded(0))


# Theirs


def transformers_config(config: ModelConfig, rows: int, num_layers: int) -> DebertaV2Config:
    """The published architecture with every attribute named: transformers fills what is missing with another one."""
    return DebertaV2Config(
        vocab_size=rows,
        hidden_size=config.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        max_position_embeddings=config.max_position_embeddings,
        layer_norm_eps=config.layer_norm_eps,
        position_buckets=config.position_buckets,
        type_vocab_size=0,
        relative_attention=True,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        legacy=False,
        attn_implementation="eager",
    )


def masked_lm_twin(generator: Generator, config: ModelConfig) -> DebertaV2ForMaskedLM:
    """transformers' masked language model with the generator's weights; the mask decoder's table has no place there."""
    weights = {name: value for name, value in generator.state_dict().items() if "position_embeddings" not in name}
    rows = len(generator.deberta.embeddings.word_embeddings.weight)
    twin = DebertaV2ForMaskedLM(transformers_config(config, rows, config.generator_num_hidden_layers))
    twin.load_state_dict(weights, strict=True)
    return twin.eval()


def discriminator_twin(discriminator: Discriminator, generator: Generator, config: ModelConfig) -> DebertaV2Model:
    """transformers' encoder with the weights of the discriminator's and with the word table it would publish."""
    table = discriminator.word_table(generator.deberta.embeddings.word_embeddings.weight).detach()
    weights = discriminator.deberta.state_dict()
    weights = {name: value for name, value in weights.items() if "word_embeddings" not in name}
    twin = DebertaV2Model(transformers_config(config, len(table), config.num_hidden_layers))
    twin.load_state_dict(weights | {"embeddings.word_embeddings.weight": table}, strict=True)
    return twin.eval()


# Both


def gradient_of(parameter: Any) -> Tensor:
    """The gradient of a parameter that must have received one."""
    assert parameter.grad is not None
    return parameter.grad


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients of all parameters by name; each of them must have received one."""
    return {name: gradient_of(parameter).clone() for name, parameter in network.named_parameters()}


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Of the same parameters, and none further apart than 1e-4 of the parameter's largest."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
