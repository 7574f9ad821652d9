"""Every way of pretraining trains and resumes exactly; partitioning changes nothing; an export can be continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pretraining import RESULTS, SHORT, Project, copy_of
from ranks import train
from safetensors.torch import load_file
from support import mdeberta

TWO = "two processes"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["zero_stage=2", TWO],
        ["zero_stage=1", "precision=bf16", TWO],
        ["zero_stage=2", "precision=bf16"],
        ["zero_stage=0"],
        ["zero_stage=0", "precision=bf16"],
        ["embedding_sharing=es"],
        ["embedding_sharing=nes", "updates=joint", "zero_stage=2"],
        ["zero_stage=3", TWO],
        ["zero_stage=3", "precision=bf16", "embedding_sharing=es"],
        ["objective=mlm", TWO],
        ["objective=mlm", "zero_stage=3", "precision=bf16"],
        ["masking=windowed"],
    ],
    ids=" ".join,
)
def test_every_mode_trains_and_resumes_exactly(project: Project, changes: list[str]) -> None:
    keys = [change for change in changes if change != TWO]
    processes = 1 + (TWO in changes)
    train(project, *SHORT, *keys, processes=processes)
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
    assert "continuing after step 3 " in train(project, *SHORT, *keys, processes=processes)
    assert project.results() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharing", "updates"),
    [("gdes", "decoupled"), ("nes", "decoupled"), ("gdes", "joint"), ("nes", "joint"), ("es", "joint")],
)
def test_partitioning_changes_no_gradient(tokens: Path, tmp_path: Path, sharing: str, updates: str) -> None:
    losses = []
    for stage, processes in ((1, 1), (2, 2), (3, 2)):
        project = copy_of(tokens, tmp_path / str(stage))
        changes = (f"embedding_sharing={sharing}", f"updates={updates}", f"zero_stage={stage}")
        train(project, *SHORT, *changes, processes=processes)
        keys = ("generator_loss", "discriminator_loss", "generator_embedding_cosine", "discriminator_embedding_cosine")
        losses.append([line[key] for line in project.lines() for key in keys if key in line])
    assert len(losses[0]) == 6 * 2 + 2 * 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("held_out_rows", [1, 3, 9])
def test_partitioned_validation_works_with_any_number_of_rows(project: Project, held_out_rows: int) -> None:
    """Of 1 and 3 micro-batches one process has one less than the other, and a partitioned forward pass needs both."""
    rows = f"validation_rows={held_out_rows}"
    train(project, "steps=1", "validate_every=1", rows, "micro_batch=1", "zero_stage=3", processes=2)
    partitioned = project.lines()[-1]
    shutil.rmtree(project.stage)
    train(project, "steps=1", "validate_every=1", rows, "micro_batch=1", "zero_stage=1")
    whole = project.lines()[-1]
    for key in ("validation_generator_loss", "validation_discriminator_loss", "generator_embedding_cosine"):
        assert partitioned[key] == pytest.approx(whole[key], rel=1e-5)


@pytest.mark.slow
def test_large_products_are_partitioned_like_small_ones(tokens: Path, tmp_path: Path) -> None:
    """Products of this size take another way on CPUs (`model.modules`)."""
    losses = []
    for stage in (1, 3):
        project = copy_of(tokens, tmp_path / str(stage))
        size = ("micro_batch=16", "model.hidden_size=256", "model.intermediate_size=512")
        train(project, *SHORT, *size, "learning_rate=0.001", f"zero_stage={stage}")
        losses.append([line["discriminator_loss"] for line in project.lines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["rtd", "mlm"])
def test_a_run_continues_from_its_own_export(project: Project, objective: str) -> None:
    arm = f"objective={objective}"
    train(project, arm, "steps=120", "warmup_steps=10", "checkpoint_every=1000")
    learnt = project.lines()[-1]["validation_generator_loss"]
    start = mdeberta("run", *project.arguments(arm, "steps=120", "warmup_steps=10"), "export")
    assert "export" in start.stderr
    (exported,) = (project.work / "export").iterdir()
    shutil.rmtree(project.stage)
    changes = (arm, "steps=1", "validate_every=1", "learning_rate=1e-9", f"init.checkpoint={exported}")
    messages = train(project, *changes)
    assert "warm start: " in messages
    assert project.lines()[-1]["validation_generator_loss"] == pytest.approx(learnt, abs=1e-3)
    # Which checkpoint it was is part of what the stage is.
    (exported / "model.safetensors").write_bytes(b"another")
    plan = mdeberta("plan", *project.arguments(*changes)).stdout
    assert "pretrain.init.checkpoint" in next(line for line in plan.splitlines() if line.startswith("pretrain"))
