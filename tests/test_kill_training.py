"""`kill -9` at random moments of training: what follows equals, bit by bit, the run that nobody disturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pretraining import Project, copy_of
from ranks import Ranks, train

from model.data import TrainingData
from pipeline import configfile
from pipeline.stage import identities, open_artifact

STEPS, EVERY, FURTHER = 32, 2, 20
"""After a kill at least so many further steps are compared; English begins its second epoch in all of them."""
RUN = (f"steps={STEPS}", f"checkpoint_every={EVERY}", "validate_every=11")
SHARINGS = ("gdes", "nes", "es")
WAYS = [
    (stage, processes, precision, SHARINGS[number % 3])
    for number, (stage, processes, precision) in enumerate(
        (stage, processes, precision) for stage in (1, 2, 3) for processes in (1, 2) for precision in ("fp32", "bf16")
    )
]
KILLS = 2

Reference = Callable[..., Project]


@pytest.fixture(scope="module")
def undisturbed(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    found: dict[tuple[object, ...], Project] = {}

    def of(processes: int, *changes: str) -> Project:
        key = (processes, *changes)
        if key not in found:
            found[key] = copy_of(tokens, tmp_path_factory.mktemp("undisturbed") / "project")
            train(found[key], *changes, processes=processes)
        return found[key]

    return of


def changes_for(stage: int, precision: str, sharing: str) -> tuple[str, ...]:
    """The overrides of a way. A micro-batch takes long at stage 3, whatever its size, so there are fewer of them."""
    rows = 8 if stage == 3 else 4
    keys = (f"zero_stage={stage}", f"precision={precision}", f"embedding_sharing={sharing}", f"micro_batch={rows}")
    return (*RUN, *keys)


def test_the_run_crosses_an_epoch_of_a_language(tokens: Path) -> None:
    config = configfile.load(str(tokens / "conf.yaml"))
    found = open_artifact(config, identities(config, "tokens")["tokens"], "the test")
    data = TrainingData(found, config.pretrain, vocab_rows=512)
    rows = found.manifest.stats["languages"]["en"]["train"]["rows"]
    read = [
        np.count_nonzero(data.samples(0, 16 * steps).language == data.languages.index("en"))
        for steps in (STEPS - FURTHER + EVERY, STEPS)
    ]
    assert read[0] <= rows < read[1]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes", "precision", "sharing"), WAYS)
def test_kills_leave_no_trace(
    undisturbed: Reference, project: Project, stage: int, processes: int, precision: str, sharing: str
) -> None:
    changes = changes_for(stage, precision, sharing)
    reference = undisturbed(processes, *changes)
    dice = random.Random(f"{changes} {processes}")
    kill_and_finish(project, KILLS, dice, *changes, processes=processes)
    assert project.results() == reference.results()


def kill_and_finish(project: Project, kills: int, dice: random.Random, *changes: str, processes: int) -> None:
    """Kill a run so many times at random moments, then let it end; the last stretch has `FURTHER` steps at least."""
    for step in sorted(dice.choices(range(STEPS - FURTHER), k=kills)):
        kill_at_random(project, step, dice, *changes, processes=processes)
    assert continued_after(train(project, *changes, processes=processes)) <= STEPS - FURTHER + EVERY


def kill_at_random(project: Project, step: int, dice: random.Random, *changes: str, processes: int) -> None:
    """Kill a run a random moment after it has logged a step."""
    ranks = Ranks(project, *changes, processes=processes)
    project.wait_for_step(step)
    time.sleep(dice.uniform(0.0, 0.1))
    assert ranks.kill(), ranks.messages


def continued_after(messages: str) -> int:
    """The step that a run says it continues from; 0 where it began anew."""
    words = messages.partition("continuing after step ")[2].split()
    return int(words[0]) if words else 0
