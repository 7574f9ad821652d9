"""A hundred random kills of training, and a kill at every single point of publishing its checkpoints."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pretraining import Project, copy_of
from ranks import train
from test_kill_training import WAYS, changes_for, kill_and_finish
from test_training_faults import POINTS, kill_at_point
from test_training_faults import RUN as SHORT_RUN

KILLS = 9
"""A way; there are twelve."""


@pytest.mark.parametrize(("stage", "processes", "precision", "sharing"), WAYS)
def test_many_kills_leave_no_trace(
    tokens: Path, project: Project, tmp_path: Path, stage: int, processes: int, precision: str, sharing: str
) -> None:
    changes = changes_for(stage, precision, sharing)
    undisturbed = copy_of(tokens, tmp_path / "undisturbed")
    train(undisturbed, *changes, processes=processes)
    kill_and_finish(project, KILLS, random.Random(f"torture {changes}"), *changes, processes=processes)
    assert project.results() == undisturbed.results()


@pytest.fixture(scope="module")
def short(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_of(tokens, tmp_path_factory.mktemp("undisturbed") / "project")
    train(project, *SHORT_RUN)
    return project


@pytest.mark.parametrize("number", range(1, POINTS))
def test_killed_at_every_point_of_a_checkpoint(project: Project, short: Project, number: int) -> None:
    kill_at_point(project, short, number)
