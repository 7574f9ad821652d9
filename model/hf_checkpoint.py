"""A Hugging Face DeBERTa-v2/v3 directory or URL, read into plain fp32 tensors under this project's names.

    config.json  model.safetensors | pytorch_model.bin      the encoder, whatever head it has
    rtd_head.safetensors  position_embeddings.safetensors   what `transformers` has no class for; from `model.export`
    generator/config.json  generator/...                    the generator, laid out like the encoder; from there too
    generator_config.json  pytorch_model.generator.bin      the generator as Microsoft publishes it
    spm.model | tokenizer.json  added_tokens.json           the vocabulary

Weights may be split into shards. Where both formats are there, safetensors is read.

A tensor keeps the name that its class in `model.rtd` has for it. Others are renamed, or left out:

| stored                                            | here                        |
|---------------------------------------------------|-----------------------------|
| `embeddings.*`, `encoder.*` (DebertaV2Model)      | `deberta.*`                 |
| `cls.predictions.{transform.*,bias}` (legacy)     | `lm_predictions.lm_head.*`  |
| `...word_embeddings._weight` (Microsoft's E_Δ)    | added to the generator's E_G|
| classifiers, poolers, tied copies                 |                             |
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.hf_files import HFFiles
from pipeline.errors import UserError
from pipeline.storage import Folder

WORDS = "deberta.embeddings.word_embeddings.weight"
_DELTA = "deberta.embeddings.word_embeddings._weight"
_LM_HEAD = "lm_predictions.lm_head."
_KEPT = ("deberta.embeddings.", "deberta.encoder.", _LM_HEAD, "mask_predictions.")
_RENAMED = {
    "embeddings.": "deberta.embeddings.",
    "encoder.": "deberta.encoder.",
    "cls.predictions.transform.": _LM_HEAD,
    "cls.predictions.bias": f"{_LM_HEAD}bias",
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SIDE_FILES = ("rtd_head.safetensors", "position_embeddings.safetensors")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StoredNetwork:
    """One network of a checkpoint.

    Args:
        where: its config file, for messages.
        config: what that says.
        tensors: fp32 and finite, under the names of `Discriminator` and `Generator`; the word table is among them.
    """

    where: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class HFCheckpoint:
    """What a directory holds.

    Args:
        where: the directory, for messages.
        encoder: the network that `AutoModel` would load; its word table is E_D, its heads are those it was saved with.
        generator: None where there is none.
        pieces: id to piece, special tokens and added ones included; None where there is no tokenizer.
    """

    where: str
    encoder: StoredNetwork
    generator: StoredNetwork | None
    pieces: dict[int, str] | None


def read_checkpoint(url: str, options: dict[str, dict[str, Any]]) -> HFCheckpoint:
    """Read a checkpoint.

    Args:
        url: local directory or fsspec URL.
        options: fsspec options by protocol; never shown.

    Raises:
        UserError: something is missing, damaged, or not what its name says.
    """
    with tempfile.TemporaryDirectory(prefix="mdeberta-") as copies:
        files = HFFiles(Folder(url.rstrip("/"), options), Path(copies))
        try:
            generator = _generator(files)
            encoder = _network(files, "config.json", _WEIGHTS, _SIDE_FILES, generator)
            return HFCheckpoint(files.where(), encoder, generator, files.pieces())
        except OSError as error:
            raise UserError(
                f"{files.where()}: cannot be read ({error.strerror or type(error).__name__}); check "
                "pretrain.init.checkpoint and its permissions"
            ) from None


def _generator(files: HFFiles) -> StoredNetwork | None:
    """The generator, in our layout or in Microsoft's."""
    config_name = files.generator_config()
    if config_name is None:
        return None
    if config_name.startswith("generator/"):
        weights = tuple(f"generator/{name}" for name in _WEIGHTS)
        return _network(files, config_name, weights, ("generator/position_embeddings.safetensors",))
    return _network(files, config_name, ("pytorch_model.generator.bin",))


def _network(
    files: HFFiles,
    config_name: str,
    weights: tuple[str, ...],
    side_files: tuple[str, ...] = (),
    generator: StoredNetwork | None = None,
) -> StoredNetwork:
    """One network: its config, the first of its possible weight files that is there, and the files beside that."""
    config = files.config(config_name)
    main = next(filter(files.has, weights), None)
    if main is None:
        files.refuse(config_name, f"no weights are with it: neither {' nor '.join(weights)}")
    tensors: dict[str, Tensor] = {}
    for name in (main, *filter(files.has, side_files)):
        tensors |= _plain(files, name)
    tensors = _folded(files, main, tensors, generator)
    if config.get("tie_word_embeddings") is False and any(name.startswith(_LM_HEAD) for name in tensors):
        _log.info("warm start: %s: its LM head has an output layer of its own; left out", files.where(main))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_LM_HEAD)}
    return StoredNetwork(files.where(config_name), config, tensors)


def _plain(files: HFFiles, name: str) -> dict[str, Tensor]:
    """The tensors of a file that mean something here, under our names, in fp32."""
    kept, ignored = {}, []
    for stored, tensor in files.tensors(name).items():
        prefix = next(filter(stored.startswith, _RENAMED), "")
        ours = _RENAMED.get(prefix, "") + stored.removeprefix(prefix)
        if not ours.startswith(_KEPT) or ours.endswith("position_ids"):
            ignored.append(stored)
        elif tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            files.refuse(name, f"{stored} is {tensor.dtype}; save the checkpoint in float32, float16 or bfloat16")
        elif ours == WORDS and tensor.ndim != 2:
            files.refuse(name, f"{stored} has {tensor.ndim} dimensions, and a table has 2; get the checkpoint again")
        elif not tensor.isfinite().all():
            files.refuse(name, f"{stored} holds NaN or infinity; take a checkpoint from before it diverged")
        else:
            kept[ours] = tensor.detach().float()
    if ignored:
        _log.debug("warm start: %s: ignored %s", files.where(name), ", ".join(sorted(ignored)))
    return kept


def _folded(
    files: HFFiles, name: str, tensors: dict[str, Tensor], generator: StoredNetwork | None
) -> dict[str, Tensor]:
    """One word table: E_G + E_Δ where Microsoft's code left E_Δ; the sum that it left beside it is one step older."""
    delta = tensors.pop(_DELTA, None)
    if delta is not None and generator is not None:
        shared = generator.tensors[WORDS]
        if shared.shape != delta.shape:
            shapes = f"{list(delta.shape)}, but the generator's table is {list(shared.shape)}"
            files.refuse(name, f"its embedding delta is {shapes}; get both files of one model")
        return {**tensors, WORDS: shared + delta}
    if WORDS in tensors:
        return tensors
    if delta is None:
        files.refuse(name, "has no embeddings.word_embeddings.weight; name a DeBERTa encoder")
    files.refuse(
        name,
        "holds the embedding delta word_embeddings._weight, but neither the table nor the generator it adds to: "
        "put pytorch_model.generator.bin and generator_config.json beside it",
    )
