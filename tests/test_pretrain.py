"""The stage pretrain as a user sees it: losses fall, and no kill, launcher or damage changes what comes out."""

from __future__ import annotations

import json
import math
import os
import shutil
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
from safetensors.torch import load_file
from support import flip_bit, mdeberta, start

CONFIG: dict[str, Any] = {
    "corpus": {"inputs": [f"package://demo/corpus/{name}.txt.xz" for name in ("de", "en", "sw")], "max_chars": 3000},
    "vocab": {"size": 500, "sample_mb": 0.1, "num_threads": 1},
    "tokens": {"max_seq_len": 32, "validation_fraction": 0.05},
    "pretrain": {
        "steps": 24,
        "global_batch": 16,
        "micro_batch": 4,
        "learning_rate": 0.005,
        "warmup_steps": 2,
        "precision": "fp32",
        "validate_every": 8,
        "validation_rows": 12,
        "checkpoint_every": 5,
        "tensorboard": False,
        "launcher": {"threads": 1},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "generator_num_hidden_layers": 2,
            "max_position_embeddings": 32,
            "position_buckets": 16,
        },
    },
}
RESULTS = ("losses.jsonl", "generator.safetensors", "discriminator.safetensors", "model.json", "MANIFEST.json")
SHORT = ("steps=6", "checkpoint_every=3", "validate_every=3")


class Project:
    """A directory with a config and real tokens, ready to be pretrained on."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.config = folder / "conf.yaml"

    def arguments(self, *changes: str) -> list[str]:
        """Config and overrides of the section pretrain, as the command line wants them."""
        keys = [f"work_dir={self.work}", *(f"pretrain.{change}" for change in changes)]
        return ["-c", str(self.config), *(word for key in keys for word in ("--set", key))]

    def train(self, *changes: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return mdeberta("run", *self.arguments(*changes), "pretrain", expect=expect)

    def start(self, *changes: str) -> subprocess.Popen[str]:
        return start("run", *self.arguments(*changes), "pretrain")

    @property
    def stage(self) -> Path:
        (found,) = (self.work / "pretrain").iterdir()
        return found

    def results(self) -> dict[str, bytes]:
        return {name: (self.stage / name).read_bytes() for name in RESULTS if (self.stage / name).exists()}

    def lines(self, name: str = "losses.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.stage / name).read_text().splitlines()]

    def checkpoints(self) -> set[str]:
        return {path.parent.name for path in self.stage.glob("checkpoints/*/COMMITTED.json")}

    def has_checkpoint(self, step: int) -> bool:
        return any(self.work.glob(f"pretrain/*/checkpoints/step-{step}/COMMITTED.json"))

    def kill_after_checkpoint(self, step: int, *changes: str) -> None:
        """Run until a checkpoint is there, then `kill -9` the whole process group."""
        process = self.start(*changes)
        wait_until(lambda: self.has_checkpoint(step), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def rewind(self, step: int) -> None:
        """Put the stage back to where a run killed some time after this step's checkpoint would have left it."""
        for name in RESULTS:
            (self.stage / name).unlink(missing_ok=True)
        for path in self.stage.glob("checkpoints/*"):
            if path.name != f"step-{step}":
                shutil.rmtree(path)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "conf.yaml").write_text(yaml.safe_dump({"work_dir": str(folder / "work"), **CONFIG}))
    mdeberta("run", "-c", str(folder / "conf.yaml"), "corpus", "vocab", "tokens")
    return folder


@pytest.fixture
def project(tokens: Path, tmp_path: Path) -> Project:
    return copy_of(tokens, tmp_path / "project")


def copy_of(tokens: Path, folder: Path) -> Project:
    shutil.copytree(tokens, folder)
    return Project(folder)


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


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for something that a running command brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits to be reaped does not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


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
    changes = [f"launcher.processes={processes}"]
    for step in kills:
        project.kill_after_checkpoint(step, *changes)
    project.train(*changes)
    assert project.results() == undisturbed(processes).results()
    assert [line["step"] for line in project.lines("metrics.jsonl")] == list(range(1, 25))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    project: Project, undisturbed: Callable[[int], Project]
) -> None:
    project.kill_after_checkpoint(15)
    newest = max(int(name[5:]) for name in project.checkpoints())
    damaged = project.stage / "checkpoints" / f"step-{newest}" / "generator" / "mp_rank_00_model_states.pt"
    flip_bit(damaged)
    messages = project.train().stderr
    assert f"checkpoint step-{newest} is damaged" in messages
    assert "generator/mp_rank_00_model_states.pt is altered" in messages
    assert f"continuing after step {newest - 5} " in messages
    assert project.results() == undisturbed(1).results()


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_the_last_step(project: Project, undisturbed: Callable[[int], Project]) -> None:
    process = project.start("launcher.processes=2")
    wait_until(lambda: project.has_checkpoint(5), process)
    process.terminate()  # the command alone: it has to pass the signal on
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 143, messages
    newest = max(int(name[5:]) for name in project.checkpoints())
    assert f"stopped after step {newest};" in messages
    assert project.lines("metrics.jsonl")[-1]["step"] == newest
    project.train("launcher.processes=2")
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
@pytest.mark.parametrize(
    "changes",
    [
        ["zero_stage=2", "launcher.processes=2"],
        ["zero_stage=1", "precision=bf16", "launcher.processes=2"],
        ["zero_stage=2", "precision=bf16"],
        ["zero_stage=0"],
        ["zero_stage=0", "precision=bf16"],
        ["embedding_sharing=es"],
        ["embedding_sharing=nes", "updates=joint", "zero_stage=2"],
        ["zero_stage=3", "launcher.processes=2"],
        ["zero_stage=3", "precision=bf16", "embedding_sharing=es"],
        ["objective=mlm", "launcher.processes=2"],
        ["objective=mlm", "zero_stage=3", "precision=bf16"],
        ["masking=windowed"],
    ],
    ids=" ".join,
)
def test_every_mode_trains_and_resumes_exactly(project: Project, changes: list[str]) -> None:
    project.train(*SHORT, *changes)
    whole = project.results()
    first, *_, last = project.lines()
    assert last["generator_loss"] < first["generator_loss"]
    described = json.loads(whole["model.json"])
    if described["objective"] == "rtd":
        own = {"gdes": ["delta"], "nes": ["weight"], "es": []}[described["embedding_sharing"]]
        words = [key for key in load_file(project.stage / "discriminator.safetensors") if "word_embeddings" in key]
        assert [key.rsplit(".")[-1] for key in words] == own
    else:
        assert "discriminator_loss" not in last
        assert whole.keys() == set(RESULTS) - {"discriminator.safetensors"}
    project.rewind(3)
    assert "continuing after step 3 " in project.train(*SHORT, *changes).stderr
    assert project.results() == whole


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["embedding_sharing=gdes", "embedding_sharing=nes", "embedding_sharing=es"])
@pytest.mark.parametrize("updates", ["updates=decoupled", "updates=joint"])
def test_partitioning_changes_no_gradient(tokens: Path, tmp_path: Path, sharing: str, updates: str) -> None:
    if (sharing, updates) == ("embedding_sharing=es", "updates=decoupled"):
        return  # refused: tests/test_config.py
    losses = []
    for stage, processes in ((1, 1), (2, 2), (3, 2)):
        project = copy_of(tokens, tmp_path / str(stage))
        project.train(*SHORT, sharing, updates, f"zero_stage={stage}", f"launcher.processes={processes}")
        keys = ("generator_loss", "discriminator_loss", "generator_embedding_cosine", "discriminator_embedding_cosine")
        losses.append([line[key] for line in project.lines() for key in keys if key in line])
    assert len(losses[0]) == 6 * 2 + 2 * 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["rtd", "mlm"])
def test_a_run_continues_from_its_own_export(project: Project, objective: str) -> None:
    arm = f"objective={objective}"
    project.train(arm, "steps=120", "warmup_steps=10", "checkpoint_every=1000")
    learnt = project.lines()[-1]["validation_generator_loss"]
    start = mdeberta("run", *project.arguments(arm, "steps=120", "warmup_steps=10"), "export")
    assert "export" in start.stderr
    (exported,) = (project.work / "export").iterdir()
    shutil.rmtree(project.stage)
    changes = (arm, "steps=1", "validate_every=1", "learning_rate=1e-9", f"init.checkpoint={exported}")
    messages = project.train(*changes).stderr
    assert "warm start: " in messages
    assert project.lines()[-1]["validation_generator_loss"] == pytest.approx(learnt, abs=1e-3)
    # Which checkpoint it was is part of what the stage is.
    (exported / "model.safetensors").write_bytes(b"another")
    plan = mdeberta("plan", *project.arguments(*changes)).stdout
    assert "pretrain.init.checkpoint" in next(line for line in plan.splitlines() if line.startswith("pretrain"))


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
    for number, split in enumerate((["micro_batch=16"], ["micro_batch=1", "launcher.processes=2"])):
        project = copy_of(tokens, tmp_path / str(number))
        project.train(*no_dropout, *split)
        losses.append([line["generator_loss"] for line in project.lines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_a_mistake_is_one_sentence_with_a_way_out(project: Project) -> None:
    messages = project.train("model.vocab_size=400", expect=2).stderr
    assert "pretrain.model.vocab_size 400 is less than the 501 ids" in messages.splitlines()[-1]
    assert "Traceback" not in messages


@pytest.mark.slow
def test_another_number_of_processes_is_refused_for_now(undisturbed: Callable[[int], Project], tmp_path: Path) -> None:
    project = copy_of(undisturbed(1).work.parent, tmp_path / "project")
    project.rewind(20)
    messages = project.train("launcher.processes=2", expect=2).stderr
    assert "step-20 was written by 1 processes and this run has 2" in messages.splitlines()[-1]


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
    changes = [word for change in (*SHORT, "tensorboard=true") for word in ("--set", f"pretrain.{change}")]
    mdeberta("run", "-c", str(config), *changes, "pretrain")
    (stage,) = store.ls("bucket/run/pretrain")
    whole = {name: store.cat(f"{stage}/{name}") for name in RESULTS}
    assert store.glob(f"{stage}/tensorboard/events*")
    store.rm([f"{stage}/{name}" for name in (*RESULTS, "checkpoints/step-6/COMMITTED.json")])
    assert "continuing after step 3 " in mdeberta("run", "-c", str(config), *changes, "pretrain").stderr
    store.invalidate_cache()
    assert {name: store.cat(f"{stage}/{name}") for name in RESULTS} == whole
    on_disk = copy_of(tokens, tmp_path / "project")
    on_disk.train(*SHORT)
    assert on_disk.results() == whole
