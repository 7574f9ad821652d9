"""One DeepSpeed engine: its configuration, its AdamW, gradients that are sums, and its weights in full precision.

ZeRO partitions the optimiser state over the processes (stage 1), also gradients (2), also weights (3). Under bf16 the
module computes in bf16, gradients are accumulated in fp32, and AdamW updates fp32 master weights.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError

_NEVER = 1 << 62


class Engine:
    """A DeepSpeed engine around one module.

    Args:
        name: for messages and checkpoint directories.
        module: moved to the device, and cast by DeepSpeed.
        peaks: name prefix of parameters -> their peak learning rate; "" = all.
        config: of the stage.
        world: the processes; gradients are summed over them.
    """

    def __init__(
        self, name: str, module: nn.Module, peaks: dict[str, float], config: PretrainConfig, world: World
    ) -> None:
        self.name = name
        self.config = ds_config(config, world)
        module.to(world.device)
        groups = [group for prefix, peak in peaks.items() for group in parameter_groups(module, prefix, peak, config)]
        self._peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        import deepspeed  # only now: it settles on a kind of device while it is imported (model.world)

        with contextlib.redirect_stdout(io.StringIO()):  # it prints tables of memory use; its warnings go elsewhere
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self.config)
        self._world = world
        self._norm = 0.0

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*inputs)

    def learn(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients to those of the step; after the last one, update the weights.

        Gradients are summed over micro-batches and processes: a loss is a share of the step's loss, not a mean.
        """
        # DeepSpeed divides by the number of processes when it reduces.
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)
        if self._engine.is_gradient_accumulation_boundary():
            self._norm = self._unwrapped_norm()
        self._engine.step()

    def set_learning_rate(self, factor: float) -> None:
        """Use this share of the peak learning rates for the next update."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def gradient_norm(self) -> float:
        """The 2-norm of the last update's gradient, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return self._norm if norm is None else float(norm)

    def _unwrapped_norm(self) -> float:
        """The norm where DeepSpeed leaves torch's optimiser as it is (no ZeRO, fp32) and does not report one."""
        if not isinstance(self._engine.optimizer, torch.optim.Optimizer):
            return 0.0
        return float(nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None]))

    def full_state(self) -> dict[str, Tensor]:
        """The module's state dict in fp32, from the master weights, on the host. Every process has to call it.

        Only rank 0 gets the tensors; the other ranks get an empty dict.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        masters = self._master_of_unpartitioned()
        state = {}
        for key, parameter in self._engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            if full is None:
                full = masters.get(parameter, parameter)
            if self._world.is_first:
                state[key] = full.detach().float().cpu().clone()
        return state

    def _master_of_unpartitioned(self) -> dict[nn.Parameter, Tensor]:
        """Without ZeRO, bf16 masters are whole tensors in lists that run parallel to the module's parameters."""
        if self._engine.zero_optimization_stage():
            return {}
        optimizer = self._engine.optimizer
        pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
        return {low: full for lows, fulls in pairs for low, full in zip(lows, fulls, strict=True)}

    def save(self, folder: Path) -> None:
        """Write this process's share of weights and optimiser state below `folder / name`. Every process calls it."""
        (folder / self.name).mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=self.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with as many processes. Every process calls it."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=self.name)
        if path is None:
            raise PipelineError(f"{folder / self.name}: DeepSpeed found no checkpoint there; delete the directory")


def ds_config(config: PretrainConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration, complete: nothing is left to its automatic choices."""
    on_gpu = world.device.type == "cuda"
    mixed = config.precision == "bf16"
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.global_batch // (config.micro_batch * world.size),
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": mixed},
        # Without ZeRO, DeepSpeed can only accumulate in the precision of the weights.
        "data_types": {"grad_accum_dtype": "fp32" if mixed and config.zero_stage else None},
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            "reduce_scatter": on_gpu,
            # Biases and norms stay whole on every process under stage 3; matrices and tables are partitioned.
            "stage3_param_persistence_threshold": 4 * config.model.hidden_size,
        },
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }


def parameter_groups(module: nn.Module, prefix: str, peak: float, config: PretrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups for the parameters whose name starts so: weight decay for all but biases and LayerNorms."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if name.startswith(prefix):
            (free if name.endswith("bias") or "LayerNorm" in name else decayed).append(parameter)
    return [
        {"params": decayed, "lr": peak, "weight_decay": config.weight_decay},
        {"params": free, "lr": peak, "weight_decay": 0.0},
    ]


def schedule(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate for update `step` (from 0): linear up to 1, then linear down to 0, continuous."""
    rising = (step + 1) / warmup if warmup else math.inf
    return min(1.0, rising, (steps - step) / max(1, steps - warmup))
