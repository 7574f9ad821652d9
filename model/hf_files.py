"""The files of a Hugging Face model directory, local or remote: JSON, tensors and vocabulary out of untrusted bytes.

What a file holds is never executed: safetensors hold no code, and `.bin` files go through
`torch.load(weights_only=True)` alone, which refuses all but tensors. Whatever is damaged, cut short or hostile ends in
one sentence that names the file.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import UserError
from pipeline.storage import Folder, redact
from tokenizer.pieces import load, scored_pieces
from tokenizer.special import MASK_TOKEN

if TYPE_CHECKING:
    from torch import Tensor

_MODEL_TYPE = "deberta-v2"


class HFFiles:
    """The files of one directory.

    Args:
        folder: the directory or URL.
        copies: local directory that receives what is read of a remote one.
    """

    def __init__(self, folder: Folder, copies: Path) -> None:
        self.folder, self.copies = folder, copies

    def where(self, name: str = "") -> str:
        """A file, or the directory, as messages call it."""
        return "/".join(filter(None, (redact(self.folder.url), name)))

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Say what is wrong with a file."""
        raise UserError(f"{self.where(name)}: {problem}")

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self.folder.exists(name)

    def path(self, name: str) -> Path:
        """A local path of a file."""
        if self.folder.is_local:
            return Path(self.folder.path(name))
        copy = self.copies / name.replace("/", "-")
        with self.folder.open(name) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        return copy

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file."""
        try:
            tree = json.loads(self.path(name).read_bytes())
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            self.refuse(name, "not a JSON object; get the checkpoint again")
        return tree

    def config(self, name: str) -> dict[str, Any]:
        """What the config file of a network says, if it is one of a DeBERTa-v2/v3."""
        if not self.has(name):
            self.refuse(
                name,
                "not there; pretrain.init.checkpoint takes a directory that transformers can load, or hf://OWNER/NAME",
            )
        config = self.json(name)
        if (kind := config.get("model_type", _MODEL_TYPE)) != _MODEL_TYPE:
            self.refuse(name, f"says model_type {json.dumps(kind)}; pretrain.init.checkpoint takes {_MODEL_TYPE}")
        return config

    def generator_config(self) -> str | None:
        """The config file of the generator, in our layout or in Microsoft's; None where there is no generator."""
        if self.has("generator/config.json"):
            return "generator/config.json"
        return "generator_config.json" if self.has("pytorch_model.generator.bin") else None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors in a file, or in the shards that an index names."""
        if not name.endswith(".index.json"):
            return self._tensors(name)
        pattern = "*.safetensors" if name.endswith(".safetensors.index.json") else "pytorch_model*.bin"
        index = self.json(name).get("weight_map")
        shards = sorted({str(shard) for shard in index.values()}) if isinstance(index, dict) else []
        found: dict[str, Tensor] = {}
        for shard in shards:
            beside = str(PurePosixPath(name).parent / shard)
            if "/" in shard or not fnmatchcase(shard, pattern) or not self.has(beside):
                self.refuse(name, f"names {shard!r}, which is no file of weights beside it; get the checkpoint again")
            found |= self._tensors(beside)
        return found

    def _tensors(self, name: str) -> dict[str, Tensor]:
        import torch  # only now: configs are checked before any stage runs, and need no torch
        from safetensors.torch import load_file

        path, pickled = self.path(name), name.endswith(".bin")
        try:
            found = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        except Exception:  # whatever the bytes provoke in a parser; nothing in them has been run
            found = None
        if not isinstance(found, dict):
            kind = "a file of plain tensors, which torch.load(weights_only=True) asks for" if pickled else "safetensors"
            self.refuse(name, f"not {kind}: it is damaged, cut short, unreadable or hostile; get the checkpoint again")
        return {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}

    def pieces(self) -> dict[int, str] | None:
        """Id to piece or added token; None without a tokenizer.

        `[MASK]` follows the pieces where no file gives it a place, as `transformers` has it.
        """
        name = next(filter(self.has, ("spm.model", "tokenizer.json")), None)
        if name is None:
            return None
        described = self.json("tokenizer.json") if self.has("tokenizer.json") else {}
        also_added = self.json("added_tokens.json") if self.has("added_tokens.json") else {}
        try:
            if name == "spm.model":
                listed = [piece for piece, _ in scored_pieces(load(self.path(name).read_bytes()))]
            else:
                listed = [str(piece) for piece, _ in described["model"]["vocab"]]
            added = {int(token["id"]): str(token["content"]) for token in described.get("added_tokens") or ()}
            added |= {int(token_id): token for token, token_id in also_added.items()}
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
            self.refuse(name, "not the vocabulary of a SentencePiece unigram model; repair it or take it away")
        found = added | dict(enumerate(listed))
        if MASK_TOKEN not in found.values():
            found.setdefault(len(listed), MASK_TOKEN)
        return found
