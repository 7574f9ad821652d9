"""Where the time of a step goes: a clock that is told when another phase begins, and adds up seconds by phase.

On a GPU the marks are events in its own queue: nothing waits for them until `settle`, at the end of a step that has
read a gradient norm anyway. Phases do not nest; a mark ends the one before it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

_REPORTED = {
    "data_seconds": ("data",),
    "generator_seconds": ("generator forward", "generator backward"),
    "sampling_seconds": ("sampling",),
    "discriminator_seconds": ("discriminator forward", "discriminator backward"),
    "optimizer_seconds": ("optimizer",),
}
_OWN = ("generator forward", "sampling", "discriminator forward")
"""What a process does before it has to hear from others: where one is slower than they, it shows here."""


class Phases:
    """The clock of one process.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    def begin(self, phase: str) -> None:
        """What follows belongs to a phase."""
        mark: Any = time.perf_counter()
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))

    def settle(self) -> float:
        """Add up the marks so far, when the device has got there; the seconds that this process needed for itself."""
        self.begin("")
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        own = 0.0
        for (phase, mark), (_, following) in zip(self._marks, self._marks[1:], strict=False):
            seconds = mark.elapsed_time(following) / 1000 if self._on_gpu else following - mark
            self._seconds[phase] += seconds
            own += seconds if phase in _OWN else 0.0
        self._marks.clear()
        return own

    def discard(self) -> None:
        """Forget the marks that are not settled."""
        self._marks.clear()

    def take(self) -> dict[str, float]:
        """Seconds since the last take, as a line of metrics has them.

        `sampling` is the masked-LM head: logits, loss and draw. A joint update's one backward pass counts as the
        discriminator's.
        """
        taken = {name: round(sum(map(self._seconds.__getitem__, parts)), 6) for name, parts in _REPORTED.items()}
        self._seconds.clear()
        return taken
