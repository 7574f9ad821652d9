"""A training step through DeepSpeed's ZeRO-1 on one process beside a hand-written loop of the same networks.

    python benchmarks/zero.py [--layers 12 --hidden 384 --length 256 --rows 8 --vocab 64000 --threads 2]
    python benchmarks/zero.py --precision bf16 --hidden 768 --length 512 --rows 64 --vocab 251000       on a GPU

Both send the same masked rows through `model.update.Decoupled`; the loop's engine is torch alone: backward, clipping by
the norm, fused AdamW. The difference is what partitioning costs where there is nothing to partition.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from turns import compare

from model import update
from model.batch import MicroBatch, Totals
from model.engine import Engine, parameter_groups
from model.masking import Masking
from model.phases import Phases
from model.place import settle
from model.schedule import Schedule
from model.vocabulary import Vocabulary
from model.world import World, join
from pipeline.config import PretrainConfig


class HandWritten:
    """What one writes without DeepSpeed, in the shape of `model.engine.Engine`."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        schedules: dict[str, Schedule],
        max_grad_norm: float,
        config: PretrainConfig,
        world: World,
        *_: Any,
    ) -> None:
        self.name, self.loss_scale = name, None
        self._module, self._norm, self._max_norm = module.to(world.device), torch.zeros(()), max_grad_norm
        self._low = {"bf16": torch.bfloat16, "fp32": None}[config.precision]
        groups = parameter_groups(module, "", config.weight_decay)
        betas = (config.adam_beta1, config.adam_beta2)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_epsilon, fused=True)
        self._schedule = schedules[""]

    def __call__(self, *inputs: Any) -> Any:
        """Autocast is how a plain loop computes in bf16 with fp32 weights."""
        with torch.autocast(next(self._module.parameters()).device.type, self._low, enabled=self._low is not None):
            return self._module(*inputs)

    def learn(self, loss: Tensor, last: bool) -> None:
        """Backward pass; after the last one the update."""
        loss.backward()
        if last:
            self._norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._max_norm, foreach=True)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def set_learning_rates(self, step: int) -> None:
        """As `Engine`."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(step)

    def gradient_norm(self) -> float:
        """As `Engine`."""
        return float(self._norm)


def stepper(options: argparse.Namespace, world: World, engine: type) -> Callable[[], None]:
    """A function that takes one step."""
    config = PretrainConfig.model_validate(
        {
            "global_batch": options.rows,
            "micro_batch": options.rows,
            "precision": options.precision,
            "zero_stage": 1,
            "steps": 1_000_000,
            "model": {
                "hidden_size": options.hidden,
                "num_hidden_layers": options.layers,
                "num_attention_heads": max(1, options.hidden // 64),
                "intermediate_size": 4 * options.hidden,
                "generator_num_hidden_layers": options.layers // 2,
                "max_position_embeddings": options.length,
                "position_buckets": min(256, options.length // 2),
                "vocab_size": options.vocab,
            },
        }
    )
    mask_id = options.vocab - 100
    masking = Masking(config, mask_id, np.ones(mask_id, dtype=bool))
    vocabulary = Vocabulary(["piece"] * mask_id, options.vocab)
    update.Engine = engine  # type: ignore[misc, assignment]
    networks = update.Decoupled(config, vocabulary, masking, world, Phases(world.device), None, {})
    ids = torch.randint(4, mask_id, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids, torch.ones_like(ids), torch.arange(options.rows), ("train", 0, 0))
    totals = Totals(int(masking.count(ids).sum()), ids.numel())

    def step() -> None:
        for number in range(options.steps):
            networks.take(number, [batch], totals)
            networks.phases.discard()
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    step()
    return step


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "hidden": 384, "length": 256, "rows": 8, "vocab": 64_000, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = join(settle(), stall_seconds=600)
    ways = {"ZeRO-1": stepper(options, world, Engine), "hand-written": stepper(options, world, HandWritten)}
    tokens = options.steps * options.rows * options.length / 1e3
    compare(f"step, {options.precision}", "ZeRO-1", ways, tokens, "k tokens", rounds=options.rounds)


if __name__ == "__main__":
    main()
