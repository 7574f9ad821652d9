"""What goes wrong while a model trains, and what becomes of it: each fault has one outcome, and nothing is lost."""

from __future__ import annotations

import errno
import functools
import json
import math
import random
import signal
from pathlib import Path

import pytest
import sabotage
from pretraining import Project, copy_of
from ranks import Ranks, train
from support import flip_bit, tree

RUN = ("steps=12", "checkpoint_every=4", "validate_every=6")
NAN = math.nan
POINTS = 300
"""About so many points of publishing are passed by one process with three checkpoints."""


@pytest.fixture(scope="module")
def undisturbed(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_of(tokens, tmp_path_factory.mktemp("undisturbed") / "project")
    train(project, *RUN)
    return project


def poisoned(*steps: int, factor: float = NAN) -> sabotage.Sabotage:
    """One sample of each of these steps, counted from 1, is poisoned."""
    return functools.partial(sabotage.poison, slots=tuple(16 * (step - 1) + 7 for step in steps), factor=factor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "precision"),
    [
        ("zero_stage=0", "fp32"),
        ("zero_stage=1", "fp32"),
        ("zero_stage=1", "bf16"),
        ("zero_stage=2", "bf16"),
        ("zero_stage=3", "fp32"),
        ("updates=joint", "fp32"),
    ],
)
def test_a_gradient_that_is_not_finite_costs_its_step_and_no_more(project: Project, way: str, precision: str) -> None:
    run = (*RUN, way, f"precision={precision}", "keep_checkpoints=9")
    train(project, *run, processes=2, sabotage=poisoned(5, 6))
    lines = project.lines()
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [line["step"] for line in lines if "generator_loss" not in line] == [5, 6]
    assert all(math.isfinite(line[f"{name}_loss"]) for line in lines[6:] for name in ("generator", "discriminator"))
    # Nothing had moved: what was measured after the two steps is what a run of four steps ends with.
    short = copy_of(project.work.parent, project.work.parent.with_name("short"))
    short.forget_training()
    train(short, *run, "steps=12", "validate_every=4", processes=2)
    assert lines[5]["validation_generator_loss"] == short.lines()[3]["validation_generator_loss"]
    assert lines[5]["validation_discriminator_loss"] == short.lines()[3]["validation_discriminator_loss"]
    whole = project.results()
    project.rewind(4)
    train(project, *run, processes=2, sabotage=poisoned(5, 6))
    assert project.results() == whole


@pytest.mark.slow
def test_it_costs_no_more_where_the_optimiser_is_on_the_host(project: Project) -> None:
    offloaded = ("zero_stage=2", "precision=bf16", "offload_optimizer=true")
    train(project, *RUN, *offloaded, processes=2, sabotage=poisoned(5, 6))
    assert [line["step"] for line in project.lines() if "generator_loss" not in line] == [5, 6]


@pytest.mark.slow
def test_gradients_that_stay_not_finite_end_the_run_and_their_samples_are_named(project: Project) -> None:
    messages = train(project, *RUN, "max_skipped_steps=3", processes=2, sabotage=poisoned(3, 5, 6, 7), expect=1)
    assert "the gradient was not finite in steps 5 to 7; not_finite.json" in messages
    assert "Traceback" not in messages
    named = json.loads((project.stage / "not_finite.json").read_text())
    assert list(named) == ["step 5", "step 6", "step 7"]
    assert all(sum(map(len, samples.values())) == 16 for samples in named.values())
    assert project.checkpoints() == {"step-4"}


@pytest.mark.slow
def test_fp16_that_overflows_at_every_scale_ends_all_with_the_same_sentence(project: Project) -> None:
    broken = functools.partial(sabotage.exhaust_loss_scale, update=3)
    messages = train(project, *RUN, processes=2, sabotage=broken, expect=1)
    (said,) = [line for line in messages.splitlines() if line.startswith("mdeberta: ")]
    assert said.startswith("mdeberta: the gradient was not finite in steps 3 to 3; not_finite.json")
    assert list(json.loads((project.stage / "not_finite.json").read_text())) == ["step 3"]


@pytest.mark.slow
def test_a_place_of_master_weights_that_is_not_known_ends_the_run_before_it_trains(project: Project) -> None:
    own = project.work / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"round_robin_gradients": True}}))
    run = ("zero_stage=2", f"deepspeed={own}")
    messages = train(project, *run, processes=2, sabotage=sabotage.allow_all_keys, expect=1)
    assert "generator: the master weights of " in messages and "Traceback" not in messages
    assert project.last_step() == 0


@pytest.mark.slow
def test_a_checkpoint_that_can_never_be_written_ends_the_run_at_once(project: Project) -> None:
    messages = train(project, *RUN, "checkpoint_every=12", sabotage=sabotage.lack_memory, expect=1)
    assert "RuntimeError: no memory to pin" in messages
    assert project.last_step() < 3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_spike_sends_the_run_back_and_its_samples_are_left_out(project: Project, processes: int) -> None:
    spikes = ("spikes.factor=3", "spikes.window_steps=3", "spikes.rollback_every=4", "keep_checkpoints=1")
    broken = poisoned(7, 14, factor=50.0)
    messages = train(project, *RUN, *spikes, processes=processes, sabotage=broken)
    assert "the loss jumped at step 7; going on from step 4 with other samples" in messages
    lines = project.lines()
    assert [line["step"] for line in lines] == list(range(1, 13))
    # Three steps of samples were left out: what would have been step 14 comes at step 11, and is a spike too.
    assert "the loss jumped at step 11; going on from step 8 with other samples" in messages
    assert [line["rollbacks"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    assert max(line["generator_loss"] for line in lines) < 10
    whole = project.results()
    project.forget_training()
    dice = random.Random(processes)
    for _ in range(2):
        ranks = Ranks(project, *RUN, *spikes, processes=processes, sabotage=broken)
        project.wait_for_step(dice.randrange(3, 10))
        ranks.kill()
    train(project, *RUN, *spikes, processes=processes, sabotage=broken)
    assert project.results() == whole


@pytest.mark.slow
def test_too_many_spikes_end_the_run(project: Project) -> None:
    spikes = ("spikes.factor=3", "spikes.window_steps=3", "spikes.rollback_every=4", "spikes.max_rollbacks=1")
    messages = train(project, *RUN, *spikes, sabotage=poisoned(7, 14, factor=50.0), expect=1)
    assert "the loss jumped at step 11, after 1 rollbacks" in messages
    assert "Traceback" not in messages


@pytest.mark.slow
def test_a_spike_before_the_first_checkpoint_ends_the_run(project: Project) -> None:
    spikes = ("spikes.factor=3", "spikes.window_steps=2", "spikes.rollback_every=4")
    messages = train(project, *RUN, *spikes, sabotage=poisoned(4, factor=50.0), expect=1)
    assert "the loss jumped at step 4, before the first checkpoint" in messages


@pytest.mark.slow
def test_a_spike_that_finds_no_sound_checkpoint_ends_the_run_and_removes_nothing(project: Project) -> None:
    spikes = ("spikes.factor=3", "spikes.window_steps=3", "spikes.rollback_every=4", "checkpoint_every=2")
    broken = functools.partial(sabotage.damage_before_rollback, slots=(16 * 6 + 7,), factor=50.0)
    messages = train(project, *RUN, *spikes, "keep_checkpoints=2", sabotage=broken, expect=1)
    assert "the loss jumped at step 7, and no checkpoint up to step 4 can be used" in messages
    assert project.checkpoints() == {"damaged-step-4", "step-6"}
    assert project.last_step() == 6


@pytest.mark.slow
def test_a_corrupted_row_is_found_before_it_is_in_a_checkpoint(project: Project, undisturbed: Project) -> None:
    (shard,) = project.work.glob("tokens/*/de/train-*.arrow")
    sound = shard.read_bytes()
    flip_bit(shard)
    messages = train(project, *RUN, processes=2, expect=1)
    assert shard.name in messages and "Traceback" not in messages
    assert project.checkpoints() == set()
    shard.write_bytes(sound)
    train(project, *RUN)
    assert project.results() == undisturbed.results()


@pytest.mark.slow
def test_a_missing_shard_is_named(project: Project, undisturbed: Project) -> None:
    (shard,) = project.work.glob("tokens/*/de/train-*.arrow")
    aside = shard.rename(project.work / "aside")
    messages = train(project, *RUN, processes=2, expect=1)
    assert shard.name in messages and "Traceback" not in messages
    aside.rename(shard)
    train(project, *RUN)
    assert project.results() == undisturbed.results()


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(project: Project, undisturbed: Project) -> None:
    train(project, *RUN, sabotage=sabotage.jumping_clock)
    assert project.results() == undisturbed.results()
    assert all(0 < line["seconds"] < 100 for line in project.lines("metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "points"), [(0, (3, 40, POINTS)), (1, (2, 50))])
def test_a_full_disk_ends_the_run_with_a_sentence_and_the_checkpoint_before_stands(
    tokens: Path, tmp_path: Path, victim: int, points: tuple[int, ...]
) -> None:
    whole = copy_of(tokens, tmp_path / "whole")
    train(whole, *RUN, processes=2)
    for number in points:
        project = copy_of(tokens, tmp_path / f"at {number}")
        full = functools.partial(sabotage.fail_at, victim=victim, number=number, code=errno.ENOSPC)
        messages = train(project, *RUN, processes=2, sabotage=full, expect=1)
        assert "No space left on device" in messages
        assert "run the same command again" in messages
        assert "Traceback" not in messages
        train(project, *RUN, processes=2)
        assert project.results() == whole.results()
        assert tree_of_checkpoints(project.stage) == tree_of_checkpoints(whole.stage)


@pytest.mark.slow
@pytest.mark.parametrize("number", [*range(5, POINTS, 61), POINTS - 1, POINTS])
def test_killed_while_publishing_a_checkpoint_the_last_or_the_new_one_is_whole(
    project: Project, undisturbed: Project, number: int
) -> None:
    kill_at_point(project, undisturbed, number)


def kill_at_point(project: Project, undisturbed: Project, number: int) -> None:
    """Kill a run at the n-th point of publishing checkpoints, look at what is there, and let it end."""
    ranks = Ranks(project, *RUN, sabotage=functools.partial(sabotage.die_at, victim=0, number=number))
    assert ranks.wait() == [-signal.SIGKILL]
    whole = {name for name in ("step-4", "step-8", "step-12") if not broken(project.stage / "checkpoints" / name)}
    assert project.checkpoints() == whole
    if project.last_step() == 12:
        assert whole
    train(project, *RUN)
    assert project.results() == undisturbed.results()
    assert tree_of_checkpoints(project.stage) == tree_of_checkpoints(undisturbed.stage)


def broken(checkpoint: Path) -> bool:
    """Whether a directory is not exactly what its record says."""
    record = checkpoint / "COMMITTED.json"
    if not record.exists():
        return True
    said = {entry["path"]: entry["sha256"] for entry in json.loads(record.read_text())["files"]}
    return said != {name: digest for name, digest in tree(checkpoint).items() if name != record.name}


def tree_of_checkpoints(stage: Path) -> dict[str, str]:
    """Every file below with its digest; of a record only that it is there: it holds the length of metrics.jsonl, which
    depends on how many digits a second has in there."""
    return {name: "" if name.endswith(".json") else digest for name, digest in tree(stage / "checkpoints").items()}
