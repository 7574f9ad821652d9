"""Does a `config.json` of `transformers` describe the network that `pretrain.model` builds?

Keys that are absent count as what `transformers` takes for them. For most of them that is another architecture, which
it would build without a word.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from model.hf_checkpoint import StoredNetwork
from pipeline.config import ModelConfig
from pipeline.errors import UserError

DepthKey = Literal["num_hidden_layers", "generator_num_hidden_layers"]

_SHAPES = {
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "max_position_embeddings": 512,
    "position_buckets": -1,
    "layer_norm_eps": 1e-7,
}
"""Keys that have the same name in `pretrain.model`, with their defaults in `transformers`."""

_V3: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("gelu", "gelu"),
    "relative_attention": (True, False),
    "position_biased_input": (False, True),
    "share_att_key": (True, False),
    "norm_rel_ebd": ("layer_norm", "none"),
    "type_vocab_size": (0, 0),
    "conv_kernel_size": (0, 0),
}
"""What is the same in every DeBERTaV3, with the defaults in `transformers`."""


def check_architecture(model: ModelConfig, networks: dict[DepthKey, StoredNetwork]) -> None:
    """Compare stored networks with `pretrain.model`; dropout and initialisation may differ.

    Args:
        model: of the run.
        networks: by the key of their depth.

    Raises:
        UserError: naming everything that differs.
    """
    problems = [problem for key, network in networks.items() for problem in _problems(model, key, network)]
    if problems:
        raise UserError(
            f"{'; '.join(problems)}: change pretrain.model, or let pretrain.init.checkpoint name a model of its shape"
        )


def _problems(model: ModelConfig, depth: DepthKey, network: StoredNetwork) -> list[str]:
    config, where = network.config, network.where
    found = []
    for key, (needed, default) in _V3.items():
        if (value := config.get(key, default)) != needed:
            found.append(f"{where} {_says(config, key, value)} where DeBERTaV3 has {json.dumps(needed)}")
    terms = config.get("pos_att_type")
    if not {"c2p", "p2c"} <= _terms(terms):
        found.append(f'{where} {_says(config, "pos_att_type", terms)} where DeBERTaV3 has ["p2c", "c2p"]')

    heads = model.hidden_size // model.num_attention_heads
    expected: list[tuple[str, str, Any, Any]] = [(depth, "num_hidden_layers", getattr(model, depth), 24)]
    expected += [(key, key, getattr(model, key), default) for key, default in _SHAPES.items()]
    expected += [
        ("hidden_size", "embedding_size", model.hidden_size, model.hidden_size),
        ("hidden_size / num_attention_heads", "attention_head_size", heads, heads),
    ]
    reach = config.get("max_relative_positions", -1)
    if reach not in (-1, 0):  # these two stand for max_position_embeddings
        expected.append(("max_position_embeddings", "max_relative_positions", model.max_position_embeddings, reach))
    for ours, theirs, needed, default in expected:
        if (value := config.get(theirs, default)) != needed:
            found.append(f"pretrain.model.{ours} is {needed} but {where} {_says(config, theirs, value, ours)}")
    return found


def _terms(value: Any) -> set[str]:
    """`pos_att_type` is a list or, in older files, one string like "p2c|c2p"."""
    listed = value.lower().split("|") if isinstance(value, str) else value if isinstance(value, list) else ()
    return {str(term).strip() for term in listed}


def _says(config: dict[str, Any], key: str, value: Any, known_as: str = "") -> str:
    shown = json.dumps(value)
    if key not in config:
        return f"leaves {key} to transformers, which takes {shown}"
    return f"says {shown}" if key == known_as else f"says {key} {shown}"
