"""Tied output projection, cross-entropy and sampling over vocabulary chunks, without ever holding all logits.

With N masked tokens and V = 251,000 rows the logits are by far the largest tensor of the recipe (77 MB a sequence), and
plain autograd keeps several copies. Here the vocabulary is taken a chunk of columns at a time, twice:

    1.  z = hidden @ weight.T + bias:   running logsumexp, z[target], the mass of each block of columns
        a block is drawn by its share of the mass
    2.  z again, g = softmax(z) - onehot(target):   g @ weight,  g.T @ hidden,  sum of g
        a column of the drawn block is drawn

The gradients are computed in the forward pass, so that a chunk's rows of the weight gradient are complete when they are
written, in the weight's own precision. 8 d V multiply-adds a token; 6 d V where all logits fit into `KEPT_LOGITS`, for
then pass 2 finds them where pass 1 left them. Memory: the gradients and a few buffers of `LOGITS_AT_ONCE`.

Loss, soft-max and sums are fp32 whatever the inputs are. Nothing here waits for the device.

Shapes: N tokens, D width, V table rows, C columns of a chunk, S = SAMPLE_BLOCK.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.modules import has_triton, product, transposed_product

LOGITS_AT_ONCE = 2**24
"""Logits computed together: 64 MiB in fp32."""

KEPT_LOGITS = 2**26
"""Up to so many logits, 256 MiB in fp32, are kept between the passes instead of being computed again."""

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
    kept_logits: int = KEPT_LOGITS,
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
        logits_at_once: bound on tokens x columns computed together.
        kept_logits: bound on N x V up to which the logits are computed once.
    """
    budget = (logits_at_once, kept_logits)
    loss_sum, sampled = _ProjectAndSample.apply(
        hidden, weight, bias, targets, noise, candidates, temperature, budget, torch.is_grad_enabled()
    )
    return HeadOutput(loss_sum, sampled)


class _ProjectAndSample(torch.autograd.Function):
    """The two passes. What is saved for the backward pass are the finished gradients of the loss sum."""

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
        budget: tuple[int, int],
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        valid = (targets >= 0).float()
        chunks = _chunks(len(hidden), len(weight), candidates, budget[0])
        states = hidden if _multiplies_mixed(hidden) else hidden.float()
        kept: list[Tensor] | None = [] if hidden.shape[0] * weight.shape[0] <= budget[1] else None

        log_total = torch.full_like(valid, -torch.inf)
        target_logit, masses = torch.zeros_like(valid), []
        way = _Fused() if _has_kernels(hidden) else _Eager()
        for columns in chunks:
            logits = way.logits(states, weight[columns], bias[columns])
            if kept is not None:
                kept.append(logits)
            target = targets - columns.start
            blocks, tempered = way.masses(logits, bias[columns], target, target_logit, temperature)
            log_total = torch.logaddexp(log_total, blocks.logsumexp(-1))
            if columns.start in candidates:
                masses.append(tempered)
        draw = _Draw(torch.cat(masses, dim=1), noise, candidates, temperature)

        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        # Without gradients there is no need for the largest tensor of all.
        grad_weight, grad_bias = torch.empty_like(weight if differentiate else weight[:0]), torch.empty_like(bias)
        for number, columns in enumerate(chunks):
            logits = kept[number] if kept is not None else way.logits(states, weight[columns], bias[columns])
            target = targets - columns.start
            if not differentiate:
                way.look(logits, bias[columns], draw, columns)
                continue
            grad = way.look_and_differentiate(
                logits, bias[columns], draw, columns, target, log_total, valid, states.dtype
            )
            grad_bias[columns] = grad.sum(0, dtype=torch.float32)
            grad_hidden += _product(grad, weight[columns])
            grad_weight[columns] = _transposed_product(grad, states)
        if differentiate:
            ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight, grad_bias)
        sampled = draw.sampled()
        ctx.mark_non_differentiable(sampled)
        return valid @ (log_total - target_logit), sampled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad.mul_(grad_loss) for grad in ctx.saved_tensors), *[None] * 6)


class _Eager:
    """What is done with a chunk of logits [N, C], in plain torch."""

    def logits(self, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Of `states` [N, D], in fp32."""
        return _product(states, weight.mT).add_(bias)

    def masses(
        self, logits: Tensor, bias: Tensor, target: Tensor, target_logit: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Logsumexp of each block, as it is and over the temperature; the target's logit goes to `target_logit` [N]."""
        target_logit += _at(logits, target)
        blocks = _block_logsumexp(logits)
        return blocks, blocks if temperature == 1.0 else _block_logsumexp(logits / temperature)

    def look(self, logits: Tensor, bias: Tensor, draw: _Draw, columns: slice) -> None:
        """Have the draw note the logits of its blocks."""
        draw.look(logits, columns)

    def look_and_differentiate(
        self, logits: Tensor, bias: Tensor, draw: _Draw, columns: slice,
        target: Tensor, log_total: Tensor, valid: Tensor, precision: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Also the gradient [N, C] by the logits, which may be overwritten."""
        self.look(logits, bias, draw, columns)
        grad = logits.sub_(log_total[:, None]).exp_()
        return _subtract_one_hot(grad, target).mul_(valid[:, None]).to(precision)


class _Fused(_Eager):
    """The same with kernels that read each logit once a pass; the logits are kept without their bias."""

    def __init__(self) -> None:
        from model import head_kernels  # Triton comes with torch for GPUs alone

        self._kernels = head_kernels

    def logits(self, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """See `_Eager`."""
        return _product(states, weight.mT)

    def masses(
        self, logits: Tensor, bias: Tensor, target: Tensor, target_logit: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """See `_Eager`."""
        return self._kernels.block_masses(logits, bias, target, target_logit, temperature, SAMPLE_BLOCK)

    def look(self, logits: Tensor, bias: Tensor, draw: _Draw, columns: slice) -> None:
        """See `_Eager`."""
        self._kernels.look(logits, bias, draw.block, draw.within, draw.first_block(columns))

    def look_and_differentiate(
        self, logits: Tensor, bias: Tensor, draw: _Draw, columns: slice,
        target: Tensor, log_total: Tensor, valid: Tensor, precision: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """See `_Eager`."""
        place = draw.block, draw.within, draw.first_block(columns)
        return self._kernels.look_and_differentiate(logits, bias, *place, target, log_total, valid, precision)


def _has_kernels(tensor: Tensor) -> bool:
    return _multiplies_mixed(tensor) and has_triton()


def _chunks(tokens: int, rows: int, candidates: range, logits_at_once: int) -> list[slice]:
    """The columns in order; none crosses an end of the candidates, and within them blocks are whole but the last."""
    width = max(1, logits_at_once // max(1, tokens) // SAMPLE_BLOCK) * SAMPLE_BLOCK
    spans = [(0, candidates.start), (candidates.start, candidates.stop), (candidates.stop, rows)]
    return [slice(at, min(at + width, stop)) for start, stop in spans for at in range(start, stop, width)]


def _multiplies_mixed(tensor: Tensor) -> bool:
    """Whether products of such low-precision matrices are available with an fp32 result."""
    return tensor.is_cuda and tensor.dtype != torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` with fp32 accumulation and result; `left` is what decides how."""
    if _multiplies_mixed(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return product(left, right.float())


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` of two matrices of one precision, accumulated in fp32."""
    return left.mT @ right if _multiplies_mixed(left) else transposed_product(left, right)


def _block_logsumexp(logits: Tensor) -> Tensor:
    """[N, C] to the logsumexp [N, ceil(C / S)] of each block; the last may be narrower."""
    whole = logits.shape[1] // SAMPLE_BLOCK * SAMPLE_BLOCK
    parts = [logits[:, :whole].unflatten(1, (-1, SAMPLE_BLOCK)).logsumexp(-1)] if whole else []
    if whole < logits.shape[1]:
        parts.append(logits[:, whole:].logsumexp(-1, keepdim=True))
    return torch.cat(parts, dim=1)


def _at(logits: Tensor, column: Tensor) -> Tensor:
    """The entry at `column` [N] of each row of `logits` [N, C], 0 where it lies in another chunk."""
    inside = (column >= 0) & (column < logits.shape[1])
    return logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0] * inside


def _subtract_one_hot(probs: Tensor, column: Tensor) -> Tensor:
    """Take 1 from the entry at `column` [N] of each row of `probs` [N, C], in place, where it lies in this chunk."""
    inside = (column >= 0) & (column < probs.shape[1])
    return probs.scatter_add_(1, column.clamp(0, probs.shape[1] - 1)[:, None], -inside.float()[:, None])


class _Draw:
    """One of the candidates for every token, by inverting the distribution function in two steps.

    First a block of columns is drawn by its share, then a column within it; the two draws use one number of `noise`
    [N, 2] each, so even the rarest of 250,000 pieces is reached with its own probability. A token costs one read of its
    logits and two random numbers, where Gumbel noise would cost V of them and two logarithms each.
    """

    def __init__(self, masses: Tensor, noise: Tensor, candidates: range, temperature: float) -> None:
        """`masses` [N, blocks] are the logarithms of the blocks' weights."""
        self.block = _invert(masses, noise[:, :1]).clamp(max=masses.shape[1] - 1)
        """[N, 1]: the block that is drawn from."""
        self.within = torch.full((len(masses), SAMPLE_BLOCK), -torch.inf, device=masses.device)
        """[N, S]: its logits, as far as they have been seen."""
        self._noise, self._candidates, self._temperature = noise[:, 1:], candidates, temperature

    def first_block(self, columns: slice) -> int:
        """The number of a chunk's first block; one that is never drawn where the chunk has no candidates."""
        if columns.start not in self._candidates:
            return -(1 << 30)
        return (columns.start - self._candidates.start) // SAMPLE_BLOCK

    def look(self, logits: Tensor, columns: slice) -> None:
        """Note the logits of the blocks that lie in this chunk [N, C]."""
        if columns.start not in self._candidates:
            return
        begin = (self.block - self.first_block(columns)) * SAMPLE_BLOCK
        column = begin + torch.arange(SAMPLE_BLOCK, device=logits.device)
        here = (begin >= 0) & (column < logits.shape[1])
        self.within = torch.where(here, logits.gather(1, column.clamp(0, logits.shape[1] - 1)), self.within)

    def sampled(self) -> Tensor:
        """The drawn ids [N] int64, after every chunk of candidates has been looked at."""
        column = self.block * SAMPLE_BLOCK + _invert(self.within / self._temperature, self._noise)
        # Only logits that are not numbers run past the end.
        return self._candidates.start + column.clamp(max=len(self._candidates) - 1)[:, 0]


def _invert(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Column [N, 1] at which the running sum of the weights [N, m] first exceeds `uniform` [N, 1] times its total."""
    cumulative = log_weights.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
