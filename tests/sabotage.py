"""What goes wrong in a training process on purpose: poisoned samples, failing disks, a clock that jumps."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

from faults import fail_with, watched

Sabotage = Callable[[int], None]

_open: list[Any] = []  # patches last as long as their process


def poison(rank: int, slots: tuple[int, ...], factor: float) -> None:
    """The losses of a step that reads one of these samples, on whichever process, are multiplied, gradients too."""
    import torch

    from model.batch import SUMS
    from model.engine import Engine
    from model.update import Outcome, Update

    take, learn = Update.take, Engine.learn
    losses = torch.tensor([factor if name.endswith("loss") else 1.0 for name in SUMS], dtype=torch.float64)
    struck = [False]

    def taking(self: Update, step: int, batches: list[Any], totals: Any) -> Outcome:
        mine = any(slot in batch.slots.tolist() for batch in batches for slot in slots)
        struck[0] = bool(self.world.sum(torch.tensor(int(mine))))
        outcome = take(self, step, batches, totals)
        return outcome._replace(sums=outcome.sums * losses) if struck[0] else outcome

    def learning(self: Engine, loss: Any, last: bool) -> None:
        learn(self, loss * factor if struck[0] else loss, last)

    Update.take, Engine.learn = taking, learning  # type: ignore[method-assign]


def jumping_clock(rank: int) -> None:
    """The time of day jumps back and forth by up to a month from one look to the next."""
    import time

    real, jumps = time.time, itertools.cycle([0.0, -86_400.0, 2_600_000.0, 3_600.0])
    time.time = lambda: real() + next(jumps)


def die_at(rank: int, victim: int, number: int) -> None:
    """One rank ends by `kill -9` at the n-th point that it passes in publishing checkpoints."""
    if rank == victim:
        _from_point(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_at(rank: int, victim: int, number: int, code: int) -> None:
    """From the n-th point on that one rank passes in publishing checkpoints, its disk refuses all of them."""
    if rank == victim:
        _from_point(number, fail_with(code))


def _from_point(number: int, act: Callable[[], None]) -> None:
    count = itertools.count(1)

    def look() -> None:
        if passed[-1].file == "a checkpoint" and next(count) >= number:
            act()

    _open.append(watched(0, look))
    passed = _open[-1].__enter__()
