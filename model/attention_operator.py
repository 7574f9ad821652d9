"""Disentangled attention as one operator, `mdeberta::disentangled_attention`, on `model.attention_kernels`.

What it computes for each row, head and query i, with keys j of the same segment only:

    out_i = sum_j dropout( softmax_j( scale * (q_i . k_j + q_i . Rk[i - j] + Rq[i - j] . k_j) ) ) v_j

It is registered with torch, so that compiled code calls it without a graph break. The soft-max's totals are kept for
the backward pass; everything else is computed again. The same inputs give the same bits, gradients included.

Shapes: B rows of L tokens; Q queries a row; H heads of size D (16, 32, 64 or 128); R distances; T tokens a tile.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from model import attention_kernels as kernels
from model.attention import KERNEL_HEAD_SIZES

_WORDS = 1 << 32
_PROGRAMS = 768
"""Backward, that are started at least, where there is work for so many: three rounds of what an H200 runs at a time."""
_RQ, _RK = 0, 1
"""Where a table has what meets keys and what meets queries."""


class Launch(NamedTuple):
    """How a kernel is started on a GPU."""

    num_warps: int
    num_stages: int


LAUNCHES: dict[JITFunction[Any], dict[int, Launch]] = {
    kernels.forward: {64: Launch(4, 1), 32: Launch(4, 2), 16: Launch(2, 2)},
    kernels.backward_queries: {64: Launch(4, 1), 32: Launch(4, 2), 16: Launch(2, 2)},
    kernels.backward_keys: {64: Launch(4, 1), 32: Launch(4, 1), 16: Launch(2, 2)},
}
"""By tile size. Nothing is tuned while a run goes on, so that a resumed one computes the same.

With one stage and four warps two programs fit on a multiprocessor of an H100, and one works while the other waits.
With eight warps both halves would compute the same tile of 64 rows.
"""

_WIDE = (9, 10)
"""Compute capabilities for tiles of 64."""


class Reach(NamedTuple):
    """For every token, the tokens it may attend to: those of its segment; none for padding."""

    first: Tensor
    """[B, L] int32: the first of them; L for padding."""
    last: Tensor
    """[B, L] int32: the one after the last; 0 for padding."""


def reach(segment_ids: Tensor) -> Reach:
    """Segment numbers [B, L], 0 for padding; a segment is a run of equal numbers."""
    length = segment_ids.shape[1]
    place = torch.arange(length, device=segment_ids.device)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = changes.new_ones(len(segment_ids), 1)
    first = torch.where(torch.cat([edge, changes], 1), place, 0).cummax(1).values
    # The end of a segment is the smallest one at or after each token: a running minimum from the right.
    ends = torch.where(torch.cat([changes, edge], 1), place + 1, length).flip(1).cummin(1).values.flip(1)
    padding = segment_ids == 0
    return Reach(first.masked_fill(padding, length).int(), ends.masked_fill(padding, 0).int())


def tile_size(length: int, dtype: torch.dtype, device: torch.device) -> int:
    """T for rows of so many tokens: smaller than `largest_tile` for short ones."""
    return min(largest_tile(dtype, device), max(16, triton.next_power_of_2(length)))


@functools.lru_cache(maxsize=16)
def largest_tile(dtype: torch.dtype, device: torch.device) -> int:
    """64 where matrix units multiply 64 rows at once and two programs fit (H100, B200), 32 elsewhere."""
    if dtype.itemsize > 2:
        return 32
    if device.type != "cuda":
        return 64
    return 64 if torch.cuda.get_device_capability(device)[0] in _WIDE else 32


@functools.lru_cache(maxsize=16)
def distances(length: int, max_distance: int, tile: int) -> tuple[int, int]:
    """The distances that a table needs rows for, from the first up to the one after the last.

    Whole chunks of T around 0, as many on either side. Beyond max_distance - 1 all distances share a bucket, so one
    more chunk of these stands for all.
    """
    blocks = -(-length // tile)
    chunks = min(blocks, -(-(max_distance - 1) // tile) + 1)
    return -chunks * tile, chunks * tile


def disentangled_attention(
    states: Tensor,
    relative: Tensor,
    reach: Reach,
    scale: float,
    query: Tensor | None = None,
    slots: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Contexts [B, Q, H, D] of the queries.

    Args:
        states: [B, L, 3, H, D] queries, keys and values of the tokens, or [B, L, 2, H, D] keys and values.
        relative: [R, 2, H, D] Rq and Rk, a row for each of the `distances` of a query to a key.
        reach: of the tokens.
        scale: of the scores, 1 / sqrt(3 D).
        query: [B, Q, H, D], if not in `states`; Q = L and in the order of tokens, unless `slots` says otherwise.
        slots: [B, L] int32, which of `query` is at each place, -1 where none is; at most one each.
        dropout: probability with which a weight is set to zero; the random bits come from torch's generator.

    Raises:
        ValueError: the head size, or the type of a tensor, is not one the kernels are made for, or the queries are
            missing or there twice.
    """
    if states.shape[-1] not in KERNEL_HEAD_SIZES:
        raise ValueError(f"heads of size {states.shape[-1]}; the kernels are made for {KERNEL_HEAD_SIZES}")
    if len({tensor.dtype for tensor in (states, relative, query) if tensor is not None}) > 1:
        raise ValueError("states, relative and query have different types")
    if states.shape[2] != (3 if query is None else 2):
        raise ValueError(f"{states.shape[2]} states a token; keys and values, and queries unless these are given apart")
    noise = noise_of(states) if dropout > 0 else None
    tensors = (states.contiguous(), relative.contiguous(), None if query is None else query.contiguous())
    out, _ = _attend(*tensors, reach.first, reach.last, slots, noise, dropout, scale)
    return out


def noise_of(states: Tensor) -> Tensor:
    """[B, H, 2, L] int32: odd random numbers of queries and keys, which decide what dropout keeps."""
    batch, length, _, heads, _ = states.shape
    return (
        torch.randint(-_WORDS // 2, _WORDS // 2, (batch, heads, 2, length), dtype=torch.int32, device=states.device) | 1
    )


def _threshold(dropout: float) -> int:
    return min(round(dropout * _WORDS) - _WORDS // 2, _WORDS // 2 - 1)


def kept(noise: Tensor, dropout: float) -> Tensor:
    """[B, H, L, L] which weights dropout keeps, as the kernels decide it by `noise` [B, H, 2, L]; for checks."""
    of_query, of_key = noise.unbind(2)
    return of_query[..., :, None] * of_key[..., None, :] >= _threshold(dropout)


@torch.library.custom_op("mdeberta::disentangled_attention", mutates_args=())
def _attend(
    states: Tensor, relative: Tensor, query: Tensor | None,
    first: Tensor, last: Tensor, slots: Tensor | None, noise: Tensor | None, dropout: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contexts [B, Q, H, D] and logarithms of the soft-max's totals [B, H, Q]."""
    call = _Call(states, relative, query, slots, noise, dropout, scale)
    out, log_total = torch.empty_like(call.query, memory_format=torch.contiguous_format), call.a_number_each()
    if slots is not None:
        out.zero_()  # a query that is at no place has none
    grid = (call.blocks * call.batch * call.heads,)
    call.start(kernels.forward, grid, *call.inputs, first, last, slots, noise, out, log_total)
    return out, log_total


@torch.library.custom_op("mdeberta::disentangled_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor, out: Tensor, log_total: Tensor, states: Tensor, relative: Tensor, query: Tensor | None,
    first: Tensor, last: Tensor, slots: Tensor | None, noise: Tensor | None, dropout: float, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of states, relative and, where they are apart, queries."""
    call = _Call(states, relative, query, slots, noise, dropout, scale)
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (states, relative, query)
        if tensor is not None
    ]
    grad_query, grad_key, grad_value = _queries_keys_values(grads[0], None if query is None else grads[2])
    if slots is not None:
        grad_query.zero_()
    groups = min(call.batch, -(-_PROGRAMS // (call.blocks * call.heads)))
    grid = (call.blocks, call.heads, groups)
    slices = states.new_zeros(groups * call.blocks, len(relative), *relative.shape[2:], dtype=torch.float32)
    alignment = call.a_number_each()
    inputs = (*call.inputs, first, last, slots, noise)
    call.start(
        kernels.backward_queries, grid, *inputs, out, log_total, grad_out, alignment, grad_query, slices,
        batch=call.batch, kept_share=1 - dropout,
    )  # fmt: skip
    grads[1][:, _RK] = slices.sum(0) * (scale * call.keep_scale)
    slices.zero_()
    call.start(
        kernels.backward_keys, grid, *inputs, log_total, grad_out, alignment, grad_key, grad_value, slices,
        batch=call.batch,
    )  # fmt: skip
    grads[1][:, _RQ] = slices.sum(0) * (scale * call.keep_scale)
    return grads


def _queries_keys_values(states: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views of them, [B, Q, H, D] and twice [B, L, H, D]."""
    *within, key, value = states.unbind(2)
    return within[0] if query is None else query, key, value


class _Call:
    """What the kernels are told beside their tensors."""

    def __init__(
        self, states: Tensor, relative: Tensor, query: Tensor | None, slots: Tensor | None, noise: Tensor | None,
        dropout: float, scale: float,
    ) -> None:  # fmt: skip
        width = states.shape[-2] * states.shape[-1]
        self.query, key, value = _queries_keys_values(states, query)
        self.inputs = (self.query, key, value, relative[:, _RK], relative[:, _RQ])
        self.batch, length, self.heads, size = key.shape
        tile = self.tile = tile_size(length, states.dtype, states.device)
        self.blocks = -(-length // tile)
        chunks = len(relative) // (2 * tile)
        self.keep_scale = 1 / (1 - dropout) if dropout < 1 else 0.0
        self._numbers = {
            "query_stride": width * (states.shape[2] if query is None else 1), "key_stride": width * states.shape[2],
            "table_stride": width * relative.shape[1],
            "length": length, "queries": self.query.shape[1], "heads": self.heads,
            "chunks": chunks, "scale": scale / math.log(2),
            "threshold": _threshold(dropout), "keep_scale": self.keep_scale,
            "DROPOUT": noise is not None, "SUBSET": slots is not None, "FAR": chunks < self.blocks,
            "T": tile, "D": size,
        }  # fmt: skip

    def a_number_each(self) -> Tensor:
        """Room for an fp32 number a head and query: [B, H, Q]."""
        return self.query.new_empty(self.batch, self.heads, self.query.shape[1], dtype=torch.float32)

    def start(self, kernel: JITFunction[Any], grid: tuple[int, ...], *tensors: Tensor | None, **more: float) -> None:
        """Start a kernel on a grid of programs, where there are any."""
        if all(grid):
            kernel[grid](*tensors, **self._numbers, **more, **LAUNCHES[kernel][self.tile]._asdict())


@_attend.register_fake
def _(states: Tensor, relative: Tensor, query: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    asked = states[:, :, 0] if query is None else query
    batch, queries, heads, _size = asked.shape
    out = torch.empty_like(asked, memory_format=torch.contiguous_format)
    return out, states.new_empty(batch, heads, queries, dtype=torch.float32)


@_attend_backward.register_fake
def _(grad_out: Tensor, out: Tensor, log_total: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in rest[:3] if t is not None]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_states, grad_relative, *grad_query = _attend_backward(
        grad_out.contiguous(), *ctx.saved_tensors, ctx.dropout, ctx.scale
    )
    return (grad_states, grad_relative, grad_query[0] if grad_query else None, *[None] * 6)


_attend.register_autograd(_backward, setup_context=_keep_for_backward)
