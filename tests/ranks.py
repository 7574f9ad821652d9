"""Training processes that begin with everything imported, so that a trial takes no longer than its training."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from pretraining import Project

from model.launch import free_port

Sabotage = Callable[[int], None]
"""Called in each process with its rank, before it trains."""
_PRELOADED = (
    "ranks",
    "faults",
    "model.pretrain",
    "deepspeed",
    # What is imported only when the first optimiser and the first engine are made: 2 s a process.
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


class Ranks:
    """The processes of one run of the stage, at work.

    Args:
        project: where.
        changes: overrides of the section pretrain.
        processes: how many.
        sabotage: a function of a module, or a partial one.
    """

    def __init__(self, project: Project, *changes: str, processes: int = 1, sabotage: Sabotage | None = None) -> None:
        self._output = project.config.with_name("messages.txt")
        self._output.write_text("")
        port, arguments = free_port(), project.arguments(*changes)
        self.processes = [
            _context().Process(target=_train, args=(rank, processes, port, arguments, str(self._output), sabotage))
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> bool:
        """`kill -9` all of them; whether they were still at work."""
        at_work = all(process.is_alive() for process in self.processes)
        for process in self.processes:
            process.kill()
        self.wait()
        return at_work

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Their exit codes once all have ended."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    @property
    def messages(self) -> str:
        """What they have written to the terminal."""
        return self._output.read_text()


def train(
    project: Project, *changes: str, processes: int = 1, sabotage: Sabotage | None = None, expect: int = 0
) -> str:
    """Run the stage to its end, check the exit codes and return the messages."""
    ranks = Ranks(project, *changes, processes=processes, sabotage=sabotage)
    codes = ranks.wait()
    assert codes == [expect] * processes, ranks.messages
    return ranks.messages


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _train(rank: int, size: int, port: int, arguments: list[str], output: str, sabotage: Sabotage | None) -> None:
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from model.pretrain import main

    if sabotage:
        sabotage(rank)
    main(arguments)
