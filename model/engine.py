"""One DeepSpeed engine: its AdamW, gradients that are sums, its weights in full precision, and this process's share.

ZeRO partitions the optimiser state over the processes (stage 1), also gradients (2), also weights (3). Under bf16 and
fp16 the module computes in that precision, gradients are accumulated in fp32 where DeepSpeed can, and AdamW updates
fp32 master weights. An update whose gradient is not finite is skipped: nothing changes, not even Adam's count of them.
"""

from __future__ import annotations

import contextlib
import gc
import io
from typing import Any

import torch
from torch import Tensor, nn

from model.ds_config import ds_config, merge
from model.fragments import (
    Fragment,
    fragments,
    masters_of_unpartitioned,
    problem,
    refresh,
    set_updates,
    updates_seen,
)
from model.phases import Phases
from model.schedule import Schedule
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError, UserError

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_AT_MINIMUM = "loss scale already at minimum"  # of the bare exception that DeepSpeed raises


class LossScaleError(PipelineError):
    """fp16 overflowed, and the loss scale cannot get any smaller; on every process alike."""


class Engine:
    """A DeepSpeed engine around one module.

    Args:
        name: for messages and checkpoints.
        module: moved to the device, and cast by DeepSpeed.
        schedules: name prefix of parameters -> their learning rate; "" = all.
        max_grad_norm: longer gradients are scaled down to it.
        config: of the stage.
        world: the processes; gradients are summed over them.
        phases: the clock that backward pass and update are timed by.
        user: DeepSpeed configuration to merge into the generated one.

    Raises:
        UserError: the precision is not possible here, or the user's configuration contradicts the run's.
        PipelineError: DeepSpeed does not keep weights and moments as this project knows it.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        schedules: dict[str, Schedule],
        max_grad_norm: float,
        config: PretrainConfig,
        world: World,
        phases: Phases,
        user: dict[str, Any],
    ) -> None:
        if config.precision == "fp16" and world.device.type != "cuda":
            raise UserError("pretrain.precision fp16 needs a GPU; use bf16 or fp32 here")
        self.name = name
        self.config = merge(ds_config(config, max_grad_norm, world.size, world.device), user)
        module.to(world.device)
        groups = [group for prefix in schedules for group in parameter_groups(module, prefix, config.weight_decay)]
        self._schedules = [schedule for schedule in schedules.values() for _ in range(2)]
        optimizer = torch.optim.AdamW(
            groups,
            lr=0.0,  # some of DeepSpeed's wrappers take a step with zero gradients to make the moments
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        import deepspeed  # only now: it settles on a kind of device while it is imported (model.world)

        gc.freeze()  # it collects garbage a dozen times, which takes 0.2 s each if all that is imported is looked at
        with contextlib.redirect_stdout(io.StringIO()):  # it prints tables of memory use; its warnings go elsewhere
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self.config)
        self._world, self._phases = world, phases
        self._norm = 0.0
        set_updates(self._engine, world.rank, 0)
        if found := problem(self._engine, world.rank):
            raise PipelineError(
                f"{name}: {found}, so checkpoints would be wrong. Leave keys out of the file of pretrain.deepspeed, if "
                f"there is one; else DeepSpeed {deepspeed.__version__} is not supported"
            )

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*inputs)

    def learn(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients to those of the step; after the `last` one, update the weights.

        Gradients are summed over micro-batches and processes: a loss is a share of the step's loss, not a mean.

        Raises:
            LossScaleError: fp16 overflows whatever the loss scale.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides by the number of processes when it reduces.
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)
        if last:
            self._phases.begin("optimizer")
            if self._is_plain:
                self._prepare_plain_update()
        try:
            self._engine.step()
        except Exception as error:
            if _AT_MINIMUM in str(error):
                raise LossScaleError(f"{self.name}: {error}") from None
            raise
        if last:
            self._forget_skipped_gradients()

    def set_learning_rates(self, step: int) -> None:
        """Use the rates of update `step`, from 0, for the next one."""
        for group, schedule in zip(self._engine.optimizer.param_groups, self._schedules, strict=True):
            group["lr"] = schedule.rate(step)

    def gradient_norm(self) -> float:
        """The 2-norm of the last update's gradient before clipping; not finite where the update was skipped."""
        return self._norm if self._is_plain else float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by under fp16; None in other precisions."""
        return float(self._engine.optimizer.loss_scaler.cur_scale) if self._engine.fp16_enabled() else None

    @property
    def _is_plain(self) -> bool:
        """Whether DeepSpeed leaves torch's optimiser as it is (no ZeRO, fp32): it neither reports norms nor skips."""
        return isinstance(self._engine.optimizer, torch.optim.Optimizer)

    def _prepare_plain_update(self) -> None:
        gradients = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._norm = float(norm)
        # As a gradient scaler would tell it: the fused kernel then leaves weights, moments and count alone.
        self._engine.optimizer.found_inf = (~torch.isfinite(norm)).float()

    def _forget_skipped_gradients(self) -> None:
        """DeepSpeed keeps them after an overflow where the optimiser is offloaded: every later step would overflow."""
        optimizer = self._engine.optimizer
        if getattr(optimizer, "overflow", False) and getattr(optimizer, "cpu_offload", False):
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None

    def full_state(self) -> dict[str, Tensor]:
        """The module's state dict in fp32, from the master weights, on the host. Every process has to call it.

        Only rank 0 gets the tensors; the other ranks get an empty dict.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {} if self._engine.zero_optimization_stage() else masters_of_unpartitioned(self._engine.optimizer)
        state = {}
        for key, parameter in self._engine.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            if full is None:
                full = masters.get(parameter, parameter)
            if self._world.is_first:
                state[key] = full.detach().float().cpu().clone()
        return state

    def fragments(self) -> list[Fragment]:
        """This process's share of weights and moments, as views (`model.fragments`)."""
        return fragments(self._engine, self._world.rank)

    def counters(self) -> dict[str, float]:
        """What the state holds besides tensors."""
        scaler = self._engine.optimizer.loss_scaler if self._engine.fp16_enabled() else None
        scaling = {key: getattr(scaler, key) for key in _SCALER_STATE if scaler}
        return {"updates": updates_seen(self._engine), **scaling}

    def restore(self, counters: dict[str, float]) -> None:
        """Take over counters, and the fragments, which have been changed. Every process has to call it."""
        set_updates(self._engine, self._world.rank, int(counters["updates"]))
        for key in _SCALER_STATE:
            if key in counters:
                setattr(self._engine.optimizer.loss_scaler, key, counters[key])
        refresh(self._engine)


def parameter_groups(module: nn.Module, prefix: str, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups for the parameters whose name starts so: weight decay for all but biases and LayerNorms."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if name.startswith(prefix):
            (free if name.endswith("bias") or "LayerNorm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
