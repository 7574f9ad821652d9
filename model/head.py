"""Tied output projection, cross-entropy and sampling in one pass, without ever holding all logits.

With N masked tokens and V = 251,000 rows the logits are by far the largest tensor of the recipe (77 MB a sequence), and
plain autograd keeps several copies. Here the tokens are taken a chunk at a time, and all that a chunk's logits are
needed for happens while they exist:

    loss      sum over tokens of  logsumexp(z) - z[target]               z = hidden @ weight.T + bias
    gradient  g = softmax(z) - onehot(target):   g @ weight,  g.T @ hidden,  sum of g
    sample    one draw from softmax(z / temperature) over the pieces that may be drawn

The gradients are computed in the forward pass, so logits are computed once and never again: 6 d V multiply-adds a token
and chunk-sized memory, against 8 d V where the backward pass recomputes them. Loss, soft-max and sums are fp32
whatever the inputs are. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**28
"""Logits computed together: 1 GiB in fp32, a thousand tokens at V = 251,000."""

SAMPLE_BLOCK = 512
"""Columns a draw is narrowed down to before the column itself is drawn."""


class HeadOutput(NamedTuple):
    """What the masked-language-model head returns."""

    loss_sum: Tensor
    """Scalar fp32: cross-entropy summed over the tokens that have a target."""
    sampled: Tensor
    """[N] int64: one drawn id a token; without meaning where there is no target."""


def project_and_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    noise: Tensor,
    candidates: range,
    temperature: float = 1.0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> HeadOutput:
    """Cross-entropy of `hidden @ weight.T + bias` against `targets`, and a sample from the same distribution.

    Args:
        hidden: [N, D] states. Gradients flow to `hidden`, `weight` and `bias`, once.
        weight: [V, D], the tied embedding table.
        bias: [V].
        targets: [N] int64; -1 marks a token that counts for nothing.
        noise: [N, 2] uniform numbers in [0, 1): the only randomness of the draw.
        candidates: the ids that may be drawn, within 0..V-1; others get probability zero. The loss ranges over all V.
        temperature: of the draw; the loss is always taken at 1.
        logits_at_once: bound on tokens x V computed together.
    """
    loss_sum, sampled = _ProjectAndSample.apply(
        hidden, weight, bias, targets, noise, candidates, temperature, logits_at_once, torch.is_grad_enabled()
    )
    return HeadOutput(loss_sum, sampled)


class _ProjectAndSample(torch.autograd.Function):
    """The chunk loop. What it saves for the backward pass are the finished gradients of the loss sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        noise: Tensor,
        candidates: range,
        temperature: float,
        logits_at_once: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((), dtype=torch.float32, device=hidden.device)
        loss_sum, grad_weight, grad_bias = zero, zero, zero
        sampled, grad_hidden = [], []
        for rows in _chunks(len(hidden), max(1, logits_at_once // len(weight))):
            valid = (targets[rows] >= 0).float()
            target = targets[rows].clamp(min=0)[:, None]
            log_probs = torch.log_softmax(_add_product(bias.float(), hidden[rows], weight.mT), dim=-1)
            loss_sum = loss_sum - valid @ log_probs.gather(1, target)[:, 0]
            probs = log_probs.exp_()
            sampled.append(_draw(probs, noise[rows], candidates, temperature))
            if differentiate:
                grad = probs.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                grad_bias = grad_bias + valid @ grad
                grad, counted = grad.to(hidden.dtype), valid.to(hidden.dtype)[:, None]
                grad_hidden.append(_add_product(zero, grad, weight).to(hidden.dtype) * counted)
                grad_weight = _add_product(grad_weight, grad.mT, hidden[rows] * counted)
        if differentiate:
            ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
        draws = torch.cat(sampled)
        ctx.mark_non_differentiable(draws)
        return loss_sum, draws

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*((grad * grad_loss).to(grad.dtype) for grad in ctx.saved_tensors), *[None] * 6)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right` with fp32 result and fp32 accumulation; `total` broadcasts."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32).add_(total)
    return torch.addmm(total, left.float(), right.float())


def _draw(probs: Tensor, noise: Tensor, candidates: range, temperature: float) -> Tensor:
    """One column of `candidates` for every row of `probs` [n, V], by inverting the distribution function in two steps.

    First a block of columns is drawn by its share, then a column within that block; the two draws use one number of
    `noise` [n, 2] each, so even the rarest of 250,000 pieces is reached with its own probability. A row costs one read
    of its probabilities and two random numbers, where Gumbel noise would cost V of them and two logarithms each.
    """
    weights = probs[:, candidates.start : candidates.stop]
    if temperature != 1.0:
        weights = (weights / weights.amax(dim=-1, keepdim=True)).pow(1.0 / temperature)
    whole = len(candidates) // SAMPLE_BLOCK * SAMPLE_BLOCK
    blocks = weights[:, :whole].unflatten(1, (-1, SAMPLE_BLOCK)).sum(dim=-1)
    blocks = torch.cat([blocks, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    block = _invert(blocks, noise[:, :1])
    columns = block * SAMPLE_BLOCK + torch.arange(SAMPLE_BLOCK, device=probs.device)
    beyond = columns >= len(candidates)
    within = weights.gather(1, columns.clamp(max=len(candidates) - 1)).masked_fill(beyond, 0.0)
    column = block * SAMPLE_BLOCK + _invert(within, noise[:, 1:])
    # Only logits that are not numbers, or leave the candidates no mass at all, run past the end.
    return candidates.start + column.clamp(max=len(candidates) - 1)[:, 0]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Column [n, 1] at which the running sum of `weights` [n, m] first exceeds `uniform` [n, 1] times its total."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
