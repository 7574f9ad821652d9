"""The stage pretrain as a user sees it: losses fall, and no kill, launcher or damage changes what comes out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from pretraining import CONFIG, RESULTS, SHORT, Project, alive, copy_of, wait_until
from ranks import Ranks, train
from safetensors.torch import load_file
from support import flip_bit, mdeberta


@pytest.fixture(scope="module")
def undisturbed(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Project]:
    """The project after one run to the end with so many processes."""
    found: dict[int, Project] = {}

    def of(processes: int) -> Project:
        if processes not in found:
            found[processes] = copy_of(tokens, tmp_path_factory.mktemp("undisturbed") / "project")
            found[processes].train(f"launcher.processes={processes}")
        return found[processes]

    return of


def test_losses_fall_and_everything_is_recorded(undisturbed: Callable[[int], Project]) -> None:
    project = undisturbed(1)
    lines = project.lines()
    assert [line["step"] for line in lines] == list(range(1, 25))
    losses = [line["generator_loss"] for line in lines]
    assert abs(losses[0] - math.log(512)) < 0.3
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0
    assert lines[-1]["discriminator_loss"] < 0.6 < lines[0]["discriminator_loss"]
    assert all(float.fromhex(line["generator_loss_hex"]) == line["generator_loss"] for line in lines)
    validated = [line["step"] for line in lines if "validation_generator_loss" in line]
    assert validated == [8, 16, 24]
    assert lines[23]["validation_generator_loss"] < lines[7]["validation_generator_loss"]
    assert lines[1]["generator_learning_rate"] == 0.005
    assert {"time", "tokens_per_second"} <= project.lines("metrics.jsonl")[0].keys()
    assert project.checkpoints() == {"step-20", "step-24"}
    assert set(json.loads((project.stage / "ds_config.json").read_text())) == {"generator", "discriminator"}
    described = json.loads((project.stage / "model.json").read_text())
    assert described["vocab_rows"] == 512
    assert described["mask_id"] == 500
    assert described["model"]["hidden_size"] == 32
    discriminator = load_file(project.stage / "discriminator.safetensors")
    assert float(discriminator["deberta.embeddings.word_embeddings.delta"].abs().max()) > 0  # E_delta, not the sum


def test_a_finished_stage_is_left_alone(undisturbed: Callable[[int], Project]) -> None:
    project = undisturbed(1)
    before = project.results()
    assert "committed already" in project.train().stderr
    assert project.results() == before


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, [5, 15]), (2, [10])])
def test_a_killed_run_ends_with_the_same_bytes(
    project: Project, undisturbed: Callable[[int], Project], processes: int, kills: list[int]
) -> None:
    for step in kills:
        project.kill_after_checkpoint(step, f"launcher.processes={processes}")
    train(project, processes=processes)
    assert project.results() == undisturbed(processes).results()
    assert [line["step"] for line in project.lines("metrics.jsonl")] == list(range(1, 25))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    project: Project, undisturbed: Callable[[int], Project]
) -> None:
    ranks = Ranks(project)
    project.wait_for_step(16)
    assert ranks.kill(), ranks.messages
    newest = max(int(name[5:]) for name in project.checkpoints())
    damaged = project.stage / "checkpoints" / f"step-{newest}" / "generator" / "rank-00000.safetensors"
    flip_bit(damaged)
    messages = train(project)
    assert f"checkpoint step-{newest} is damaged" in messages
    assert "generator/rank-00000.safetensors is altered" in messages
    assert f"continuing after step {newest - 5} " in messages
    assert project.results() == undisturbed(1).results()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(
    project: Project, undisturbed: Callable[[int], Project], number: int, code: int
) -> None:
    process = project.start("launcher.processes=2")
    wait_until(lambda: project.has_checkpoint(5), process)
    process.send_signal(number)  # to the command alone: it has to pass the signal on
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code, messages
    assert "MANIFEST.json" not in project.results()
    newest = max(int(name[5:]) for name in project.checkpoints())
    assert f"stopped after step {newest};" in messages
    assert project.lines("metrics.jsonl")[-1]["step"] == newest
    train(project, processes=2)
    assert project.results() == undisturbed(2).results()


@pytest.mark.slow
def test_one_failing_process_ends_the_others_and_is_named(project: Project) -> None:
    process = project.start("launcher.processes=2", "steps=100000")
    wait_until(lambda: project.has_checkpoint(5), process)
    children = psutil.Process(process.pid).children()
    second = next(child for child in children if child.environ()["RANK"] == "1")
    second.kill()
    began = time.monotonic()
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - began < 15
    assert "training process 1 was ended by SIGKILL" in messages.splitlines()[-1]
    assert not any(alive(child) for child in children)


@pytest.mark.slow
def test_training_processes_do_not_outlive_the_command(project: Project) -> None:
    process = project.start("launcher.processes=2", "steps=100000")
    wait_until(lambda: project.has_checkpoint(5), process)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while any(alive(child) for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(child) for child in children)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_other_launchers_give_the_same_bytes(
    project: Project, undisturbed: Callable[[int], Project], launcher: str
) -> None:
    command = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "model.pretrain"],
        "deepspeed": [
            str(Path(sys.executable).with_name("deepspeed")),
            *("--num_gpus", "2", "--no_local_rank", "--module", "model.pretrain"),
        ],
    }[launcher]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *command, *project.arguments()]
    for expected in ("step 24/24", "committed already")[: 2 if launcher == "torchrun" else 1]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert expected in done.stderr + done.stdout
    assert project.results() == undisturbed(2).results()


@pytest.mark.slow
def test_every_token_weighs_alike_however_the_batch_is_split(tokens: Path, tmp_path: Path) -> None:
    no_dropout = ["model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0", *SHORT]
    losses = []
    for processes, rows in ((1, 16), (2, 1)):
        project = copy_of(tokens, tmp_path / str(processes))
        train(project, *no_dropout, f"micro_batch={rows}", processes=processes)
        losses.append([line["generator_loss"] for line in project.lines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_a_mistake_is_one_sentence_with_a_way_out(project: Project) -> None:
    messages = project.train("model.vocab_size=400", expect=2).stderr
    assert "pretrain.model.vocab_size 400 is less than the 501 ids" in messages.splitlines()[-1]
    assert "Traceback" not in messages


@pytest.mark.slow
def test_object_stores_work_like_disks(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_options: dict[str, dict[str, Any]]
) -> None:
    import s3fs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = s3fs.S3FileSystem(**s3_options["s3"])
    store.put(str(tokens / "work"), "bucket/run", recursive=True)
    config = tmp_path / "conf.yaml"
    config.write_text(yaml.safe_dump({"work_dir": "s3://bucket/run", "storage_options": s3_options, **CONFIG}))
    changes = [word for change in (*SHORT, "trackers=['tensorboard']") for word in ("--set", f"pretrain.{change}")]
    mdeberta("run", "-c", str(config), *changes, "pretrain")
    (stage,) = store.ls("bucket/run/pretrain")
    whole = {name: store.cat(f"{stage}/{name}") for name in RESULTS}
    assert store.glob(f"{stage}/tensorboard/events*")
    store.rm([f"{stage}/{name}" for name in (*RESULTS, "checkpoints/step-6/COMMITTED.json")])
    assert "continuing after step 3 " in mdeberta("run", "-c", str(config), *changes, "pretrain").stderr
    store.invalidate_cache()
    assert {name: store.cat(f"{stage}/{name}") for name in RESULTS} == whole
    on_disk = copy_of(tokens, tmp_path / "project")
    train(on_disk, *SHORT)
    assert on_disk.results() == whole
