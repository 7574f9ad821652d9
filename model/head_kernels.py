"""Triton kernels for the vocabulary's chunks of logits: each is read once a pass, instead of once an operation.

    block_masses       logsumexp of every block of S columns, and the logit of the target
    look               the logits of the block that is drawn from; and, where wanted,
                       softmax(z) - onehot(target) in the precision of the products that follow

A program takes one row and one block; z = logits + bias is never stored. Bytes a logit: 4 read; 4 read and 2 written.

Shapes: N tokens, C columns of a chunk, S = SAMPLE_BLOCK.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _logsumexp(values):
    top = tl.max(values, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log(tl.sum(tl.exp(values - base), 0))


@triton.jit
def _logits(logits, bias, columns, column, S: tl.constexpr):
    """[S] logits of this program's row and block with their bias, -inf past the end."""
    inside = column < columns
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(logits + row * columns + column, mask=inside, other=float("-inf"))
    return values + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _measure(
    logits, bias, target, masses, tempered, target_logit, columns, inverse_temperature,
    TEMPERED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Grid: (N, blocks)."""
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * S + tl.arange(0, S)
    z = _logits(logits, bias, columns, column, S)
    at = row.to(tl.int64) * tl.num_programs(1) + block
    tl.store(masses + at, _logsumexp(z))
    if TEMPERED:
        tl.store(tempered + at, _logsumexp(z * inverse_temperature))
    wanted = tl.load(target + row)
    if (wanted >= block * S) & (wanted < tl.minimum((block + 1) * S, columns)):
        tl.store(target_logit + row, tl.sum(tl.where(column == wanted, z, 0.0), 0))


@triton.jit
def _look(
    logits, bias, drawn, within, first_block, target, log_total, valid, gradient, columns,
    DIFFERENTIATE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Grid: (N, blocks)."""
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * S + tl.arange(0, S)
    if DIFFERENTIATE:
        z = _logits(logits, bias, columns, column, S)
        share = tl.exp(z - tl.load(log_total + row)) - tl.where(column == tl.load(target + row), 1.0, 0.0)
        share = tl.where(tl.load(valid + row) > 0, share, 0.0)
        at = row.to(tl.int64) * columns + column
        tl.store(gradient + at, share.to(gradient.dtype.element_ty), mask=column < columns)
    if tl.load(drawn + row) == first_block + block:
        found = _logits(logits, bias, columns, column, S)
        tl.store(within + row.to(tl.int64) * S + tl.arange(0, S), found)


def block_masses(
    logits: Tensor, bias: Tensor, target: Tensor, target_logit: Tensor, temperature: float, block: int
) -> tuple[Tensor, Tensor]:
    """Logsumexp [N, ceil(C / S)] of each block of `logits` [N, C] + `bias` [C], as they are and over the temperature.

    Args:
        logits: fp32, contiguous.
        bias: of any precision.
        target: [N] int64 column within this chunk; others are not looked at.
        target_logit: [N] fp32, written where the target lies in this chunk.
        temperature: of the draw.
        block: S.
    """
    shape = (len(logits), triton.cdiv(logits.shape[1], block))
    masses = logits.new_empty(shape)
    tempered = masses if temperature == 1.0 else torch.empty_like(masses)
    _measure[shape](
        logits, bias, target, masses, tempered, target_logit, logits.shape[1], 1 / temperature,
        TEMPERED=temperature != 1.0, S=block,
    )  # fmt: skip
    return masses, tempered


def look(logits: Tensor, bias: Tensor, drawn: Tensor, within: Tensor, first_block: int) -> None:
    """Copy the logits of the block that each token draws from, where it is in this chunk.

    Args:
        logits: [N, C] fp32, contiguous.
        bias: [C].
        drawn: [N, 1] int64, the number of that block among the candidates'.
        within: [N, S] fp32, takes them.
        first_block: number of the chunk's first block; one that is never drawn where the chunk has no candidates.
    """
    grid = (len(logits), triton.cdiv(logits.shape[1], within.shape[1]))
    nothing = (None, None, None, None)
    _look[grid](
        logits, bias, drawn, within, first_block, *nothing, logits.shape[1], DIFFERENTIATE=False, S=within.shape[1]
    )


def look_and_differentiate(
    logits: Tensor, bias: Tensor, drawn: Tensor, within: Tensor, first_block: int,
    target: Tensor, log_total: Tensor, valid: Tensor, precision: torch.dtype,
) -> Tensor:  # fmt: skip
    """Also the gradient [N, C] of the cross-entropy by the logits.

    Args: those of `look`, and:
        target: [N] int64 column within this chunk.
        log_total: [N] fp32, logarithm of the soft-max's total.
        valid: [N] fp32, 0 for tokens that count for nothing.
        precision: of the result.
    """
    gradient = torch.empty_like(logits, dtype=precision)
    grid = (len(logits), triton.cdiv(logits.shape[1], within.shape[1]))
    _look[grid](
        logits, bias, drawn, within, first_block, target, log_total, valid, gradient, logits.shape[1],
        DIFFERENTIATE=True, S=within.shape[1],
    )  # fmt: skip
    return gradient
