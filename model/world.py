"""The processes of a run: who this one is, its device, and what they have to agree on.

Tensors of the training itself travel through DeepSpeed. Everything that only the host needs (counts, decisions, errors)
goes over a gloo group, so that agreeing never waits for a GPU.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from model.failure import is_lost_connection
from model.place import Place
from pipeline.errors import PipelineError, UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
T = TypeVar("T")
_MARGIN_SECONDS = 60.0


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


def join(place: Place, stall_seconds: float) -> World:
    """Meet the other processes of the run.

    Args:
        place: of this process.
        stall_seconds: after so long without a step the run is ended (`model.heartbeat`); anything that waits for
            another process gives up a little later, should that fail.

    Raises:
        UserError: this machine has GPUs, but fewer than processes.
        PipelineError: the others did not come.
    """
    device = _device(place.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed  # reads DS_ACCELERATOR while it is imported

    if device.type == "cpu":
        _keep_freed_memory()
        # Nothing here uses DeepSpeed's compiled CPU kernels; an empty list of them keeps it from building one at start.
        deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=stall_seconds + _MARGIN_SECONDS)
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False, dist_init_required=True, timeout=timeout)
        host_group = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        reason = str(error).partition("\n")[0]
        raise PipelineError(
            f"the {place.size} processes did not meet at {place.address}:{place.port} ({reason}); look for the error "
            "of one that did not come, a firewall, or a taken port (MASTER_PORT), and run the same command again"
        ) from None
    return World(place.rank, place.size, device, host_group)


def leave() -> None:
    """Leave the process group, so that no rank complains about the others' absence."""
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_rank + 1} or more processes on a machine with {torch.cuda.device_count()} GPUs; start one a GPU "
            "(pretrain.launcher.processes), and let each see all of them (srun --gpu-bind=none)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _keep_freed_memory() -> None:
    """Have the C library keep large blocks that were freed, for the next tensor of that size.

    It would give them back, and the kernel would hand out zeroed pages again: a fifth of a step in a small model. Other
    C libraries than glibc are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
