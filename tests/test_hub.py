"""The corpus stage reads `hf://` URLs through the hub's own file system, here from a hub on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hub_server import REPOSITORY, hub
from support import mdeberta, tree

from pipeline import configfile

DEMO = Path(configfile.__file__).parent / "demo" / "corpus"


def corpus(work: Path, inputs: str, options: dict[str, object]) -> dict[str, str]:
    """Run the stage; digests of its files."""
    keys = [f"work_dir={work}", f"corpus.inputs=['{inputs}']", f"storage_options={json.dumps(options)}"]
    mdeberta("run", "-c", "demo", "corpus", *(word for key in keys for word in ("--set", key)))
    (directory,) = (work / "corpus").iterdir()
    return tree(directory)


def test_files_of_a_dataset_repository_give_the_shards_of_the_same_files_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    files = tmp_path / "repository" / "data"
    files.mkdir(parents=True)
    for language in ("sw", "yo"):
        shutil.copy(DEMO / f"{language}.txt.xz", files)
    with hub(files.parent) as endpoint:
        options = {"hf": {"endpoint": endpoint, "token": False}}
        remote = corpus(tmp_path / "remote", f"hf://datasets/{REPOSITORY}/data/*.txt.xz", options)
    assert remote == corpus(tmp_path / "local", f"{files}/*.txt.xz", {})
