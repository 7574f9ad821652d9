"""Which process of the run this one is, as its launcher says it in environment variables. Nothing here imports torch.

Understood are RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which `mdeberta run`, torchrun and deepspeed
set, and what srun and Open MPI's mpirun set instead. Without any of them the process is alone.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from pipeline.errors import UserError

_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
_SLURM_PORTS = range(20_000, 30_000)  # below those that Linux gives to outgoing connections


@dataclass(frozen=True)
class Place:
    """This process among those of the run, and where they meet: rank 0 listens at `address`:`port`."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @property
    def label(self) -> str:
        """This process for people: `rank 3 on node7`."""
        return f"rank {self.rank} on {socket.gethostname()}"


def settle() -> Place:
    """Find this process's place and set the variables that torch and DeepSpeed read accordingly.

    Raises:
        UserError: a variable is no number, or one is missing or contradicts another.
    """
    names = next((names for names in _NAMES if names[0] in os.environ), _NAMES[0])
    rank, size, local_rank = (_number(name, default) for name, default in zip(names, (0, 1, 0), strict=True))
    if not local_rank <= rank < size or (size > 1 and names[0] not in os.environ):
        said = ", ".join(f"{name}={os.environ.get(name, 'nothing')}" for name in names)
        raise UserError(
            f"{said} contradict each other: ranks count from 0 to {names[1]} - 1, those of one machine not beyond; "
            "start the run with torchrun, deepspeed, srun or mdeberta run, or set all of them"
        )
    slurm = names[0].startswith("SLURM") and size > 1
    address = os.environ.get("MASTER_ADDR") or (_first_host() if slurm else "127.0.0.1" if size == 1 else None)
    port = _number("MASTER_PORT", _slurm_port() if slurm else free_port() if size == 1 else -1)
    if address is None or not 0 < port < 1 << 16:
        raise UserError(
            f"MASTER_ADDR={address or 'nothing'}, MASTER_PORT={os.environ.get('MASTER_PORT', 'nothing')}: {size} "
            "processes need a host, that of rank 0, and a free port of it to meet at"
        )
    found = Place(rank, size, local_rank, address, port)
    values = (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank), ("MASTER_ADDR", address))
    os.environ.update({name: str(value) for name, value in (*values, ("MASTER_PORT", port))})
    return found


def free_port() -> int:
    """A TCP port nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0 and name in os.environ:
        raise UserError(f"{name}={text!r} is not a number; the launcher sets it, or unset it to run one process alone")
    return number


def _first_host() -> str | None:
    """The first host of SLURM's list, where rank 0 runs: node07 of `node[07-09,12],gpu5`."""
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts).split(",")[0] or None


def _slurm_port() -> int:
    """A port that jobs on the same host, and steps of the same job, are unlikely to share."""
    job, step = _number("SLURM_JOB_ID", 0), _number("SLURM_STEP_ID", 0)
    return _SLURM_PORTS[(job + 101 * step) % len(_SLURM_PORTS)]
