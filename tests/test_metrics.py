"""The log of a training run: what is in its lines, how a resumed run goes on with it, and a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.metrics import MetricsLog
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError
from pipeline.storage import Folder
from pipeline.traininglog import CLOCK, training_log

CONFIG = PretrainConfig(steps=100, trackers=())
NAMES = ["generator_loss", "skipped_steps", "seconds", "utilisation", "replaced_f1"]
BY_LANGUAGE = ["tokens_by_language", "validation_by_language/generator_loss", "validation_by_language/replaced_f1"]


def readings(step: int) -> dict[str, Any]:
    """What a step with a validation logs."""
    return {
        "generator_loss": 1 / (step + 2),
        "rows": 64,
        "skipped_steps": 0,
        "time": 1e9,
        **dict.fromkeys(CLOCK, 0.5),
        "validation_generator_loss": 1 / 3,
        "tokens_by_language": {"en": 1000 * step, "sw": 10 * step},
        "validation_by_language": {
            "en": {"generator_loss": 1 / 7, "replaced_f1": 0.25},
            "sw": {"generator_loss": 0.5 * step},
        },
    }


def begun(folder: Path, step: int = 0, length: int = 0) -> MetricsLog:
    log = MetricsLog(Folder(str(folder)), CONFIG, "pretrain abc")
    log.begin(step, length)
    return log


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_keep_all_their_bits_and_the_clock_stays_out_of_what_is_published(tmp_path: Path) -> None:
    log = begun(tmp_path)
    log.write(1, readings(1))
    (line,) = lines(tmp_path)
    assert line == readings(1) | {
        "step": 1,
        "generator_loss_hex": (1 / 3).hex(),
        "validation_generator_loss_hex": (1 / 3).hex(),
    }
    (published,) = [json.loads(text) for text in log.deterministic()]
    assert line.keys() - published.keys() == CLOCK | {"time"}
    assert {key: line[key] for key in published} == published
    log.close()


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    log = begun(tmp_path)
    for step in range(1, 5):
        log.write(step, readings(step))
    length = log.length
    log.write(5, readings(5))
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "generator_lo')
    log = begun(tmp_path, 4, length)
    assert log.length == length
    for step in range(5, 8):
        log.write(step, {"skipped_steps": 1} if step == 6 else readings(step))
    log.begin(4, length)  # back to the same checkpoint without a new process
    log.write(5, readings(50))
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert lines(tmp_path)[-1]["generator_loss"] == 1 / 52


def test_a_log_on_an_object_store_goes_on_from_another_machine(s3_options: dict[str, dict[str, Any]]) -> None:
    folder = Folder("s3://bucket/metrics", s3_options)
    log = MetricsLog(folder, CONFIG, "pretrain abc")
    log.begin(0, 0)
    log.write(1, readings(1))
    log.sync()
    length = log.length
    log.write(2, readings(2))
    log.close()
    log = MetricsLog(folder, CONFIG, "pretrain abc")
    assert folder.size("metrics.jsonl") == length
    log.begin(1, length)
    log.write(2, {"skipped_steps": 1})
    log.sync()
    log.close()
    assert [json.loads(line).get("skipped_steps") for line in folder.read("metrics.jsonl").splitlines()] == [0, 1]


@pytest.mark.parametrize("lost", ["all of it", "its end"])
def test_a_log_that_has_lost_lines_goes_on_with_those_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    log = begun(tmp_path)
    for step in range(1, 5):
        log.write(step, readings(step))
    length = log.length
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"" if lost == "all of it" else path.read_bytes()[:-20])
    log = begun(tmp_path, 4, length)
    log.write(5, readings(5))
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == ([5] if lost == "all of it" else [1, 2, 3, 5])
    assert f"metrics.jsonl had {length} bytes at step 4 and has " in caplog.text


def test_a_trackers_file_that_a_store_does_not_take_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder("memory://metrics-of-trackers")
    log = MetricsLog(folder, CONFIG, "pretrain abc")
    log.begin(0, 0)
    log.write(1, readings(1))
    for name in (".lock", "gone", "taken"):
        (log._local / name).write_text(name)
    read = Path.read_bytes

    def reading(path: Path) -> bytes:
        if path.name == "gone":
            raise FileNotFoundError(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    log.sync()
    log.sync()
    log.close()
    assert list(folder.files()) == ["metrics.jsonl", "taken"]
    assert [name for record in caplog.records for name in (".lock", "gone") if f" {name} is" in record.message] == [
        ".lock",
        "gone",
    ]


def test_columns_are_read_back_also_those_by_language(tmp_path: Path) -> None:
    log = begun(tmp_path)
    for step in range(1, 7):
        log.write(step, {"skipped_steps": 1} if step == 3 else readings(step) if step % 2 else {"generator_loss": 2.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:  # what is half written looks whole at its end
        file.write(b'{"step": 7, "validation_by_language": {"en": {"generator_loss": 1.0}')
    found = training_log(Folder(str(tmp_path)), None, NAMES, BY_LANGUAGE)
    assert found.last_step == 6
    steps, values = found.column("generator_loss")
    assert steps.tolist() == [1, 2, 4, 5, 6]
    assert values.tolist() == [1 / 3, 2, 2, 1 / 7, 2]
    assert found.column("utilisation")[1].tolist() == [0.5, 0.5]
    assert found.column("replaced_f1")[0].size == 0
    assert {
        name: list(map(np.ndarray.tolist, series)) for name, series in found.by_language(BY_LANGUAGE[0]).items()
    } == {
        "en": [[1, 5], [1000, 5000]],
        "sw": [[1, 5], [10, 50]],
    }
    assert found.by_language(BY_LANGUAGE[1])["sw"][1].tolist() == [0.5, 2.5]
    assert list(found.by_language(BY_LANGUAGE[2])) == ["en"]


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    log = begun(tmp_path)
    log.write(1, readings(1))
    broken = readings(2) | {"generator_loss": float("nan")}
    broken["validation_by_language"]["en"]["generator_loss"] = float("inf")
    log.write(2, broken)
    log.close()
    found = training_log(Folder(str(tmp_path)), None, NAMES, BY_LANGUAGE)
    assert found.not_finite == 2
    assert found.column("generator_loss")[0].tolist() == [1]
    assert found.by_language(BY_LANGUAGE[1])["en"][0].tolist() == [1]


@pytest.mark.parametrize(
    "line", [b'{"step": 1, "generator_loss": "low"}', b'{"step": 1, "tokens_by_language": {"en"}}', b"nonsense"]
)
def test_a_damaged_log_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(line + b'\n{"step": 2}\n')
    with pytest.raises(PipelineError, match=r"metrics\.jsonl: not a log of training steps"):
        training_log(Folder(str(tmp_path)), None, NAMES, BY_LANGUAGE)


SMALL_DISK = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"']
WRITE_UNTIL_FULL = """
import sys
from pathlib import Path
from test_metrics import begun, readings
from pipeline.errors import PipelineError
folder = Path(sys.argv[1])
filler = folder / "filler"
filler.write_bytes(bytes(600_000))
log = begun(folder)
log.write(1, readings(1))
log.sync()
length = log.length
try:
    for step in range(2, 10_000):
        log.write(step, readings(step))
except PipelineError as error:
    print(step, error)
log.close()
filler.unlink()
log = begun(folder, 1, length)
log.write(2, readings(2))
log.close()
print((folder / "metrics.jsonl").read_text().count("\\n"))
"""


def test_a_full_disk_is_told_in_a_sentence_and_the_run_can_go_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SMALL_DISK, str(tmp_path), sys.executable, "-c", WRITE_UNTIL_FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("needs a name space of its own to mount a small disk in")
    assert done.returncode == 0, done.stderr
    told, length = done.stdout.splitlines()
    assert f"{tmp_path}/metrics.jsonl: could not be written (No space left on device)" in told
    assert "run the same command again to continue from the last checkpoint" in told
    assert int(told.split()[0]) > 100
    assert length == "2"
