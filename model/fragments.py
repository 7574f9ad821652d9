"""This process's share of an engine's weights and Adam moments, by parameter, as views into DeepSpeed's buffers.

ZeRO lays parameters end to end in flat fp32 buffers and cuts those, or under stage 3 every parameter, into one piece a
process. A *fragment* is what a process owns of one parameter: elements [start, start + n) of its flattened weights and
of both moments. The fragments of all processes cover every parameter, whatever their number and the ZeRO stage (without
ZeRO each process holds everything), and that is all it takes to go on with others: whoever needs a range finds it by
the parameter's name.

Nothing is copied: copying into a fragment changes the engine's state, and `refresh` then makes the weights it computes
with follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """Elements [start, start + n) of one flattened parameter; three fp32 tensors of shape [n]."""

    name: str
    start: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each of `KINDS` and its tensor."""
        return ((kind, getattr(self, kind)) for kind in KINDS)


def fragments(engine: Any, rank: int) -> list[Fragment]:
    """What process `rank`, this one, owns of a DeepSpeed engine's parameters; the same order at every call.

    Moments that do not exist before the first update are made, as zeros.
    """
    stage, named = engine.zero_optimization_stage(), list(engine.module.named_parameters())
    if stage == 3:
        return [found for name, parameter in named if (found := _of_partitioned(name, parameter, engine, rank))]
    if stage:
        return [_of_flat(name, parameter, engine) for name, parameter in named if parameter._hp_mapping is not None]
    masters = masters_of_unpartitioned(engine.optimizer)
    return [_fragment(name, 0, masters.get(parameter, parameter), engine) for name, parameter in named]


def problem(engine: Any, rank: int) -> str | None:
    """What keeps the fragments from being what they say they are, if anything: who saved them would mix up a model.

    DeepSpeed documents none of the places that they are found in. Each is compared with the weights that the module
    computes with, so both have to be as they are at the start or after `refresh`.
    """
    parameters = dict(engine.module.named_parameters())
    for fragment in fragments(engine, rank):
        other = next((tensor.dtype for _, tensor in fragment.tensors() if tensor.dtype != torch.float32), None)
        if other:
            return f"weights or moments of {fragment.name} are {str(other).removeprefix('torch.')} instead of float32"
        parameter, count = parameters[fragment.name], len(fragment.weight)
        if engine.zero_optimization_stage() == 3:
            computed = parameter.ds_tensor.flatten()[:count]
        else:
            computed = parameter.detach().flatten()[fragment.start : fragment.start + count]
        if not torch.equal(fragment.weight.to(computed.device, computed.dtype), computed):
            return f"the master weights of {fragment.name} are not where DeepSpeed says"
    return None


def masters_of_unpartitioned(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Without ZeRO: parameter -> fp32 master weight, where DeepSpeed keeps one (in lists that run parallel)."""
    pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
    return {low: full for lows, fulls in pairs for low, full in zip(lows, fulls, strict=True)}


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Compute with the master weights as they are now. Every process has to call it, after its fragments changed."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()
    else:
        for low, full in masters_of_unpartitioned(optimizer).items():
            low.copy_(full)


def set_updates(engine: Any, rank: int, updates: int) -> None:
    """Tell Adam how many updates its moments have seen; its bias correction depends on it."""
    fragments(engine, rank)  # makes the moments
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(updates)


def updates_seen(engine: Any) -> int:
    """How many updates Adam's moments have seen."""
    return next((int(state["step"]) for state in engine.basic_optimizer.state.values()), 0)


def _of_flat(name: str, parameter: Any, engine: Any) -> Fragment:
    """Stages 1 and 2: a parameter's piece of the flat buffer of its group."""
    mapping, optimizer = parameter._hp_mapping, engine.optimizer
    groups = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    flat, address = groups[mapping.param_group_index], mapping.hp_fragment_address
    within = slice(address.start, address.start + address.numel)
    return _fragment(name, mapping.lp_fragment_address.start, flat, engine, within)


def _of_partitioned(name: str, parameter: Any, engine: Any, rank: int) -> Fragment | None:
    """Stage 3: every parameter is cut into equal pieces, the last ones padded; None where this one is all padding."""
    optimizer = engine.optimizer
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * size
    count = min(size, parameter.ds_numel - start)
    if count <= 0:
        return None
    return _fragment(name, start, optimizer.fp32_partitioned_groups_flat[group], engine, slice(offset, offset + count))


def _fragment(name: str, start: int, flat: Tensor, engine: Any, within: slice = slice(None)) -> Fragment:
    state = engine.basic_optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    tensors = (flat.detach(), state["exp_avg"], state["exp_avg_sq"])
    return Fragment(name, start, *(tensor.view(-1)[within] for tensor in tensors))
