"""The shape of the project: package names that are ours alone, file lengths, nothing that must not be in it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked(pattern: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split() if (ROOT / name).is_file()]


@pytest.mark.parametrize("name", ["pipeline", "tokenizer", "model"])
def test_the_generic_package_names_are_ours(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin == str(ROOT / name / "__init__.py")
    assert set(importlib.metadata.packages_distributions().get(name, [])) <= {"mdeberta-pipeline"}


def test_folders_that_are_no_packages_stay_so() -> None:
    assert not list(ROOT.glob("docker/__init__.py")) + list(ROOT.glob("dags/__init__.py"))


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in tracked("*.py")}
    assert {str(path): n for path, n in lengths.items() if n > 450} == {}
    assert statistics.median(lengths.values()) <= 220


def test_every_file_of_a_package_says_what_it_is() -> None:
    silent = [path for path in tracked("*.py") if not path.read_text().startswith('"""')]
    assert silent == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    unwanted = re.compile(r"(?<![\w.])/(?:work|home|root)/|files\.pythonhosted|pypi\.org")
    hits = [
        str(path) for path in tracked("*") if path.suffix not in {".xz", ".png"} and unwanted.search(path.read_text())
    ]
    assert [hit for hit in hits if not hit.endswith("test_layout.py")] == []
