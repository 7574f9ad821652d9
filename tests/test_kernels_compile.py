"""The Triton kernels compile for GPUs that are not here, and take up no more than these have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def compiled(cache: Path, *options: str) -> list[str]:
    """The lines that the script prints."""
    command = [sys.executable, str(BENCHMARKS / "compiled_kernels.py"), "--quick", *options]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_kernels_compile_for_the_gpus_people_have(tmp_path: Path) -> None:
    attention = [line for line in compiled(tmp_path, "--arch", "80", "90") if "T = " in line]
    assert len(attention) == 12
    on_hopper = [line for line in attention if line.startswith("sm_90")]
    assert not any(" 0 HGMMA" in line for line in on_hopper), "Hopper's matrix instructions are not used"
    rounds = [re.search(r"a round: +(\d+) cycles of issue, +(\d+) of moving", line) for line in on_hopper]
    cycles = [tuple(map(int, found.groups())) for found in rounds if found]
    # Picking is as cheap as RESULTS.md says: a compiler that made shuffles of it would need twice as many.
    assert len(cycles) == 3
    assert max(issue for issue, _ in cycles) < 2000
    assert max(moving for _, moving in cycles) < 5000


@pytest.mark.slow
def test_kernels_for_some_queries_compile(tmp_path: Path) -> None:
    assert len(compiled(tmp_path, "--arch", "90", "--subset")) == 8
