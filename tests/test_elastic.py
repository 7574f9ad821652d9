"""A run goes on with other processes, another ZeRO stage or the optimiser elsewhere: same command, same samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import sabotage
from pretraining import Project, copy_of
from ranks import train

LOSSES = ("generator_loss", "discriminator_loss", "validation_generator_loss", "validation_discriminator_loss")
RUN = ("steps=21", "checkpoint_every=7", "validate_every=7")

Reference = Callable[..., Project]


@pytest.fixture(scope="module")
def undisturbed(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    found: dict[tuple[str, ...], Project] = {}

    def of(*changes: str) -> Project:
        if changes not in found:
            found[changes] = copy_of(tokens, tmp_path_factory.mktemp("undisturbed") / "project")
            train(found[changes], *changes)
        return found[changes]

    return of


def train_until(step: int, project: Project, *changes: str, processes: int = 1) -> str:
    """Train until a run that is asked to stop after this step has left its checkpoint; returns the messages."""
    stop = functools.partial(sabotage.stop_after, step=step)
    messages = train(project, *changes, processes=processes, sabotage=stop)
    assert f"stopped after step {step};" in messages
    return messages


def losses(project: Project) -> list[float]:
    return [line[name] for line in project.lines() for name in LOSSES if name in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [
        [(1, 1), (1, 2)],
        [(2, 1), (1, 1), (2, 1)],
        [(2, 2), (1, 3), (2, 1)],
        [(2, 3), (1, 0), (2, 2)],
        [(1, 0), (2, 3)],
        [(4, 2), (1, 2), (2, 3)],
    ],
    ids=lambda ways: " then ".join(f"{processes} at stage {stage}" for processes, stage in ways),
)
def test_other_processes_and_stages_go_on(
    undisturbed: Reference, project: Project, ways: list[tuple[int, int]]
) -> None:
    for number, (processes, stage) in enumerate(ways):
        last = number == len(ways) - 1
        go = train if last else functools.partial(train_until, 7 * (number + 1))
        messages = go(project, *RUN, f"zero_stage={stage}", processes=processes)
        assert (f"continuing after step {7 * number} " in messages) == bool(number)
    whole = undisturbed(*RUN)
    assert [line["step"] for line in project.lines()] == list(range(1, 22))
    assert losses(project) == pytest.approx(losses(whole), rel=1e-5)
    for mine, other in zip(project.lines(), whole.lines(), strict=True):
        assert (mine["rows"], mine.get("tokens_by_language")) == (other["rows"], other.get("tokens_by_language"))


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "objective"), [("es", "rtd"), ("nes", "rtd"), ("gdes", "mlm")])
def test_every_kind_of_run_does(undisturbed: Reference, project: Project, sharing: str, objective: str) -> None:
    run = (*RUN, f"embedding_sharing={sharing}", f"objective={objective}")
    train_until(14, project, *run, "zero_stage=2", processes=2)
    train(project, *run)
    assert losses(project) == pytest.approx(losses(undisturbed(*run)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_optimiser_may_move_to_the_host_and_back(undisturbed: Reference, project: Project, stage: int) -> None:
    offloaded = f"offload_optimizer={str(stage != 2).lower()}"
    train_until(7, project, *RUN, f"zero_stage={stage}", offloaded, processes=2)
    train_until(14, project, *RUN, f"zero_stage={stage}", "offload_optimizer=true")
    train(project, *RUN, f"zero_stage={stage}")
    assert losses(project) == pytest.approx(losses(undisturbed(*RUN)), rel=1e-5)


@pytest.mark.slow
def test_low_precision_goes_on_from_the_same_master_weights(undisturbed: Reference, project: Project) -> None:
    """The partitioned sums of bf16 gradients differ in rounding; what is read back must not."""
    run = (*RUN, "precision=bf16")
    train_until(7, project, *run, "zero_stage=3", processes=2)
    before = project.lines("metrics.jsonl")[6]["validation_generator_loss"]
    train(project, *run, "steps=21")
    first, *_ = [line for line in project.lines() if line["step"] == 8]
    assert project.lines()[6]["validation_generator_loss"] == before
    assert first["generator_loss"] == pytest.approx(undisturbed(*run).lines()[7]["generator_loss"], rel=5e-3)


@pytest.mark.slow
def test_accumulated_micro_batches_equal_more_processes(undisturbed: Reference, project: Project) -> None:
    """global_batch 16 in micro-batches of 4: one process accumulates 4, two accumulate 2 each."""
    train(project, *RUN, processes=2)
    alone = undisturbed(*RUN)
    assert losses(project) == pytest.approx(losses(alone), rel=1e-5)
    assert [line["masked_accuracy"] for line in project.lines()] == pytest.approx(
        [line["masked_accuracy"] for line in alone.lines()], abs=1e-6
    )


@pytest.mark.slow
def test_a_growing_batch_goes_on_with_more_processes_than_it_has_micro_batches(
    tokens: Path, project: Project, tmp_path: Path
) -> None:
    run = (*RUN, "batch_warmup_steps=15", "batch_warmup_rows=2", "schedule=cosine", "discriminator.warmup_steps=5")
    alone = copy_of(tokens, tmp_path / "alone")
    train(alone, *run)
    assert [line["rows"] for line in alone.lines()][::4] == [2, 4, 8, 12, 16, 16]
    train_until(7, project, *run, "zero_stage=3", processes=4)
    train(project, *run, "zero_stage=2", processes=2)
    assert losses(project) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_fit_is_refused_by_name(project: Project) -> None:
    messages = train(project, *RUN, processes=3, expect=2)
    assert "which 3 processes cannot share evenly; use 1, 2, 4 processes" in messages
    assert "Traceback" not in messages
