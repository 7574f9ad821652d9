"""Two real training processes: what happens to one ends both within 30 s, with one sentence that says what it was."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from pretraining import Project, wait_until
from support import MDEBERTA, mdeberta

from model.lifeline import Channel, Hub, connect
from model.place import free_port
from model.training import Pretraining
from pipeline.errors import PipelineError

HOST = socket.gethostname()
PRETRAIN = [sys.executable, "-m", "model.pretrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "model.pretrain"]
ENDLESS = ("steps=100000", "checkpoint_every=5")
BROKEN = """
import os

if os.environ.get("RANK") == "1":
    from model.heartbeat import Heartbeats

    beat = Heartbeats.beat

    def broken(self, step, phase, busy_seconds):
        beat(self, step, phase, busy_seconds)
        if step == 4:
            raise ZeroDivisionError("a broken processor")

    Heartbeats.beat = broken
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts commands in process groups of their own, which end with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def pair(start: Start, project: Project) -> Callable[..., list[subprocess.Popen[str]]]:
    """Starts two training processes without any launcher, and waits until they train."""

    def run(*changes: str) -> list[subprocess.Popen[str]]:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [*PRETRAIN, *project.arguments(*ENDLESS, *changes)]
        both = [start(*command, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
        wait_until(lambda: project.has_checkpoint(5), both[0])
        return both

    return run


def sentence(process: subprocess.Popen[str], code: int = 1, seconds: float = 30) -> str:
    """The one sentence with which a process ends in so many seconds."""
    _, said = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    assert "Traceback" not in said
    (found,) = [line for line in said.splitlines() if line.startswith("mdeberta: ")]
    return found


def received(channel: Channel) -> list[dict[str, Any]]:
    """The next messages; empty if nothing more can come."""
    while channel.open:
        if messages := channel.receive():
            return messages
        time.sleep(0.01)
    return []


def test_a_connection_carries_messages_both_ways_and_shows_its_end() -> None:
    hub = Hub(local=True)
    member = connect("127.0.0.1", hub.invitation, rank=3)
    member.send({"word": "ж" * 100_000})
    while 3 not in hub.channels:
        hub.accept()
    assert received(hub.channels[3]) == [{"word": "ж" * 100_000}]
    hub.channels[3].send({"last": "words"})
    hub.channels[3].close()
    assert received(member) == [{"last": "words"}]
    assert received(member) == []
    assert not member.open
    hub.close()
    with pytest.raises(PipelineError, match=r"rank 0 cannot be reached at 127\.0\.0\.1:"):
        connect("127.0.0.1", (free_port(), ""), rank=1)


def test_nobody_leaves_before_the_slowest_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(local=True)
    members: list[Channel] = []
    late = threading.Timer(0.3, lambda: members.append(connect("127.0.0.1", hub.invitation, rank=1)))
    late.start()
    hub.expect(1)
    late.join()
    hub.channels[1].send({"leaving": True})
    hub.channels[1].close()
    assert received(members[0]) == [{"leaving": True}]
    monkeypatch.setattr("model.lifeline._CONNECT_SECONDS", 0.1)
    with pytest.raises(PipelineError, match="1 of 2 other processes did not reach rank 0 at port"):
        hub.expect(2)
    hub.close()


def test_strangers_are_not_listened_to() -> None:
    hub = Hub(local=True)
    port, _ = hub.invitation
    said = (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "token": "guessed"}\n{"failure": "x"}\n', b"[1]\n", b"\xff\n")
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in said]
    for stranger, line in zip(strangers, said, strict=True):
        stranger.sendall(line)
    member = connect("127.0.0.1", hub.invitation, rank=1)
    member.send({"word": 1})
    while not hub.channels:
        hub.accept()
    assert received(hub.channels[1]) == [{"word": 1}]
    for channel in (*strangers, member, hub):
        channel.close()


def test_an_error_is_told_before_anything_that_may_take_its_time() -> None:
    done: list[str] = []

    def fail() -> int:
        raise ZeroDivisionError("a broken processor")

    run: Any = SimpleNamespace(
        _resume=fail,
        watch=SimpleNamespace(tell=lambda error: done.append(f"told of {type(error).__name__}")),
        metrics=SimpleNamespace(close=lambda: done.append("closed")),
    )
    with pytest.raises(ZeroDivisionError):
        Pretraining.execute(run)
    assert done == ["told of ZeroDivisionError", "closed"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mdeberta", "torchrun"])
def test_an_error_on_one_rank_ends_all_with_its_sentence(
    project: Project, start: Start, tmp_path: Path, launcher: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    command = {
        "mdeberta": [MDEBERTA, "run", *project.arguments(*ENDLESS, "launcher.processes=2"), "pretrain"],
        "torchrun": [*TORCHRUN, *project.arguments(*ENDLESS)],
    }[launcher]
    process = start(*command, PYTHONPATH=str(tmp_path))
    wait_until(lambda: list(project.work.glob("pretrain/*/metrics.jsonl")), process)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    sentences = {line for line in said.splitlines() if line.startswith(("mdeberta: ", "error: "))}
    (only,) = sentences
    assert only.endswith(f"rank 1 on {HOST}: ZeroDivisionError: a broken processor")
    assert "pretrain: rank 1" in said  # the traceback is there for whoever wants it


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_the_one_that_is_left(
    pair: Callable[..., list[subprocess.Popen[str]]], victim: int
) -> None:
    both = pair()
    both[victim].kill()
    said = sentence(both[1 - victim])
    assert f"mdeberta: rank {victim} on {HOST} ended without a word at step " in said
    assert "run the same command again" in said


@pytest.mark.slow
def test_a_killed_process_ends_torchrun(project: Project, start: Start) -> None:
    process = start(*TORCHRUN, *project.arguments(*ENDLESS))
    wait_until(lambda: project.has_checkpoint(5), process)
    children = psutil.Process(process.pid).children()
    next(child for child in children if child.environ()["RANK"] == "0").kill()
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert not psutil.wait_procs(children, timeout=1)[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stalled_process_is_named_and_the_run_ends(
    pair: Callable[..., list[subprocess.Popen[str]]], victim: int
) -> None:
    both = pair("launcher.stall_minutes=0.1")
    both[victim].send_signal(signal.SIGSTOP)
    said = sentence(both[1 - victim])
    assert "mdeberta: no step ended for " in said
    assert f"rank {victim} on {HOST} gave no sign of life any more, last at step " in said
    assert f", rank {1 - victim} on {HOST} at step " in said
    both[victim].send_signal(signal.SIGCONT)
    both[victim].communicate(timeout=30)
    assert both[victim].returncode == 1


@pytest.mark.slow
def test_time_for_which_the_run_was_itself_stopped_does_not_count(
    pair: Callable[..., list[subprocess.Popen[str]]], project: Project
) -> None:
    both = pair("launcher.stall_minutes=0.1")
    for process in both:
        process.send_signal(signal.SIGSTOP)
    time.sleep(10)
    for process in both:
        process.send_signal(signal.SIGCONT)
    newest = max(int(name[5:]) for name in project.checkpoints())
    wait_until(lambda: project.has_checkpoint(newest + 20), both[0], seconds=30)
    assert both[1].poll() is None


@pytest.mark.slow
def test_status_shows_speed_and_slowest_process_of_a_run(
    pair: Callable[..., list[subprocess.Popen[str]]], project: Project
) -> None:
    pair()
    shown = ""
    end = time.monotonic() + 30
    while "steps/s" not in shown and time.monotonic() < end:
        shown = mdeberta("status", *project.arguments(*ENDLESS)).stdout
    assert re.search(r"slowest of 2 processes: rank [01], [0-9.e-]+ s a step \(median [0-9.e-]+ s\)", shown), shown
    assert re.search(r"a run is working on it, step [0-9]+ of 100,000, ", shown), shown
    assert re.search(r"[0-9.]+ steps/s, .*, last sign of life [0-9.]+ s ago \(phase [a-z]+\)", shown), shown
