"""Disentangled attention as one operator, `mdeberta::disentangled_attention`, on `model.attention_kernels`.

What it computes for each row, head and query i, with keys j of the same segment only:

    out_i = sum_j dropout( softmax_j( scale * (q_i . k_j + q_i . Rk[i - j] + Rq[i - j] . k_j) ) ) v_j

It is registered with torch, so that compiled code calls it without a graph break. The soft-max's totals are kept for
the backward pass; everything else is computed again. The same inputs give the same bits, gradients included.

Shapes: B rows of L tokens; Q queries a row; H heads of size D (16, 32, 64 or 128); T tokens a tile.
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

_THRESHOLDS = 1 << 31
_PROGRAMS = 512
"""That are started at least, where there is work for so many."""


class Launch(NamedTuple):
    """How a kernel is started on a GPU."""

    num_warps: int
    num_stages: int


LAUNCHES: dict[JITFunction[Any], dict[int, Launch]] = {
    kernels.forward: {64: Launch(4, 1), 32: Launch(4, 2), 16: Launch(2, 2)},
    kernels.backward_queries: {64: Launch(8, 2), 32: Launch(4, 2), 16: Launch(2, 2)},
    kernels.backward_keys: {64: Launch(8, 2), 32: Launch(4, 2), 16: Launch(2, 2)},
}
"""By tile size. Nothing is tuned while a run goes on, so that a resumed one computes the same.

With one stage two programs of `forward` fit on a multiprocessor of an H100, and one works while the other waits; of the
backward kernels one fills it.
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
    """64 where matrix units multiply 64 rows at once and shared memory holds 140 KB (H100, B200), 32 elsewhere."""
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relative_key: Tensor,
    relative_query: Tensor,
    reach: Reach,
    scale: float,
    slots: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Contexts [B, Q, H, D] of the queries.

    Args:
        query: [B, Q, H, D]; Q = L and in the order of tokens, unless `slots` says otherwise.
        key: [B, L, H, D].
        value: [B, L, H, D].
        relative_key: [R, H, D], a row for each of the `distances` of a query to a key.
        relative_query: [R, H, D].
        reach: of the tokens.
        scale: of the scores, 1 / sqrt(3 D).
        slots: [B, L] int32, which query is at each place, -1 where none is; at most one each.
        dropout: probability with which a weight is set to zero; the random bits come from torch's generator.

    Raises:
        ValueError: the head size, or the type of a tensor, is not one the kernels are made for.
    """
    if query.shape[-1] not in KERNEL_HEAD_SIZES:
        raise ValueError(f"heads of size {query.shape[-1]}; the kernels are made for {KERNEL_HEAD_SIZES}")
    if len({tensor.dtype for tensor in (query, key, value, relative_key, relative_query)}) > 1:
        raise ValueError("query, key, value and the relative tables have different types")
    seed = torch.randint(_THRESHOLDS, (2,), device=query.device) if dropout > 0 else None
    tensors = [_rows_in_order(tensor) for tensor in (query, key, value, relative_key, relative_query)]
    out, _ = _attend(*tensors, reach.first, reach.last, slots, seed, dropout, scale)
    return out


def kept(seed: Tensor, shape: torch.Size, dropout: float) -> Tensor:
    """[B, H, L, L] which weights dropout keeps, as the kernels decide it by `seed` [2]; for checks."""
    batch, heads, length, _ = shape
    pair = _hash(torch.arange(batch * heads, device=seed.device).view(batch, heads, 1) ^ seed[0])
    place = torch.arange(length, device=seed.device)
    of_query, of_key = _hash(place + pair & _WORD), _hash((place + pair & _WORD) ^ seed[1] ^ 0x9E3779B9)
    bits = _hash(of_query[..., :, None] + of_key[..., None, :] & _WORD)
    return bits >> 1 >= round(dropout * _THRESHOLDS)


_WORD = (1 << 32) - 1


def _hash(bits: Tensor) -> Tensor:
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & _WORD
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & _WORD
    return bits ^ (bits >> 16)


def _rows_in_order(tensor: Tensor) -> Tensor:
    """The tensor if its heads lie side by side and its tokens at even distances, else a copy where they do."""
    *_, heads, size = tensor.shape
    aligned = tensor.stride(-1) == 1 and tensor.stride(-2) == size
    if tensor.ndim == 4:
        aligned = aligned and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    else:
        aligned = aligned and tensor.stride(0) == heads * size
    return tensor if aligned else tensor.contiguous()


@torch.library.custom_op("mdeberta::disentangled_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, relative_key: Tensor, relative_query: Tensor,
    first: Tensor, last: Tensor, slots: Tensor | None, seed: Tensor | None, dropout: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contexts [B, Q, H, D] and logarithms of the soft-max's totals [B, H, Q]."""
    call = _Call(query, key, value, relative_key, slots, seed, dropout, scale)
    out, log_total = torch.empty_like(query, memory_format=torch.contiguous_format), call.a_number_each()
    if slots is not None:
        out.zero_()  # a query that is at no place has none
    grid = (call.blocks * call.batch * call.heads,)
    call.start(
        kernels.forward, grid, query, key, value, relative_key, relative_query, first, last, slots, seed, out, log_total
    )
    return out, log_total


@torch.library.custom_op("mdeberta::disentangled_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor, out: Tensor, log_total: Tensor,
    query: Tensor, key: Tensor, value: Tensor, relative_key: Tensor, relative_query: Tensor,
    first: Tensor, last: Tensor, slots: Tensor | None, seed: Tensor | None, dropout: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, relative_key and relative_query."""
    call = _Call(query, key, value, relative_key, slots, seed, dropout, scale)
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    if slots is not None:
        grads[0].zero_()
    groups = min(call.batch, -(-_PROGRAMS // (call.blocks * call.heads)))
    grid = (call.blocks, call.heads, groups)
    slices = query.new_zeros(groups * call.blocks, *relative_key.shape, dtype=torch.float32)
    alignment = call.a_number_each()
    inputs = (query, key, value, relative_key, relative_query, first, last, slots, seed)

    def table_gradient() -> Tensor:
        return (slices.sum(0) * scale).to(relative_key.dtype)

    call.start(
        kernels.backward_queries, grid, *inputs, out, log_total, grad_out, alignment, grads[0], slices,
        batch=call.batch,
    )  # fmt: skip
    grad_relative_key = table_gradient()
    slices.zero_()
    call.start(
        kernels.backward_keys, grid, *inputs, log_total, grad_out, alignment, grads[1], grads[2], slices,
        batch=call.batch,
    )  # fmt: skip
    return grads[0], grads[1], grads[2], grad_relative_key, table_gradient()


class _Call:
    """What the kernels are told beside their tensors."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, relative_key: Tensor, slots: Tensor | None,
        seed: Tensor | None, dropout: float, scale: float,
    ) -> None:  # fmt: skip
        self.query = query
        self.batch, length, self.heads, size = key.shape
        tile = self.tile = tile_size(length, query.dtype, query.device)
        self.blocks = -(-length // tile)
        chunks = relative_key.shape[0] // (2 * tile)
        self._numbers = {
            "query_stride": query.stride(1), "key_stride": key.stride(1), "value_stride": value.stride(1),
            "length": length, "queries": query.shape[1], "heads": self.heads,
            "chunks": chunks, "scale": scale / math.log(2),
            "threshold": min(round(dropout * _THRESHOLDS), _THRESHOLDS - 1),
            "keep_scale": 1 / (1 - dropout) if dropout < 1 else 0.0,
            "DROPOUT": seed is not None, "SUBSET": slots is not None, "FAR": chunks < self.blocks, "T": tile, "D": size,
        }  # fmt: skip

    def a_number_each(self) -> Tensor:
        """Room for an fp32 number a head and query: [B, H, Q]."""
        return self.query.new_empty(self.batch, self.heads, self.query.shape[1], dtype=torch.float32)

    def start(self, kernel: JITFunction[Any], grid: tuple[int, ...], *tensors: Tensor | None, **more: int) -> None:
        """Start a kernel on a grid of programs, where there are any."""
        if all(grid):
            kernel[grid](*tensors, **self._numbers, **more, **LAUNCHES[kernel][self.tile]._asdict())


@_attend.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _size = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(batch, heads, queries, dtype=torch.float32)


@_attend_backward.register_fake
def _(grad_out: Tensor, out: Tensor, log_total: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in rest[:5])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad_out.contiguous(), *ctx.saved_tensors, ctx.dropout, ctx.scale)
    return (*grads, *[None] * 6)


_attend.register_autograd(_backward, setup_context=_keep_for_backward)
