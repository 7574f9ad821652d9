"""What goes wrong in a training process on purpose: poisoned samples, failing disks, a clock that jumps, a stop."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import fail_with, watched
from support import flip_bit

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
    real, jumps = time.time, itertools.cycle([0.0, -86_400.0, 2_600_000.0, 3_600.0])
    time.time = lambda: real() + next(jumps)


def damage_before_rollback(rank: int, slots: tuple[int, ...], factor: float) -> None:
    """A sample makes the loss jump, and a bit of the checkpoint of step 4 flips when the run wants to go back."""
    from model.training import Pretraining

    poison(rank, slots, factor)
    back = Pretraining._roll_back

    def rolling_back(self: Pretraining, done: int) -> int:
        for path in Path(self.checkpoints.place.path("step-4")).rglob("*.safetensors"):
            flip_bit(path)
        return back(self, done)

    Pretraining._roll_back = rolling_back  # type: ignore[method-assign]


def allow_all_keys(rank: int) -> None:
    """No key of a user's DeepSpeed file is refused."""
    from model import ds_config

    ds_config._REFUSED.clear()


def exhaust_loss_scale(rank: int, update: int) -> None:
    """As if fp16 overflowed at every loss scale, in this update; rank 0 then writes its report on a slow disk."""
    from model.engine import Engine, LossScaleError
    from model.training import Pretraining

    learn, name, updates = Engine.learn, Pretraining._named_samples, itertools.count(1)

    def learning(self: Engine, loss: Any, last: bool) -> None:
        learn(self, loss, last)
        if last and self.name == "generator" and next(updates) == update:
            raise LossScaleError("Current loss scale already at minimum")

    def naming(self: Pretraining, step: int) -> dict[str, list[int]]:
        time.sleep(4)
        return name(self, step)

    Engine.learn, Pretraining._named_samples = learning, naming  # type: ignore[method-assign]


def lack_memory(rank: int) -> None:
    """There is no memory for what checkpoints are written from."""
    from model.snapshot import Snapshot

    def failing(self: Snapshot, engine: Any) -> None:
        raise RuntimeError("no memory to pin")

    Snapshot.__init__ = failing  # type: ignore[method-assign]


def stop_after(rank: int, step: int) -> None:
    """The process is asked to stop once it has done so many steps, as batch systems do ahead of a time limit."""
    from model.heartbeat import Heartbeats

    beat = Heartbeats.beat

    def beating(self: Heartbeats, done: int, phase: str, busy_seconds: float) -> None:
        beat(self, done, phase, busy_seconds)
        if (done, phase) == (step, "step"):
            os.kill(os.getpid(), signal.SIGUSR1)

    Heartbeats.beat = beating  # type: ignore[method-assign]


def start_otherwise(rank: int, overrides: tuple[str, ...]) -> None:
    """Rank 1 reads another configuration."""
    from pipeline import configfile

    load = configfile.load
    if rank == 1:
        configfile.load = lambda source, given=None: load(source, [*(given or []), *overrides])


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
