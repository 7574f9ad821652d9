"""Disentangled attention in fp64, spelled out pair by pair: what the fused operator is held against."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention_operator import Reach, disentangled_attention, distances, kept, noise_of, reach, tile_size

NAMES = ("query", "key", "value", "relative_key", "relative_query")


class Case(NamedTuple):
    """A call of the operator: shapes, where it runs, and what is special about it."""

    length: int
    rows: int = 2
    heads: int = 2
    size: int = 32
    dtype: torch.dtype = torch.float32
    max_distance: int = 512
    segments: tuple[int, ...] = ()
    """Lengths of the segments of the second row; the first row is one segment, and what is left over is padding."""
    queries: int | None = None
    """Queries at some places alone."""
    dropout: float = 0.0
    device: str = "cpu"
    seed: int = 0


class Inputs(NamedTuple):
    """Tensors for a case."""

    tensors: list[Tensor]
    reach: Reach
    slots: Tensor | None
    grad_out: Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """Fresh random ones; all distances that share a bucket beyond the reach have the same row."""
        rng = torch.Generator().manual_seed(case.seed)
        first, last = distances(
            case.length, case.max_distance, tile_size(case.length, case.dtype, torch.device(case.device))
        )
        rows, length = case.rows, case.length
        queries = length if case.queries is None else case.queries
        shapes = [(rows, queries), (rows, length), (rows, length), (last - first,), (last - first,)]
        tensors = [torch.randn(*shape, case.heads, case.size, generator=rng) for shape in shapes]
        farthest = case.max_distance - 1
        shared = torch.arange(first, last).clamp(-farthest, farthest) - first
        tensors[3:] = [table[shared] for table in tensors[3:]]
        segments = torch.ones(rows, length, dtype=torch.long)
        if case.segments:
            numbers = torch.repeat_interleave(torch.arange(len(case.segments)) + 1, torch.tensor(case.segments))
            segments[1:] = torch.nn.functional.pad(numbers, (0, length - len(numbers)))
        slots = None
        if case.queries is not None:
            slots = torch.full((rows, length), -1, dtype=torch.int32)
            for row in slots:
                at = torch.randperm(length, generator=rng)[:queries].sort().values
                row[at] = torch.arange(queries, dtype=torch.int32)
        grad_out = torch.randn(rows, queries, case.heads, case.size, generator=rng)

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(case.device, case.dtype if tensor.is_floating_point() else None)

        return cls(
            [there(tensor) for tensor in tensors],
            Reach(*map(there, reach(segments))),
            None if slots is None else there(slots),
            there(grad_out),
        )


def differences(case: Case) -> dict[str, float]:
    """The operator's relative error in the output and in each gradient, by name."""
    inputs = Inputs.of(case)
    scale = 1 / math.sqrt(3 * case.size)
    mine = [tensor.clone().requires_grad_() for tensor in inputs.tensors]
    exact = [tensor.double().requires_grad_() for tensor in inputs.tensors]
    torch.manual_seed(case.seed)
    _poison(inputs.tensors)
    out = attend(mine, inputs.reach, scale, inputs.slots, case.dropout)
    _poison(inputs.tensors)
    out.backward(inputs.grad_out)
    keep = None
    if case.dropout:
        torch.manual_seed(case.seed)
        keep = kept(noise_of(torch.empty(case.rows, case.length, 1, case.heads, 1, device=case.device)), case.dropout)
    expected = reference(*exact, inputs.reach, scale, inputs.slots, keep, case.dropout)
    expected.backward(inputs.grad_out.double())
    fold = _buckets(case, inputs.tensors[3])
    errors = {"out": _relative(out, expected)}
    for name, tensor, other in zip(NAMES, mine, exact, strict=True):
        assert tensor.grad is not None and other.grad is not None
        pair = (tensor.grad.double(), other.grad)
        if name.startswith("relative"):  # what is shared by several distances is one parameter
            pair = tuple(torch.zeros_like(other).index_add(0, fold, grad) for grad in pair)  # type: ignore[assignment]
        errors[name] = _relative(*pair)
    return errors


def attend(
    tensors: list[Tensor], reach: Reach, scale: float, slots: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The operator on the tensors of `NAMES`; queries lie beside keys and values unless `slots` says where they are."""
    query, key, value, relative_key, relative_query = tensors
    relative = torch.stack([relative_query, relative_key], 1)
    if slots is None:
        return disentangled_attention(torch.stack([query, key, value], 2), relative, reach, scale, None, None, dropout)
    return disentangled_attention(torch.stack([key, value], 2), relative, reach, scale, query, slots, dropout)


def reference(
    query: Tensor, key: Tensor, value: Tensor, relative_key: Tensor, relative_query: Tensor,
    reach: Reach, scale: float, slots: Tensor | None, keep: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """Contexts [B, Q, H, D]; zeros for queries without a key or a place."""
    length, middle = key.shape[1], len(relative_key) // 2
    place = torch.arange(length, device=key.device)
    row = (place[:, None] - place[None, :]).clamp(-middle, middle - 1) + middle
    allowed = (place >= reach.first[..., None]) & (place < reach.last[..., None])  # [B, L, L]
    number = torch.arange(length, device=key.device) if slots is None else slots.long()
    number = number.expand(len(key), length)
    at = number.clamp(min=0)[..., None, None].expand_as(key)
    spread = query.gather(1, at) * (number >= 0)[..., None, None]
    scores = torch.einsum("bihd,bjhd->bhij", spread, key)
    index = row.expand(*scores.shape)
    scores = scores + torch.einsum("bihd,rhd->bhir", spread, relative_key).gather(3, index)
    scores = scores + torch.einsum("rhd,bjhd->bhrj", relative_query, key).gather(2, index)
    weights = (scores * scale).masked_fill(~allowed[:, None], -math.inf).softmax(-1).nan_to_num()
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    contexts = torch.einsum("bhij,bjhd->bihd", weights, value)
    spare = query.new_zeros(len(query), query.shape[1] + 1, *query.shape[2:])
    target = number.masked_fill(number < 0, query.shape[1])[..., None, None].expand_as(contexts)
    return spare.scatter(1, target, contexts)[:, :-1]


def _buckets(case: Case, table: Tensor) -> Tensor:
    farthest, middle = case.max_distance - 1, len(table) // 2
    return torch.arange(-middle, middle, device=table.device).clamp(-farthest, farthest) + middle


def _relative(found: Tensor, expected: Tensor) -> float:
    """Of the difference's norm to the expected one, or to that of elements of a tenth where nothing is expected."""
    found, expected = found.detach().double(), expected.detach()
    assert found.isfinite().all()
    return float((found - expected).norm() / expected.norm().clamp(min=0.1 * expected.numel() ** 0.5))


def _poison(tensors: list[Tensor]) -> None:
    """Leave numbers that are none in freed memory, where a kernel that forgets to write would show them."""
    for tensor in (*tensors, *tensors):
        torch.full_like(tensor, math.nan)
        torch.full(tensor.shape, math.nan, device=tensor.device)
