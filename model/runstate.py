"""What a run knows at a step besides weights, moments and the step itself; a checkpoint's record carries it.

It is the same on every process and follows from the samples alone, so a resumed run decides as the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config import SpikesConfig


@dataclass
class RunState:
    """Counts since the run began."""

    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of them the last steps were."""
    rollbacks: int = 0
    """Times that a spike sent the run back."""
    slots_left_out: int = 0
    """Samples that the order would have given and that rollbacks left out."""
    tokens_by_language: dict[str, int] = field(default_factory=dict)
    """Trained on; those of steps that were skipped or undone do not count."""
    mean_losses: dict[str, float] = field(default_factory=dict)
    """Running means that spikes are told by."""
    mean_steps: int = 0
    """How many steps these have seen."""

    def note_skip(self, skipped: bool) -> None:
        """Count a step."""
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def spikes(self, losses: Mapping[str, float], config: SpikesConfig) -> str | None:
        """Compare a step's losses with their running means and take them in; the name of one that jumped, if any did.

        The mean of the first `window_steps` steps, afterwards an exponential one: m += (loss - m) / window_steps.
        """
        if config.factor is None:
            return None
        if self.mean_steps >= config.window_steps:
            for name, loss in losses.items():
                if loss > config.factor * self.mean_losses[name]:
                    return name
        self.mean_steps += 1
        for name, loss in losses.items():
            mean = self.mean_losses.get(name, 0.0)
            self.mean_losses[name] = mean + (loss - mean) / min(self.mean_steps, config.window_steps)
        return None
