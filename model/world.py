"""The processes of a run: who this one is, its device, and what they have to agree on.

Tensors of the training itself travel through DeepSpeed. Everything that only the host needs (counts, decisions, errors)
goes over a gloo group, so that agreeing never waits for a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from model.launch import free_port
from pipeline.errors import UserError

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # rank 0 may have to wait for another run's lock


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    host_group: Any

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def collect(self, value: T) -> list[T]:
        """Every rank's value in the order of ranks, on every rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.host_group)
        return found

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all ranks, on the host."""
        total = values.detach().cpu()
        dist.all_reduce(total, group=self.host_group)
        return total

    def wait(self) -> None:
        """Return when every rank has come here."""
        dist.barrier(group=self.host_group)


def join() -> World:
    """Join the processes that RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; alone without them.

    Raises:
        UserError: this machine has GPUs, but fewer than processes.
    """
    rank, size = int(os.environ.setdefault("RANK", "0")), int(os.environ.setdefault("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    device = _device(local_rank)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed  # reads DS_ACCELERATOR while it is imported

    if device.type == "cpu":
        # Nothing here uses DeepSpeed's compiled CPU kernels; an empty list of them keeps it from building one at start.
        deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, dist_init_required=True)
    return World(rank, size, device, dist.new_group(backend="gloo", timeout=_PATIENCE))


def leave() -> None:
    """Leave the process group, so that no rank complains about the others' absence."""
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_rank + 1} or more processes on a machine with {torch.cuda.device_count()} GPUs; start one a GPU "
            "(pretrain.launcher.processes)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
