"""A small pretraining project: real tokens, a tiny model, and what one does to its run from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from support import mdeberta, start

CONFIG: dict[str, Any] = {
    "corpus": {"inputs": [f"package://demo/corpus/{name}.txt.xz" for name in ("de", "en", "sw")], "max_chars": 3000},
    "vocab": {"size": 500, "sample_mb": 0.1, "num_threads": 1},
    "tokens": {"max_seq_len": 32, "validation_fraction": 0.05},
    "pretrain": {
        "steps": 24,
        "global_batch": 16,
        "micro_batch": 4,
        "learning_rate": 0.005,
        "warmup_steps": 2,
        "precision": "fp32",
        "validate_every": 8,
        "validation_rows": 12,
        "checkpoint_every": 5,
        "trackers": [],
        "launcher": {"threads": 1},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "generator_num_hidden_layers": 2,
            "max_position_embeddings": 32,
            "position_buckets": 16,
        },
    },
}
RESULTS = ("losses.jsonl", "generator.safetensors", "discriminator.safetensors", "model.json", "MANIFEST.json")
SHORT = ("steps=6", "checkpoint_every=3", "validate_every=3")


class Project:
    """A directory with a config and real tokens, ready to be pretrained on."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.config = folder / "conf.yaml"

    def arguments(self, *changes: str) -> list[str]:
        """Config and overrides of the section pretrain, as the command line wants them."""
        keys = [f"work_dir={self.work}", *(f"pretrain.{change}" for change in changes)]
        return ["-c", str(self.config), *(word for key in keys for word in ("--set", key))]

    def train(self, *changes: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return mdeberta("run", *self.arguments(*changes), "pretrain", expect=expect)

    def start(self, *changes: str) -> subprocess.Popen[str]:
        return start("run", *self.arguments(*changes), "pretrain")

    @property
    def stage(self) -> Path:
        (found,) = (self.work / "pretrain").iterdir()
        return found

    def results(self) -> dict[str, bytes]:
        return {name: (self.stage / name).read_bytes() for name in RESULTS if (self.stage / name).exists()}

    def lines(self, name: str = "losses.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.stage / name).read_text().splitlines()]

    def last_step(self) -> int:
        """The last whole line of the metrics, 0 before the first."""
        lines = [line for path in self.work.glob("pretrain/*/metrics.jsonl") for line in path.read_bytes().split(b"\n")]
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0

    def checkpoints(self) -> set[str]:
        return {path.parent.name for path in self.stage.glob("checkpoints/*/COMMITTED.json")}

    def has_checkpoint(self, step: int) -> bool:
        return any(self.work.glob(f"pretrain/*/checkpoints/step-{step}/COMMITTED.json"))

    def kill_after_checkpoint(self, step: int, *changes: str) -> None:
        """Run until a checkpoint is there, then `kill -9` the whole process group."""
        process = self.start(*changes)
        wait_until(lambda: self.has_checkpoint(step), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        """Return when a run at work has logged a step."""
        end = time.monotonic() + seconds
        while self.last_step() < step and time.monotonic() < end:
            time.sleep(0.005)

    def forget_training(self) -> None:
        """Remove the stage's directory."""
        shutil.rmtree(self.work / "pretrain")

    def rewind(self, step: int) -> None:
        """Put the stage back to where a run killed some time after this step's checkpoint would have left it."""
        for name in RESULTS:
            (self.stage / name).unlink(missing_ok=True)
        for path in self.stage.glob("checkpoints/*"):
            if path.name != f"step-{step}":
                shutil.rmtree(path)


def copy_of(tokens: Path, folder: Path) -> Project:
    shutil.copytree(tokens, folder)
    return Project(folder)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for something that a running command brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits to be reaped does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
