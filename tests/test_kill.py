"""Every stage of a small run: `kill -9` of its process group, same command again, same bytes; and twice at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support import flip_bit, mdeberta, start
from whole_run import Undisturbed, small

from pipeline.stages import STAGES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_with_the_bytes_of_an_undisturbed_run(
    undisturbed: Undisturbed, tmp_path: Path, stage: str
) -> None:
    kills = 8 if stage in ("corpus", "vocab", "tokens") else 2
    undisturbed.kill_and_finish(stage, tmp_path, kills, random.Random(stage), workers=2)
    assert undisturbed.committed(stage, tmp_path) == undisturbed.committed(stage)
    assert undisturbed.stray_files(tmp_path) == []


def test_every_document_is_counted(undisturbed: Undisturbed) -> None:
    assert undisturbed.uncounted() == []


def test_the_whole_run_twice_at_once_gives_the_same_bytes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    both = [start("run", *small(tmp_path)) for _ in range(2)]
    outputs = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("another run is working here" in errors for _, errors in outputs)
    for stage in STAGES:
        assert undisturbed.committed(stage, tmp_path) == undisturbed.committed(stage), stage


@pytest.mark.parametrize(
    ("stage", "pattern", "reader"),
    [
        ("corpus", "am/data-*.arrow", "vocab"),
        ("vocab", "spm.model", "tokens"),
        ("tokens", "am/train-*.arrow", "pretrain"),
        ("pretrain", "discriminator.safetensors", "export"),
        ("export", "model.safetensors", "xnli"),
    ],
)
def test_a_flipped_bit_is_named_by_verify_and_refused_by_the_next_stage(
    undisturbed: Undisturbed, tmp_path: Path, stage: str, pattern: str, reader: str
) -> None:
    undisturbed.kill_and_finish(reader, tmp_path, kills=0, dice=random.Random(0))
    directory = next((tmp_path / stage).iterdir())
    victim = sorted(directory.glob(pattern))[0]
    flip_bit(victim)
    assert f"{victim}: altered" in mdeberta("verify", *small(tmp_path), expect=1).stdout
    again = next((tmp_path / reader).iterdir())
    again.rename(tmp_path / "set aside")
    assert victim.name in mdeberta("run", *small(tmp_path), reader, expect=1).stderr
