"""Two hundred random kills a stage."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from whole_run import Undisturbed

from pipeline.stages import STAGES

TRIALS = 40
KILLS = 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("trial", range(TRIALS))
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_kills_leaves_no_trace(undisturbed: Undisturbed, tmp_path: Path, stage: str, trial: int) -> None:
    undisturbed.kill_and_finish(stage, tmp_path, KILLS, random.Random(f"{stage} {trial}"), workers=1 + trial % 2)
    assert undisturbed.committed(stage, tmp_path) == undisturbed.committed(stage)
    assert undisturbed.stray_files(tmp_path) == []
