"""A minute of fuzzing for everything that reads bytes from outside; what breaks it is printed and kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz" / "fuzz.py"
SECONDS = 60
MEMORY_MB = 2048


@pytest.mark.parametrize("target", ["clean", "documents", "shard", "manifest", "config", "name"])
def test_nothing_breaks_it(tmp_path: Path, target: str) -> None:
    limits = [f"-max_total_time={SECONDS}", f"-rss_limit_mb={MEMORY_MB}", "-timeout=20"]
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    done = subprocess.run(
        [sys.executable, str(FUZZ), target, str(inputs), *limits, f"-artifact_prefix={tmp_path}/"],
        capture_output=True,
        text=True,
        errors="replace",
    )
    broken = {str(path): path.read_bytes().hex() for path in tmp_path.iterdir() if path.is_file()}
    assert done.returncode == 0, f"reproduce with: {FUZZ} {target} FILE\n{broken}\n{done.stderr[-3000:]}"
