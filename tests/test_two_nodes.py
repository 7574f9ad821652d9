"""Pretraining on two nodes that reach each other by network alone: every launcher, a lost node, a lost cable."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from network import Node, two_nodes
from pretraining import Project, copy_of
from ranks import train

BIN = Path(sys.executable).parent
PRETRAIN = ("-m", "model.pretrain")
Launch = Callable[[Node, int, list[str]], "subprocess.Popen[str]"]


def with_torchrun(node: Node, rank: int, arguments: list[str]) -> subprocess.Popen[str]:
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=node-0:29400", "--rdzv-id=run"]
    return node.start(str(BIN / "torchrun"), "--nnodes=2", "--nproc-per-node=1", *rendezvous, *PRETRAIN, *arguments)


def with_deepspeed(node: Node, rank: int, arguments: list[str]) -> subprocess.Popen[str]:
    """As ssh would start it on every node."""
    hostfile = node.hosts_file.with_name("hostfile")
    hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")
    there = [f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={rank}", "--master_addr=node-0"]
    command = [str(BIN / "deepspeed"), *there, "--module", "model.pretrain", *arguments]
    return node.start(*command, DS_ACCELERATOR="cpu")


def with_srun(node: Node, rank: int, arguments: list[str]) -> subprocess.Popen[str]:
    """With the variables that srun gives a task."""
    variables = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "node-[0-1]",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURMD_NODENAME": node.host,
    }
    return node.start(sys.executable, *PRETRAIN, *arguments, **variables)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    with two_nodes(tmp_path) as pair:
        yield pair


@pytest.fixture(scope="module")
def undisturbed(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine with two processes makes of the project."""
    project = copy_of(tokens, tmp_path_factory.mktemp("one-machine") / "project")
    train(project, processes=2)
    return project.results()


def start(
    nodes: tuple[Node, Node], project: Project, *changes: str, launch: Launch = with_torchrun
) -> list[subprocess.Popen[str]]:
    """The same command on both nodes."""
    arguments = project.arguments(*changes)
    return [launch(node, rank, arguments) for rank, node in enumerate(nodes)]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def sentence(process: subprocess.Popen[str], seconds: float) -> str:
    """What a command that ends within so many seconds says at the end: one sentence."""
    _, said = process.communicate(timeout=seconds)
    assert process.returncode != 0, said
    (found,) = [line for line in said.splitlines() if line.startswith("mdeberta: ")]
    return found


def wait_for(condition: Callable[[], Any], processes: list[subprocess.Popen[str]]) -> None:
    """Wait for something that commands bring about while they all run."""
    end = time.monotonic() + 60
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("launch", [with_torchrun, with_deepspeed, with_srun])
def test_two_nodes_train_as_one_machine_does(
    nodes: tuple[Node, Node], project: Project, undisturbed: dict[str, bytes], launch: Launch
) -> None:
    finish(start(nodes, project, launch=launch))
    assert project.results() == undisturbed


def test_a_killed_node_ends_the_other_and_comes_back(
    nodes: tuple[Node, Node], project: Project, undisturbed: dict[str, bytes]
) -> None:
    """First the node that only computes, then the one through which the others found each other."""
    for victim, step in ((1, 5), (0, 15)):
        processes = start(nodes, project)
        wait_for(partial(project.has_checkpoint, step), processes)
        nodes[victim].kill()
        processes[victim].communicate()
        assert "run the same command again" in sentence(processes[1 - victim], seconds=30)
    finish(start(nodes, project))
    assert project.results() == undisturbed


def test_a_short_cut_of_the_network_does_not_show(
    nodes: tuple[Node, Node], project: Project, undisturbed: dict[str, bytes]
) -> None:
    processes = start(nodes, project)
    wait_for(partial(project.has_checkpoint, 5), processes)
    nodes[1].plug(False)
    time.sleep(2)
    nodes[1].plug(True)
    finish(processes)
    assert project.results() == undisturbed


def test_a_long_cut_of_the_network_ends_both_nodes(nodes: tuple[Node, Node], project: Project) -> None:
    """Without torchrun, which waits for the network's return to tell the other torchrun that its processes ended."""
    processes = start(nodes, project, "launcher.stall_minutes=0.1", launch=with_srun)
    wait_for(partial(project.has_checkpoint, 5), processes)
    nodes[1].plug(False)
    for process in processes:
        assert "run the same command again" in sentence(process, seconds=30)
