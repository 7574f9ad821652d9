"""How learning rates and the batch change over a run: closed forms of the step, so that there is nothing to save.

A rate rises linearly over the warm-up and falls to zero at the last step, on a line or half a cosine. A batch grows
from its first size to the whole one in equal jumps, as evenly over its warm-up as whole steps allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.config import PretrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a network: its peak, and the share of it at a step."""

    peak: float
    warmup_steps: int
    steps: int
    shape: str

    def rate(self, step: int) -> float:
        """The rate of update `step`, from 0; continuous, and at most the peak."""
        rising = (step + 1) / self.warmup_steps if self.warmup_steps else math.inf
        left = min(1.0, (self.steps - step) / max(1, self.steps - self.warmup_steps))
        falling = left if self.shape == "linear" else (1 - math.cos(math.pi * left)) / 2
        return self.peak * min(1.0, rising, falling)


def schedules(config: PretrainConfig) -> dict[str, Schedule]:
    """The schedule of each network by its name."""
    own = config.discriminator
    generator = Schedule(config.learning_rate, config.warmup_steps, config.steps, config.schedule)
    discriminator = Schedule(
        own.learning_rate or config.learning_rate,
        config.warmup_steps if own.warmup_steps is None else own.warmup_steps,
        config.steps,
        own.schedule or config.schedule,
    )
    return {"generator": generator, "discriminator": discriminator}


class BatchSizes:
    """Rows of every step, and how many rows all steps before it have.

    The batch is as many times its first size as jumps lie behind; the first of g jumps is at step 0 and the last at the
    end of the warm-up, jump j at ceil(j * warm-up / (g - 1)). O(g) for any step.
    """

    def __init__(self, config: PretrainConfig) -> None:
        jumps = config.global_batch // config.first_batch
        places = np.arange(jumps, dtype=np.int64) * config.batch_warmup_steps
        self._first = config.first_batch
        self._jumps = -(-places // max(1, jumps - 1))

    def rows(self, step: int) -> int:
        """Rows of a step, from 0."""
        return self._first * int(np.count_nonzero(self._jumps <= step))

    def rows_before(self, step: int) -> int:
        """Rows of all the steps before a step."""
        return self._first * int(np.maximum(step - self._jumps, 0).sum())
