"""Stage export: a pretrained checkpoint to two directories that `transformers` loads as they are.

    config.json  model.safetensors             the discriminator: AutoModel, AutoModelFor...
    rtd_head.safetensors                       its replaced-token head, which `transformers` has no class for
    generator/config.json  model.safetensors   the generator: AutoModelForMaskedLM
    generator/position_embeddings.safetensors  what the enhanced mask decoder adds to it, also without a class there
    README.md                                  the model card; tokenizer files stand in both directories

The discriminator's word table is folded here, once: E_G + E_Δ under `gdes`, E_D under `nes`, E_G under `es`
(DeBERTaV3, section 3.3). Under `objective: mlm` the one masked language model stands in both places: its encoder at the
root, the whole of it in `generator/`. `config.json` spells out every attribute, because for most of them the default of
`transformers` is another architecture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.deberta import Deberta
from model.masked_lm import MaskedLM
from model.model_card import CardFacts, model_card
from model.rtd import Discriminator
from pipeline.artifact import Artifact
from pipeline.config import ModelConfig
from pipeline.errors import PipelineError
from pipeline.stage import PartStore, StageRun

TOKENIZER_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "spm.model",
    "tokenizer.json",
    "tokenizer_config.json",
)
_WORD_TABLE = "embeddings.word_embeddings."
_POSITION_TABLE = "deberta.embeddings.position_embeddings.weight"

Content = bytes | dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Pretrained:
    """The networks as the pretrain stage left them, and what its `model.json` says of them.

    `discriminator` is None under `objective: mlm`, and `generator` is as deep as it would be.
    """

    generator: MaskedLM
    discriminator: Discriminator | None
    config: ModelConfig
    record: dict[str, Any]

    @property
    def encoder(self) -> Deberta[Any]:
        """The encoder to publish, but for its word table."""
        return (self.discriminator or self.generator).deberta

    @property
    def word_table(self) -> Tensor:
        """The encoder's effective word embeddings [V, D]."""
        table = self.generator.deberta.embeddings.word_embeddings.weight
        return self.discriminator.word_table(table) if self.discriminator else table


def run(run: StageRun) -> None:
    """Publish the files that are missing, then commit."""
    pretrained, dtype = load_pretrained(run.upstream["pretrain"]), run.config.export.dtype
    files: dict[str, Content] = {**encoder_files(pretrained, dtype), **generator_files(pretrained, dtype)}
    for name, data in tokenizer_files(run.upstream["vocab"], pretrained.record["max_seq_len"]).items():
        files[name] = files[f"generator/{name}"] = data
    files["README.md"] = model_card(_facts(run, pretrained, parameters(files))).encode()
    for path in sorted(files.keys() - run.parts.done().keys()):
        _publish(run.parts, path, files[path], getattr(torch, dtype))
    run.commit({"parameters": parameters(files), "dtype": dtype, "step": pretrained.record["step"]})


def load_pretrained(artifact: Artifact) -> Pretrained:
    """Read the networks of a committed pretrain stage.

    Raises:
        PipelineError: the weights are not those of the networks that `model.json` describes.
    """
    record = json.loads(Path(artifact.fetch("model.json")).read_bytes())
    config = ModelConfig.model_validate(record["model"])
    alone, discriminator = record["objective"] == "mlm", None
    depth = config.num_hidden_layers if alone else config.generator_num_hidden_layers
    with torch.device("meta"):
        generator = MaskedLM(config, depth, record["vocab_rows"], record["mask_id"])
        if not alone:
            discriminator = Discriminator(config, record["vocab_rows"], record["embedding_sharing"])
    _load(generator, artifact.fetch("generator.safetensors"))
    if discriminator:
        _load(discriminator, artifact.fetch("discriminator.safetensors"))
    return Pretrained(generator, discriminator, config, record)


def _load(network: nn.Module, path: str) -> None:
    try:
        network.load_state_dict(load_file(path), assign=True)
    except (RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:200]
        raise PipelineError(f"{path}: not the weights of the network in model.json: {problem}") from None


@torch.no_grad()
def encoder_files(pretrained: Pretrained, dtype: str) -> dict[str, Content]:
    """The encoder's body with one folded word table, and the discriminator's head."""
    left_out = (_WORD_TABLE, "embeddings.position_embeddings.")
    body = {name: t for name, t in pretrained.encoder.state_dict().items() if not name.startswith(left_out)}
    body[f"{_WORD_TABLE}weight"] = pretrained.word_table
    layers = pretrained.config.num_hidden_layers
    described = hf_config(pretrained.config, len(pretrained.word_table), layers, "DebertaV2Model", dtype)
    files: dict[str, Content] = {"config.json": _json(described), "model.safetensors": body}
    if pretrained.discriminator:
        head = pretrained.discriminator.mask_predictions.state_dict()
        files["rtd_head.safetensors"] = {f"mask_predictions.{name}": tensor for name, tensor in head.items()}
    return files


@torch.no_grad()
def generator_files(pretrained: Pretrained, dtype: str) -> dict[str, Content]:
    """The generator with its tied head; its position table goes into a file of its own."""
    tensors, config = pretrained.generator.state_dict(), pretrained.config
    positions = tensors.pop(_POSITION_TABLE, None)
    layers = len(pretrained.generator.deberta.encoder.layers)
    # The head's names are those of the non-legacy class; the legacy one would start from random weights.
    described = hf_config(config, pretrained.record["vocab_rows"], layers, "DebertaV2ForMaskedLM", dtype) | {
        "legacy": False
    }
    files: dict[str, Content] = {"generator/config.json": _json(described), "generator/model.safetensors": tensors}
    if positions is not None:
        files["generator/position_embeddings.safetensors"] = {_POSITION_TABLE: positions}
    return files


def hf_config(config: ModelConfig, vocab_rows: int, num_layers: int, architecture: str, dtype: str) -> dict[str, Any]:
    """Every attribute of `transformers`' DebertaV2Config that makes the architecture; no version, no path."""
    return {
        "architectures": [architecture],
        "model_type": "deberta-v2",
        "dtype": dtype,
        "vocab_size": vocab_rows,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_size": config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "max_relative_positions": -1,
        "position_buckets": config.position_buckets,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
        "pad_token_id": 0,
        "padding_idx": 0,
        "pooler_dropout": 0.0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": config.hidden_size,
        "tie_word_embeddings": True,
        "legacy": True,
    }


def tokenizer_files(vocab: Artifact, max_seq_len: int) -> dict[str, bytes]:
    """The vocabulary's files; the length at which `transformers` cuts a text is the one that was trained on."""
    files = {name: Path(vocab.fetch(name)).read_bytes() for name in TOKENIZER_FILES}
    settings = json.loads(files["tokenizer_config.json"])
    return {**files, "tokenizer_config.json": _json({**settings, "model_max_length": max_seq_len})}


def parameters(files: dict[str, Content]) -> dict[str, int]:
    """How many numbers each file of weights holds."""
    return {
        path: sum(tensor.numel() for tensor in content.values())
        for path, content in sorted(files.items())
        if isinstance(content, dict)
    }


def _facts(run: StageRun, pretrained: Pretrained, counts: dict[str, int]) -> CardFacts:
    vocab, pretrain = run.upstream["vocab"].manifest, run.upstream["pretrain"]
    last: dict[str, Any] = {}
    for line in Path(pretrain.fetch("losses.jsonl")).read_text().splitlines():
        last |= json.loads(line)
    return CardFacts(
        name=run.config.export.model_name,
        languages=sorted(vocab.stats["languages"]),
        pieces=vocab.stats["pieces"],
        steps=pretrained.record["step"],
        max_seq_len=pretrained.record["max_seq_len"],
        model=pretrained.config,
        training=run.config.pretrain,
        parameters=counts,
        losses=last,
        dtype=run.config.export.dtype,
    )


def _publish(parts: PartStore, path: str, content: Content, dtype: torch.dtype) -> None:
    if isinstance(content, bytes):
        parts.publish_bytes(path, content)
        return
    with parts.publish_file(path) as draft:
        tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in content.items()}
        save_file(tensors, draft.path, metadata={"format": "pt"})


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()
