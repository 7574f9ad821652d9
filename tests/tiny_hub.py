"""Checkpoints as `transformers` and Microsoft leave them, and our networks started from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import tiny_model
import torch
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model

from model.export import hf_config
from model.hf_checkpoint import read_checkpoint
from model.rtd import Discriminator, Generator
from model.warm_start import warm_start_rtd
from pipeline.config import Config

SHARINGS = ["gdes", "nes", "es"]
WORDS = "embeddings.word_embeddings.weight"
LAYERS: int = tiny_model.ARCHITECTURE["num_hidden_layers"]
GENERATOR_LAYERS: int = tiny_model.ARCHITECTURE["generator_num_hidden_layers"]
ROWS = tiny_model.vocab_rows()


def run_pieces() -> list[str]:
    """The run's vocabulary as `spm.vocab` lists it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tiny_model.tokenizer()["spm.model"])
    return [processor.id_to_piece(number) for number in range(len(processor))]


def settings(folder: Path, **pretrain: Any) -> Config:
    return tiny_model.config(folder / "run", pretrain=pretrain)


def drawn(config: Config, seed: int = 3) -> tuple[Generator, Discriminator]:
    """Both networks as a run draws them."""
    training, rng = config.pretrain, torch.Generator().manual_seed(seed)
    generator = Generator(training.model, ROWS, tiny_model.PIECES, rng)
    return generator.eval(), Discriminator(training.model, ROWS, training.embedding_sharing, rng).eval()


def started(config: Config, url: Path | str, options: Any = None) -> tuple[Generator, Discriminator]:
    """Both networks after the warm start."""
    generator, discriminator = drawn(config)
    warm_start_rtd(generator, discriminator, read_checkpoint(str(url), options or {}), config.pretrain, run_pieces())
    return generator, discriminator


def saved(folder: Path, kind: Any = DebertaV2Model, layers: int = LAYERS, **changes: Any) -> Any:
    """A model with random weights that `transformers` saves into a folder."""
    described = hf_config(settings(folder.parent).pretrain.model, ROWS, layers, kind.__name__, "float32")
    torch.manual_seed(layers)
    network = kind(DebertaV2Config(**{**described, "initializer_range": 0.2, **changes})).eval()
    network.save_pretrained(folder)
    return network


def save_as_bin(folder: Path, tensors: Any, name: str = "pytorch_model.bin") -> None:
    """Leave the weights in PyTorch's own format alone."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    torch.save(tensors, folder / name)


def add_tokenizer(folder: Path, files: dict[str, bytes] | None = None) -> None:
    for name, data in (files or tiny_model.tokenizer()).items():
        (folder / name).write_bytes(data)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, tiny_model.PIECES, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) < torch.tensor([40, 23])[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def hidden_states(generator: Generator, discriminator: Discriminator) -> Tensor:
    ids, mask = batch()
    return discriminator.deberta(ids, mask, generator.word_rows(ids))[mask.bool()]


@torch.no_grad()
def hidden_states_of(network: Any) -> Tensor:
    ids, mask = batch()
    return network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][mask.bool()]


def published(tmp_path: Path) -> Path:
    """A discriminator and its generator in the layout of Microsoft's repositories."""
    folder = tmp_path / "hub"
    network = saved(folder)
    other = saved(tmp_path / "other", DebertaV2ForMaskedLM, GENERATOR_LAYERS, legacy=False)
    shared, table = other.deberta.embeddings.word_embeddings.weight, network.embeddings.word_embeddings.weight
    tensors = {f"deberta.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors["deberta.embeddings.word_embeddings._weight"] = (table - shared).detach()
    tensors["deberta.embeddings.word_embeddings.weight"] = (table + 0.01).detach().half()  # a step behind
    tensors["deberta.embeddings.position_embeddings.weight"] = torch.ones(160, 32)
    head = drawn(settings(tmp_path), seed=8)[1].mask_predictions
    tensors |= {f"mask_predictions.{name}": tensor for name, tensor in head.state_dict().items()}
    save_as_bin(folder, tensors)
    places = {"deberta.embeddings.position_embeddings.weight": torch.full((160, 32), 2.0)}
    save_as_bin(folder, {**other.state_dict(), **places}, "pytorch_model.generator.bin")
    save_as_bin(folder, tensors)
    shutil.copy(tmp_path / "other" / "config.json", folder / "generator_config.json")
    (folder / "spm.model").write_bytes(tiny_model.tokenizer()["spm.model"])
    return folder
