"""Starting and stopping: what launchers say of a process, waiting for a lock, and the signals of batch systems."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pretraining import SHORT, Project, wait_until
from ranks import train
from sabotage import start_otherwise

from model import agreement, launch
from model.place import Place, free_port, settle
from pipeline import configfile, lock
from pipeline.errors import PipelineError, UserError
from pipeline.stage import identities
from pipeline.storage import Folder

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu5,node[07-09,12]",
    "SLURM_STEP_NODELIST": "node[07-09,12],gpu5",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without anything that a launcher sets."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what `settle` sets is taken back
        monkeypatch.delenv(name)
    return monkeypatch


def place_with(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> Place:
    for name, value in variables.items():
        environment.setenv(name, value)
    return settle()


def test_a_process_that_nobody_launched_is_alone(environment: pytest.MonkeyPatch) -> None:
    place = settle()
    assert (place.rank, place.size, place.local_rank, place.address) == (0, 1, 0, "127.0.0.1")
    assert settle() == place


def test_srun_gives_every_task_its_rank_and_the_same_meeting_point(environment: pytest.MonkeyPatch) -> None:
    place = place_with(environment, SRUN)
    assert place == Place(rank=5, size=16, local_rank=1, address="node07", port=24_711)
    assert os.environ["RANK"] == "5"
    assert os.environ["LOCAL_RANK"] == "1"
    assert os.environ["MASTER_ADDR"] == "node07"
    assert place_with(environment, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == Place(
        5, 16, 1, "10.0.0.1", 1234
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a,b", "a"), ("r[1-2]n[03,05]", "r1n03"), ("n[8]-ib,m", "n8-ib"), ("n[010-011]", "n010")],
)
def test_the_first_host_of_a_slurm_list_is_found(environment: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    assert place_with(environment, SRUN | {"SLURM_STEP_NODELIST": nodes}).address == first


def test_a_launcher_inside_a_slurm_job_counts_more_than_slurm(environment: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node08", "MASTER_PORT": "29500"}
    assert place_with(environment, SRUN | torchrun) == Place(1, 2, 0, "node08", 29_500)


def test_mpirun_needs_only_the_meeting_point(environment: pytest.MonkeyPatch) -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    place = place_with(environment, mpi | {"MASTER_ADDR": "node08", "MASTER_PORT": "29500"})
    assert place == Place(3, 4, 1, "node08", 29_500)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2, LOCAL_RANK=nothing contradict each other"),
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=nothing, LOCAL_RANK=nothing contradict"),
        ({"WORLD_SIZE": "2"}, "RANK=nothing, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "LOCAL_RANK=1 contradict"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR=nothing, MASTER_PORT=nothing: 2 processes need a host"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_variables_that_cannot_be_are_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError) as error:
        place_with(environment, variables)
    assert said in str(error.value)


@pytest.mark.slow
def test_a_wrong_variable_is_one_sentence(project: Project) -> None:
    command = [sys.executable, "-m", "model.pretrain", *project.arguments()]
    done = subprocess.run(command, env=os.environ | {"RANK": "x"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("mdeberta: RANK='x' is not a number")
    assert "Traceback" not in done.stderr


def ending(*commands: str) -> Callable[..., list[subprocess.Popen[bytes]]]:
    """Instead of training processes, shells with these commands."""
    return lambda *_: [subprocess.Popen(["sh", "-c", command]) for command in commands]


@pytest.mark.parametrize("sent", [[signal.SIGTERM], []])
def test_after_a_stop_processes_may_take_their_time(monkeypatch: pytest.MonkeyPatch, sent: list[int]) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.2)
    assert launch._wait(ending("sleep 1; exit 143", "exit 143")(), sent) == {0: 143, 1: 143}
    assert launch._wait(ending("sleep 5; exit 143", "exit 1")(), sent) == {1: 1}


def test_a_stop_that_somebody_else_asked_for_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = SimpleNamespace(config=configfile.load("demo"), label="pretrain 0123")
    monkeypatch.setattr(launch, "_start", ending("exit 143", "exit 143"))
    with pytest.raises(SystemExit) as ended:
        launch.run(run)
    assert ended.value.code == 143
    monkeypatch.setattr(launch, "_start", ending("exit 143", "exit 1"))
    with pytest.raises(PipelineError, match="training process 1 ended with exit code 1 "):
        launch.run(run)


@pytest.mark.slow
def test_processes_that_are_started_otherwise_are_refused_by_what_differs(project: Project, tmp_path: Path) -> None:
    config = configfile.load(str(project.config))
    for number in range(2):
        (tmp_path / f"{number}.json").write_text(json.dumps({"steps_per_print": 10 + number}))
    changes = [f"deepspeed={tmp_path}/0.json", "seed=5"]
    own = (f"pretrain.deepspeed={tmp_path}/1.json", "pretrain.seed=6", "pretrain.checkpoint_every=3")
    told = train(project, *changes, processes=2, sabotage=functools.partial(start_otherwise, overrides=own), expect=2)
    (said,) = {line for line in told.splitlines() if line.startswith("mdeberta: ")}
    assert said.startswith(
        "mdeberta: not all processes were started alike: pretrain.seed, pretrain.checkpoint_every, the file of "
        "pretrain.deepspeed, the fingerprint of pretrain of rank 0 and of rank 1 differ"
    )
    assert not (project.work / "pretrain").exists()
    alike = ["pretrain.trackers=[tensorboard]", "pretrain.launcher.processes=2", "pretrain.keep_checkpoints=1"]
    assert agreement._facts(configfile.load(str(project.config), alike)) == agreement._facts(config)


@pytest.mark.slow
def test_sigusr1_leaves_a_checkpoint_and_is_no_failure(project: Project) -> None:
    process = project.start("launcher.processes=2", "steps=100000")
    wait_until(lambda: project.has_checkpoint(5), process)
    process.send_signal(signal.SIGUSR1)  # the command alone: it has to pass the signal on
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    newest = max(int(name[5:]) for name in project.checkpoints())
    assert f"stopped after step {newest};" in messages
    assert project.lines("metrics.jsonl")[-1]["step"] == newest


@pytest.mark.slow
def test_waiting_for_another_run_is_no_stall(project: Project) -> None:
    """Two nodes under torchrun find the stage locked for longer than a step may take."""
    changes = (*SHORT, "launcher.stall_minutes=0.1")
    config = configfile.load(str(project.config), project.arguments(*changes)[3::2])
    stage = identities(config, "pretrain")["pretrain"].fingerprint
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    with lock.hold(Folder(str(project.work / ".locks")), f"pretrain-{stage}"):
        nodes = [
            subprocess.Popen(
                [*torchrun, *meeting, "--node-rank", str(rank), "-m", "model.pretrain", *project.arguments(*changes)],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]
        time.sleep(14)
        assert [node.poll() for node in nodes] == [None, None]
    messages = []
    for node in nodes:
        messages.append(node.communicate(timeout=60)[1])
        assert node.returncode == 0, messages
    assert "another run is working here" in messages[0]
    assert (project.stage / "MANIFEST.json").exists()
    assert not (project.stage / "heartbeats.json").exists()
