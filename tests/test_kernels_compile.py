"""The Triton kernels compile for GPUs that are not here, and take up no more than these have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_kernels_compile_for_the_gpus_people_have(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "compiled_kernels.py"), "--quick", "--arch", "80", "90"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    on_hopper = [line for line in done.stdout.splitlines() if line.startswith("sm_90") and "T = " in line]
    assert len(on_hopper) == 6
    assert not any(" 0 HGMMA" in line for line in on_hopper), "Hopper's matrix instructions are not used"
