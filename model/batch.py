"""What a process computes at once, and what is counted on the way: sums over tokens, so that every token weighs alike.

Means over micro-batches and processes are formed at the end: add the sums, add the tokens, divide once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.masked_lm import MaskedLMOutput
from model.rtd import DiscriminatorOutput, corrupt

SUMS = ("mlm_loss", "masked", "kept", "rtd_loss", "tokens", "right", "replaced", "called", "found")
"""What `tally` counts, in its order."""


class Totals(NamedTuple):
    """What the losses of a step are divided by: tokens that are masked, and all that are not padding."""

    masked: int
    tokens: int


class MicroBatch(NamedTuple):
    """Rows, before any of their tokens is masked."""

    input_ids: Tensor
    """[B, L] int64"""
    segment_ids: Tensor
    """[B, L] integers, 0 where padded"""
    slots: Tensor
    """[B] int64: the samples' numbers in the run; their masks depend on them"""
    purpose: tuple[str | int, ...]
    """Names its random numbers: ("train", step, place in the global batch)."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        input_ids, segment_ids, slots = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return MicroBatch(input_ids, segment_ids, slots, self.purpose)


@torch.no_grad()
def tally(
    batch: MicroBatch, masked_positions: Tensor, mlm: MaskedLMOutput, rtd: DiscriminatorOutput | None = None
) -> Tensor:
    """Losses and counts of a micro-batch, float64 in the order of `SUMS`; nothing here waits for the device."""
    _, replaced = corrupt(batch.input_ids, masked_positions, mlm.sampled)
    counts = [mlm.loss_sum, mlm.tokens, mlm.tokens - replaced.sum()]
    if rtd is None:
        counts += [torch.zeros_like(mlm.loss_sum)] * (len(SUMS) - len(counts))
    else:
        called = (rtd.logits > 0) & (batch.segment_ids > 0)
        right = (called == replaced) & (batch.segment_ids > 0)
        counts += [rtd.loss_sum, rtd.tokens]
        counts += [part.sum() for part in (right, replaced, called, called & replaced)]
    return torch.stack([count.detach().double() for count in counts])


def readings(sums: Tensor) -> dict[str, float]:
    """Means and rates from summed `tally`s: what a line of metrics says of the networks."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    found = {
        "generator_loss": _ratio(total["mlm_loss"], total["masked"]),
        "masked_accuracy": _ratio(total["kept"], total["masked"]),
    }
    if not total["tokens"]:  # there is no discriminator
        return found
    precision = _ratio(total["found"], total["called"])
    recall = _ratio(total["found"], total["replaced"])
    return found | {
        "discriminator_loss": _ratio(total["rtd_loss"], total["tokens"]),
        "replaced_accuracy": _ratio(total["right"], total["tokens"]),
        "replaced_share": _ratio(total["replaced"], total["tokens"]),
        "replaced_precision": precision,
        "replaced_recall": recall,
        "replaced_f1": _ratio(2 * precision * recall, precision + recall),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
