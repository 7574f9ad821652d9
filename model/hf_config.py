"""Does a `config.json` of `transformers` describe the network that `pretrain.model` builds?

Keys that are absent count as what `transformers` takes for them. For most of them that is another architecture, which
it would build without a word.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from model.hf_files import HFFiles
from pipeline.config import Config, ModelConfig, PretrainConfig
from pipeline.errors import UserError
from pipeline.storage import Folder


class Described(Protocol):
    """A stored network, as far as its config file goes."""

    @property
    def where(self) -> str:
        """The config file, for messages."""

    @property
    def config(self) -> dict[str, Any]:
        """What it says."""


D = TypeVar("D", bound=Described)
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


class _ConfigFile(NamedTuple):
    where: str
    config: dict[str, Any]


def preflight(config: Config) -> None:
    """Compare the config files of `pretrain.init.checkpoint` with the run's; weights and vocabulary have to wait.

    Raises:
        UserError: naming everything that differs, or the file that is not there.
    """
    source = config.pretrain.init.checkpoint
    if source is None:
        return
    with tempfile.TemporaryDirectory(prefix="mdeberta-") as copies:
        files = HFFiles(Folder(source.rstrip("/"), config.storage_options), Path(copies))
        encoder, name = _config_file(files, "config.json"), files.generator_config()
        generator = _config_file(files, name) if name else None
    check_architecture(config.pretrain.model, networks_to_take(config.pretrain, encoder, generator))


def _config_file(files: HFFiles, name: str) -> _ConfigFile:
    return _ConfigFile(files.where(name), files.config(name))


def networks_to_take(training: PretrainConfig, encoder: D, generator: D | None) -> dict[DepthKey, D]:
    """The stored networks that a run starts from, by the key of their depth.

    Under `objective: mlm` that is the generator if it is as deep as the run's network, which an export of `mlm` is.
    """
    if generator is None:
        return {"num_hidden_layers": encoder}
    if training.objective == "rtd":
        return {"num_hidden_layers": encoder, "generator_num_hidden_layers": generator}
    as_deep = generator.config.get("num_hidden_layers") == training.model.num_hidden_layers
    return {"num_hidden_layers": generator if as_deep else encoder}


def check_architecture(model: ModelConfig, networks: dict[DepthKey, D]) -> None:
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


def _problems(model: ModelConfig, depth: DepthKey, network: Described) -> list[str]:
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
