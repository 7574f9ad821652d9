"""Trackers for real, without a network: what they hold after a resumed run, and that none of them can end one."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pretraining import Project

from model import trackers
from model.trackers import Trackers, flatten
from pipeline.config import PretrainConfig
from pipeline.errors import UserError

READINGS = {"generator_loss": 2.5, "validation_by_language": {"en": {"generator_loss": 2.25, "replaced_f1": 0.5}}}
NESTED = "validation_by_language/en/generator_loss"

TRAIN = """
import json, logging, resource, sys
from pathlib import Path
from model.metrics import MetricsLog
from pipeline.config import PretrainConfig
from pipeline.storage import Folder

logging.basicConfig(format="%(message)s")
folder, trackers, first, last, file_size = sys.argv[1], sys.argv[2].split(","), *map(int, sys.argv[3:])
source = {"checkpoint": "https://user:secret@example.org/model?token=secret"}
config = PretrainConfig(trackers=trackers, tracker_project="probe", init=source)
log = MetricsLog(Folder(folder), config, "pretrain 0123abcd")
log.begin(first - 1, 0)
if file_size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
try:
    for step in range(first, last + 1):
        measured = dict.fromkeys(("en", "de", "sw", "th"), {"generator_loss": 1 / step, "replaced_f1": 0.5})
        log.write(step, {"time": 1e9, "generator_loss": 2.0 * step, "validation_by_language": measured})
    log.sync()
finally:
    log.close()
"""


def train(
    folder: Path, tracker: str, first: int, last: int, file_size: int = 0, expect: int = 0, **environment: str
) -> str:
    """Log so many steps in a process without a network, no home and at most so large files; what it says."""
    alone = ["unshare", "-rn"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    known = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    done = subprocess.run(
        [*alone, sys.executable, "-c", TRAIN, str(folder), tracker, *map(str, (first, last, file_size))],
        env={**known, "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_nested_readings_become_names_with_slashes() -> None:
    assert flatten(READINGS) == {"generator_loss": 2.5, NESTED: 2.25, "validation_by_language/en/replaced_f1": 0.5}


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "tensorboard", 1, 6)
    train(tmp_path, "tensorboard", 4, 8)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars(NESTED)]
    assert found == [(step, pytest.approx(1 / step)) for step in range(1, 9)]
    assert "time" not in events.Tags()["scalars"]


def test_wandb_continues_its_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    train(tmp_path, "wandb", 1, 6, WANDB_MODE="offline")
    time.sleep(1)  # wandb calls the folder of an execution by the second in which it began
    train(tmp_path, "wandb", 4, 8, WANDB_MODE="offline")
    history, configs = [], []
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*-pretrain-0123abcd")):
        for record in wandb_records(next(folder.glob("*.wandb")).read_bytes()):
            if record.HasField("history"):
                history.append(by_name(record.history.item))
            if record.HasField("run"):
                configs.append(by_name(record.run.config.update))
                assert (record.run.project, record.run.run_id) == ("probe", "pretrain-0123abcd")
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
    assert all(entry[NESTED] == 1 / entry["step"] for entry in history)
    assert [config["init"]["checkpoint"] for config in configs] == ["https://example.org/model"] * 2


def test_wandb_is_told_of_a_run_that_fails(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    # The lines themselves outgrow the limit.
    told = train(tmp_path, "wandb", 1, 500, file_size=50_000, expect=1, WANDB_MODE="offline")
    assert "metrics.jsonl: could not be written (File too large)" in told
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [record.exit.exit_code for record in wandb_records(file.read_bytes()) if record.HasField("exit")] == [1]


def wandb_records(data: bytes) -> Iterator[Any]:
    """The records of a run file: blocks of 32 KiB of chunks with checksum, length and type (1 whole, 2 to 4 parts)."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, parts = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def by_name(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_trackio_continues_its_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    train(tmp_path, "trackio", 1, 6, TRACKIO_DIR=str(tmp_path / "trackio"))
    train(tmp_path, "trackio", 4, 8, TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "probe.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
    assert len({run for run, _, _, _ in rows}) == 1
    assert {name for _, name, _, _ in rows} == {"pretrain-0123abcd"}
    assert [step for _, _, step, _ in rows] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
    assert all(json.loads(metrics)[NESTED] == 1 / step for _, _, step, metrics in rows)
    assert json.loads(config)["init"]["checkpoint"] == "https://example.org/model"


def test_a_tracker_that_cannot_begin_is_warned_about_once(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    told = train(tmp_path, "wandb,tensorboard", 1, 3)
    assert told.count("tracker wandb failed and is off until the run is started again") == 1
    assert "No API key configured" in told
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_fails_on_the_way_is_warned_about_once(tmp_path: Path) -> None:
    # The event file, which repeats every name, outgrows a limit that the lines stay under.
    told = train(tmp_path, "tensorboard", 1, 100, file_size=50_000)
    assert told.count("tracker tensorboard failed and is off until the run is started again") == 1
    assert "File too large" in told
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100


class _Slow:
    def __init__(self, *_: Any) -> None:
        self.told: list[bool] = []

    def close(self, failed: bool) -> None:
        self.told.append(failed)
        time.sleep(30)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_run_that_ends_early_does_not_wait_for_a_tracker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    monkeypatch.setattr(trackers, "_STOP_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "_ERROR_SECONDS", 0.1)
    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", _Slow)
    found = Trackers(PretrainConfig(trackers=("tensorboard",)), "pretrain-0123abcd")
    found.open(Path(), 0)
    slow: Any = found._open["tensorboard"]
    began = time.monotonic()
    try:
        raise error
    except error:
        found.close()
    assert time.monotonic() - began < 5
    assert slow.told == [True]
    assert "tracker tensorboard did not close in 0 s" in caplog.text


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UserError, match=rf"pretrain\.trackers names {name}.*pip install 'mdeberta-pipeline\[tracking\]'"
    ):
        Trackers(PretrainConfig(trackers=(name,)), "pretrain-0123abcd")


@pytest.mark.slow
def test_a_run_that_names_a_missing_package_ends_on_every_process(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.work / "wandb.py").write_text("raise ImportError('No module named wandb')")
    monkeypatch.setenv("PYTHONPATH", str(project.work))
    told = project.train("trackers=[wandb]", "launcher.processes=2", expect=2).stderr
    assert "pretrain.trackers names wandb" in told.strip().splitlines()[-1]
    assert not project.checkpoints()
