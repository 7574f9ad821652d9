"""DeepSpeed's configuration of one engine: generated completely from ours, and a user's own merged into it.

What this project's config decides is decided there: where the user's file says otherwise, that is an error which names
both places (DeepSpeed's "auto" always agrees). Everything else, such as bucket sizes or communication types, is taken
over, also where the generated configuration has a value of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.config import PretrainConfig
from pipeline.errors import UserError
from pipeline.storage import open_url, redact

_NEVER = 1 << 62
_BUCKET_ELEMENTS = 50_000_000  # enough to keep a network busy; DeepSpeed's own choice takes gigabytes of buffers
_OURS = {
    "optimizer": "pretrain.learning_rate, pretrain.adam_* and pretrain.weight_decay",
    "scheduler": "pretrain.schedule and pretrain.warmup_steps",
    "checkpoint": "pretrain.checkpoint_every",
    "train_batch_size": "pretrain.global_batch",
    "train_micro_batch_size_per_gpu": "pretrain.micro_batch",
    "gradient_accumulation_steps": "pretrain.global_batch and pretrain.micro_batch",
    "gradient_clipping": "pretrain.max_grad_norm",
    "bf16.enabled": "pretrain.precision",
    "fp16.enabled": "pretrain.precision",
    "zero_optimization.stage": "pretrain.zero_stage",
    "zero_optimization.offload_optimizer.device": "pretrain.offload_optimizer",
}
"""Keys of DeepSpeed's that are never taken over, and what to set instead."""
_NOT_FP32 = "checkpoints hold weights and moments in fp32"
_REFUSED = {
    "zero_optimization.round_robin_gradients": (
        "DeepSpeed then mistakes one parameter's master weights for another's where they are saved"
    ),
    "bf16.bf16_master_weights_and_grads": _NOT_FP32,
    "bf16.bf16_optimizer_states": _NOT_FP32,
    "fp16.fp16_master_weights_and_grads": _NOT_FP32,
    "fp16.loss_scale": "only a loss scale that adapts itself (0) is supported",
}
"""Keys of DeepSpeed's that have to stay off, and why."""


def ds_config(config: PretrainConfig, max_grad_norm: float, processes: int, device: torch.device) -> dict[str, Any]:
    """The configuration of an engine that clips at `max_grad_norm`; nothing is left to DeepSpeed to choose.

    Raises:
        UserError: DeepSpeed has no optimiser for the combination.
    """
    on_gpu = device.type == "cuda"
    precision = config.precision
    if precision == "fp16" and not config.zero_stage:
        raise UserError("pretrain.precision fp16 needs pretrain.zero_stage 1, 2 or 3; or use bf16 or fp32")
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": on_gpu,  # copies every gradient, for the sake of the GPU's allocator
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "overlap_comm": on_gpu,
        "reduce_scatter": on_gpu,
        # Biases and norms stay whole on every process under stage 3; matrices and tables are partitioned.
        "stage3_param_persistence_threshold": 4 * config.model.hidden_size,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.global_batch // (config.micro_batch * processes),
        "gradient_clipping": max_grad_norm,
        # Every stage then skips an update whose gradient is not finite; by itself stage 2 would do it.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        # Without ZeRO, DeepSpeed can only accumulate in the precision of the weights.
        "data_types": {"grad_accum_dtype": "fp32" if precision == "bf16" and config.zero_stage else None},
        # bf16 has 8 bits for a sum over hundreds of processes.
        "communication_data_type": "fp32" if precision == "bf16" else None,
        "zero_optimization": zero,
        # torch's own AdamW is as good on a host as DeepSpeed's, which would have to be compiled there.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }


def read_user_config(url: str, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON object in a user's DeepSpeed file.

    Raises:
        UserError: it is not there, or no JSON object.
    """
    try:
        with open_url(url, options) as file:
            found = json.loads(file.read())
    except OSError as error:
        raise UserError(f"pretrain.deepspeed: cannot read {redact(url)}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"pretrain.deepspeed: {redact(url)} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"pretrain.deepspeed: {redact(url)} holds no JSON object")
    return found


def merge(generated: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    """The generated configuration with the user's keys in it.

    Raises:
        UserError: the user's file says otherwise than our config, naming the key of each, or has a key that cannot be.
    """
    merged = json.loads(json.dumps(generated))
    for path, value in _leaves(user):
        *sections, key = path
        name, inner = ".".join(path), merged
        owner = next((ours for given, ours in _OURS.items() if name == given or name.startswith(f"{given}.")), None)
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise UserError(f"pretrain.deepspeed: {name} is inside {section}, which is {inner!r} here")
        if value == "auto" or (key in inner and inner[key] == value):
            continue
        if value and name in _REFUSED:
            raise UserError(f"pretrain.deepspeed: {name} is {value!r}: {_REFUSED[name]}. Leave it out")
        if owner:
            stands = f"; it is {inner[key]!r} here" if key in inner else ""
            raise UserError(f"pretrain.deepspeed: {name} is {value!r}{stands}. Leave it out and set {owner} instead")
        inner[key] = value
    return merged


def _leaves(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value
