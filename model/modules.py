"""`nn.Linear` and `nn.Dropout` with faster ways on CPUs, where torch is slow at both; elsewhere they are torch's own.

Products in fp32: torch multiplies with MKL, which gives processors that are not Intel's half of what they can do.
oneDNN comes with torch as well and uses their widest instructions. Small products and other precisions stay with torch.

Dropout: torch draws a double for every element. Sixteen random bits decide as well, and cost a quarter of a draw.

Shapes: n rows, k summed over, m columns.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_WORTHWHILE = 1 << 23
"""Multiply-adds from which oneDNN's preparation pays."""

_SIXTEEN_BITS = 1 << 16

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is with torch for GPUs."""
    return find_spec("triton") is not None


class Linear(nn.Linear):
    """`nn.Linear` with a bias, names and all, and its three products by `product` where that is the faster way."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., k] to [..., m]."""
        return _linear(states, self.weight, self.bias)


def joint_linear(states: Tensor, *layers: Linear) -> Tensor:
    """[..., k] through several layers, [..., sum of their m]: one product instead of one for each.

    What it saves is reading `states` more than once and, in the backward pass, adding up as many gradients of it; what
    it costs is a copy of the weights. ZeRO stage 3 gathers weights for a layer's own call alone; there each is called.
    """
    if any(hasattr(layer.weight, "ds_id") for layer in layers):  # DeepSpeed's mark of a partitioned parameter
        return torch.cat([layer(states) for layer in layers], -1)
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return _linear(states, weight, bias)


def _linear(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[..., k], [m, k] and [m] to [..., m]."""
    if not _suits_onednn(states, states.numel() * len(weight)):
        return F.linear(states, weight, bias)
    flat = states.reshape(-1, states.shape[-1])
    return _Linear.apply(flat, weight, bias).view(*states.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """states [n, k] @ weight [m, k].T + bias [m]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _onednn(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, weight = ctx.saved_tensors
        return product(grad, weight), transposed_product(grad, states), grad.sum(0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """[n, k] @ [k, m] outside of autograd."""
    if _suits_onednn(left, left.numel() * right.shape[1]):
        return _onednn(left, right.mT, None)
    return left @ right


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """[n, m].T @ [n, k] outside of autograd, without a transposed copy: a gradient of weights."""
    if _suits_onednn(left, left.numel() * right.shape[1]):
        weight = right.new_empty(left.shape[1], right.shape[1])  # looked at for its kind alone
        operands = (left.contiguous().to_mkldnn(), right.contiguous().to_mkldnn())
        found, _ = torch.ops.aten.mkldnn_linear_backward_weights(*operands, weight, False)
        return found
    return left.mT @ right


def _suits_onednn(tensor: Tensor, multiply_adds: int) -> bool:
    on_cpu = tensor.device.type == "cpu" and tensor.dtype == torch.float32
    return on_cpu and _HAS_ONEDNN and multiply_adds >= _WORTHWHILE


def _onednn(left: Tensor, right_transposed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.mkldnn_linear(left.contiguous().to_mkldnn(), right_transposed, bias).to_dense()


class Dropout(nn.Dropout):
    """Sets elements to zero with probability p, rounded to 1/65536 on CPUs, and scales the others to keep the mean."""

    def forward(self, values: Tensor) -> Tensor:
        """A tensor of any shape to one of the same."""
        return dropout(values, self.p if self.training else 0.0)


def dropout(values: Tensor, p: float) -> Tensor:
    """What `Dropout` does in training."""
    if p == 0.0 or values.device.type != "cpu":
        return F.dropout(values, p)
    return _Dropout.apply(values, round(p * _SIXTEEN_BITS))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dropped: int) -> Tensor:
        bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: values.numel()].view(values.shape) >= dropped - _SIXTEEN_BITS // 2
        ctx.save_for_backward(keep)
        ctx.scale = _SIXTEEN_BITS / (_SIXTEEN_BITS - dropped) if dropped < _SIXTEEN_BITS else 0.0
        return (values * keep).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None
