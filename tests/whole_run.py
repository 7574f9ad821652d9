"""A whole run in small, and kills at random moments of each of its stages: for the quick tests and for the torture."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

from support import kill_at_work, mdeberta, tree

from pipeline.stages import STAGES

SMALL = [
    "corpus.inputs=['package://demo/corpus/am.txt.xz', 'package://demo/corpus/sw.txt.xz', 'package://demo/corpus/yo.txt.xz']",
    "corpus.shard_mb=0.04", "corpus.chunk_mb=0.02", "vocab.size=400", "vocab.sample_mb=0.1", "tokens.max_seq_len=64",
    "pretrain.steps=24", "pretrain.global_batch=8", "pretrain.micro_batch=4", "pretrain.checkpoint_every=4",
    "pretrain.validate_every=8", "pretrain.validation_rows=8", "pretrain.model.hidden_size=32",
    "pretrain.launcher.threads=1",
    "pretrain.model.num_hidden_layers=2", "pretrain.model.num_attention_heads=2", "pretrain.model.intermediate_size=64",
    "xnli.max_train_pairs=96", "xnli.max_eval_pairs=32", "xnli.batch_size=8", "xnli.epochs=1",
]  # fmt: skip


def small(work: Path) -> list[str]:
    """The arguments that name the small run in a work directory."""
    return ["-c", "demo", *(word for key in [f"work_dir={work}", *SMALL] for word in ("--set", key))]


class Undisturbed:
    """The small run without any kill: its directories and how long each stage took."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.seconds: dict[str, float] = {}
        for stage in STAGES:
            began = time.monotonic()
            mdeberta("run", *small(work), stage)
            self.seconds[stage] = time.monotonic() - began

    def committed(self, stage: str, work: Path | None = None) -> dict[str, str]:
        """Digests of a stage's committed files, manifest included, by path."""
        (directory,) = ((work or self.work) / stage).iterdir()
        listed = {part["path"] for part in json.loads((directory / "MANIFEST.json").read_bytes())["parts"]}
        return {
            path: digest for path, digest in tree(directory).items() if path in listed | {"MANIFEST.json", "STAGE.json"}
        }

    def kill_and_finish(self, stage: str, work: Path, kills: int, dice: random.Random, workers: int = 1) -> None:
        """Kill the stage `kills` times at random moments while it is at work, then let it finish."""
        for upstream in STAGES:
            if upstream == stage:
                break
            shutil.copytree(self.work / upstream, work / upstream, dirs_exist_ok=True)
        keys = [f"{section}.workers={workers}" for section in ("corpus", "tokens")]
        command = ["run", *small(work), *(word for key in keys for word in ("--set", key)), stage]
        self.seconds[stage] = kill_at_work(kills, self.seconds[stage], dice, work / stage, *command)
        mdeberta(*command)

    def uncounted(self) -> list[str]:
        """Input files of which not every document was kept, dropped or rejected."""
        (manifest,) = (self.work / "corpus").glob("*/MANIFEST.json")
        inputs = json.loads(manifest.read_bytes())["stats"]["inputs"]
        return [
            name
            for name, counts in inputs.items()
            if counts["documents_in"]
            != counts["kept"] + sum((*counts["dropped"].values(), *counts["rejected"].values()))
        ]

    def stray_files(self, work: Path) -> list[str]:
        """Temporary files that are left."""
        return [name for name in tree(work) if ".tmp." in name or "/_work/" in name or "/_parts/" in name]
