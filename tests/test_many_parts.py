"""A stage of ten thousand shards, half-done and committed: looking at it takes moments and little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from support import MDEBERTA, write_corpus

from pipeline import configfile, storage
from pipeline.config import Config
from pipeline.shards import CORPUS_SCHEMA, shard_name, write_stream
from pipeline.stage import PartStore, identities, open_run, read_manifest, stage_folder
from pipeline.stages import STAGES

SHARDS = 10_000
SECONDS = 4  # of a processor, about three times what it takes
MEGABYTES = 200
METER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1000, file=sys.stderr)
"""


def overrides(root: Path) -> list[str]:
    return [f"work_dir={root}/work", f"corpus.inputs=['{root}/in/*.txt']"]


def config_of(root: Path) -> Config:
    return configfile.load("demo", overrides(root))


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus stage that was ended when all of its shards were published."""
    root = tmp_path_factory.mktemp("half")
    write_corpus(root / "in", {"en": ["Text."]})
    table = pa.table({"id": ["0" * 32], "text": ["x"], "source": ["en.txt"], "offset": [0]}, schema=CORPUS_SCHEMA)
    with pytest.MonkeyPatch.context() as patch, open_run(STAGES["corpus"], config_of(root)) as run:
        patch.setattr(storage, "sync_file", lambda path: None)  # a minute of waiting for the disk
        patch.setattr(storage, "sync_folder", lambda path: None)
        for number in range(SHARDS):
            with run.parts.publish(f"en/{shard_name(number, SHARDS)}") as draft:
                draft.rows = write_stream(draft.sink, CORPUS_SCHEMA, table)
                draft.stats = {"text_bytes": 1, "chars": 1, "duplicates": {}}
    return root


@pytest.fixture(scope="module")
def committed(half_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("committed") / "run"
    shutil.copytree(half_done, root)
    with open_run(STAGES["corpus"], config_of(root)) as run:
        run.commit({"notes": []})
    return root


def measured(root: Path, command: str, *options: str) -> str:
    """The output of a command that keeps to the limits, its start included."""
    words = [MDEBERTA, command, "-c", "demo", *options]
    words += [word for override in overrides(root) for word in ("--set", override)]
    done = subprocess.run([sys.executable, "-c", METER, *words], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stderr.splitlines()[-1].split())
    print(f"{command}: {seconds:.2f} s, {megabytes:.0f} MB")
    assert seconds < SECONDS and megabytes < MEGABYTES
    return done.stdout


def test_plan_of_a_half_done_stage(half_done: Path) -> None:
    corpus = json.loads(measured(half_done, "plan", "--json"))[0]
    assert (corpus["state"], corpus["parts_done"]) == ("partial", SHARDS)


def test_parts_of_a_half_done_stage(half_done: Path) -> None:
    config = config_of(half_done)
    store = PartStore(stage_folder(config, identities(config, "corpus")["corpus"]))
    began = time.process_time()
    assert len(store.done()) == SHARDS
    assert time.process_time() - began < SECONDS


def test_plan_and_verify_of_a_committed_stage(committed: Path) -> None:
    corpus = json.loads(measured(committed, "plan", "--json"))[0]
    assert (corpus["state"], corpus["parts_total"]) == ("done", SHARDS)
    assert measured(committed, "verify") == f"{SHARDS} files are as they were committed\n"


def test_the_manifest_fits_the_directory(committed: Path) -> None:
    config = config_of(committed)
    folder = stage_folder(config, identities(config, "corpus")["corpus"])
    began = time.process_time()
    manifest = read_manifest(folder)
    assert manifest is not None
    sizes = folder.files("en")
    assert {path: part.bytes for path, part in manifest.parts.items()} == sizes
    assert manifest.identity.fingerprint == Path(folder.url).name
    assert time.process_time() - began < SECONDS


def test_plan_of_many_inputs(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", {f"en.{number}": ["Text."] for number in range(SHARDS)})
    assert json.loads(measured(tmp_path, "plan", "--json"))[0]["state"] == "missing"
