"""A fault at every point that the stages pass while they publish: killed there, and with a full or broken disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from faults import STAGES, Quiet


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    return Quiet(tmp_path_factory.mktemp("quiet"))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_point(quiet: Quiet, tmp_path: Path, stage: str) -> None:
    for number in range(len(quiet.passed[stage])):
        quiet.kill_at(number, stage, tmp_path / "work")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("stage", STAGES)
def test_everything_fails_from_every_kind_of_point(quiet: Quiet, tmp_path: Path, stage: str, code: int) -> None:
    for number in quiet.first_of_each(stage):
        quiet.fail_at(number, code, stage, tmp_path / "work")
