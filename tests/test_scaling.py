"""docs/scaling.md: its tables are what the arithmetic says today, and what it tells to set can be set."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import configfile
from pipeline.config import fingerprint_slice

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"


def tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n?)+", text, re.M)


def test_every_table_of_numbers_is_computed() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "scaling.py")], capture_output=True, text=True, check=True
    )
    computed = tables(done.stdout)
    assert len(computed) == 10
    assert [found for found in tables(PAGE.read_text()) if "---:" in found] == computed


@pytest.mark.parametrize("column", [1, 2, 3])
def test_what_the_page_tells_to_set_can_be_changed_within_a_run(column: int) -> None:
    (advice,) = (found for found in tables(PAGE.read_text()) if "---:" not in found)
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in advice.strip().splitlines()]
    default = configfile.load("mdeberta_v3_base", []).pretrain
    for card in ("H100", "H200"):
        ours = [row for row in rows if row[0].endswith(("`", card))]
        settings = [f"{row[0].split('`')[1]}={row[column]}" for row in ours]
        config = configfile.load("mdeberta_v3_base", settings).pretrain
        assert fingerprint_slice(config) == fingerprint_slice(default)
        gpus = int(head[column].removesuffix(" GPUs"))
        assert config.global_batch // config.micro_batch % gpus == 0
