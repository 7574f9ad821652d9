"""The status: what is done, what runs, how far training is; from the work directory alone and without touching it."""

from __future__ import annotations

import fcntl
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_run import commit, commit_all, corpus_stats, directory, jsonl, language_codes, log_lines, make_config
from support import tree

from pipeline import lock
from pipeline.config import Config
from pipeline.stage import identities, open_run
from pipeline.stages import STAGES
from pipeline.status import status_lines
from pipeline.storage import Folder

CODES = language_codes(3)


@pytest.fixture(params=["local", "memory"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Config]:
    if request.param == "local":
        yield make_config(tmp_path)
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield make_config(tmp_path, work_dir=url)
    Folder(url).remove("")


def line(config: Config, stage: str) -> str:
    """The line of a stage."""
    (found,) = [text for text in status_lines(config) if text.startswith(stage)]
    return found


def commit_first(config: Config, *stages: str) -> None:
    """Commit some stages with next to nothing in them."""
    for stage in stages:
        commit(config, stage, corpus_stats(CODES) if stage == "corpus" else {}, {"stats.json": b"{}"})


def test_a_new_work_directory_has_every_stage_missing(config: Config) -> None:
    lines = status_lines(config)
    assert [text.split()[0] for text in lines] == list(STAGES)
    assert all(text.split()[2] == "missing" for text in lines)
    assert "never run in this work_dir" in lines[0]


def test_a_stage_without_input_says_what_it_waits_for(tmp_path: Path) -> None:
    config = make_config(tmp_path, corpus={"inputs": [str(tmp_path / "nothing" / "*.txt")]})
    lines = status_lines(config)
    assert "nothing matches" in lines[0]
    assert "waits for corpus" in lines[1]


def test_a_finished_stage_shows_its_parts_and_its_time(config: Config) -> None:
    commit(config, "corpus", corpus_stats(CODES), {f"{code}/data-00000-of-00001.arrow": b"rows" for code in CODES})
    fingerprint = identities(config, "corpus")["corpus"].fingerprint
    assert line(config, "corpus").split()[:3] == ["corpus", fingerprint, "done"]
    assert line(config, "corpus").endswith("3 of 3 parts, last execution finished after 12.6 min")


def test_a_running_stage_is_told_from_an_abandoned_one(config: Config) -> None:
    with open_run(STAGES["corpus"], config) as run:
        assert run is not None
        run.parts.publish_bytes("en/data-00000-of-00002.arrow", b"rows")
        running = line(config, "corpus")
    abandoned = line(config, "corpus")
    assert "partial  1 part, a run is working on it" in running
    assert "partial  1 part, no run is working on it" in abandoned


def test_two_looks_at_once_do_not_take_each_other_for_a_run(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_run(STAGES["corpus"], config):
        pass
    fingerprint = identities(config, "corpus")["corpus"].fingerprint
    path = Path(config.work_dir) / ".locks" / f"corpus-{fingerprint}.lock"
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert "no run is working on it" in line(config, "corpus")


def test_another_configs_run_does_not_count(config: Config) -> None:
    with open_run(STAGES["corpus"], config):
        pass
    locks = Folder(config.work_dir) / ".locks"
    with lock.hold(locks, "corpus-0123456789ab"):
        assert "no run is working on it" in line(config, "corpus")


def test_training_shows_its_newest_step_and_checkpoint(config: Config) -> None:
    commit_first(config, "corpus", "vocab", "tokens")
    _, metrics = log_lines(200)
    with open_run(STAGES["pretrain"], config) as run:
        assert run is not None
        many = jsonl(metrics[:150])
        assert len(many) > 65_536 / 2
        run.folder.write("metrics.jsonl", many + many + b'{"step": 151, "generator_lo')
        for name in ("step-50/COMMITTED.json", "step-100/COMMITTED.json", "step-150/weights.pt", "half/COMMITTED.json"):
            run.folder.write(f"checkpoints/{name}", b"{}")
        text = line(config, "pretrain")
    last, held_out = metrics[149]["generator_loss"], metrics[139]["validation_generator_loss"]
    assert "a run is working on it, step 150 of 200" in text
    assert f"generator_loss {last:.4g} (held-out {held_out:.4g})" in text
    assert f"{metrics[149]['tokens_per_second']:,.0f} tokens/s, checkpoint at step 100" in text


def heartbeats(seconds_ago: float, *busy: float) -> bytes:
    """News of processes on two hosts by turns, written so long ago."""
    ranks = [{"rank": rank, "host": f"node{rank % 2}", "busy_seconds": seconds} for rank, seconds in enumerate(busy)]
    news = {"time": time.time() - seconds_ago, "step": 160, "phase": "step", "steps_per_second": 2.5, "ranks": ranks}
    return json.dumps(news).encode()


def test_training_shows_its_slowest_process_and_how_old_the_news_is(config: Config) -> None:
    commit_first(config, "corpus", "vocab", "tokens")
    with open_run(STAGES["pretrain"], config) as run:
        run.folder.write("metrics.jsonl", jsonl(log_lines(200)[1][:150]))
        run.folder.write("heartbeats.json", heartbeats(120.0, 0.25, 0.75, 0.5))
        text = line(config, "pretrain")
        assert "step 160 of 200" in text
        assert "2.5 steps/s, slowest of 3 processes: rank 1 on node1, 0.75 s a step (median 0.5 s), " in text
        assert "last sign of life 2.0 min ago (phase step)" in text
        run.folder.write("heartbeats.json", heartbeats(0.0, 0.25))
        assert "slowest" not in line(config, "pretrain")


def test_a_clock_ahead_of_ours_is_no_trouble(config: Config) -> None:
    commit_first(config, "corpus", "vocab", "tokens")
    with open_run(STAGES["pretrain"], config) as run:
        run.folder.write("heartbeats.json", heartbeats(-7200.0, 0.25, 0.75))
        assert "last sign of life 0.0 s ago" in line(config, "pretrain")
        run.folder.write("heartbeats.json", b'{"time": 17')
        assert "last sign of life" not in line(config, "pretrain")


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    commit_all(config, CODES)
    before = {path: path.stat().st_mtime_ns for path in Path(config.work_dir).rglob("*")}
    files = tree(Path(config.work_dir))
    status_lines(config)
    assert {path: path.stat().st_mtime_ns for path in Path(config.work_dir).rglob("*")} == before
    assert tree(Path(config.work_dir)) == files


def test_an_object_store_is_read_without_showing_its_key(tmp_path: Path, s3_options: dict[str, dict[str, Any]]) -> None:
    config = make_config(tmp_path, work_dir="s3://bucket/status", storage_options=s3_options)
    commit_first(config, "corpus", "vocab", "tokens")
    directory(config, "pretrain").write("STAGE.json", b"{}")
    directory(config, "pretrain").write("metrics.jsonl", jsonl(log_lines(20)[1]))
    text = "\n".join(status_lines(config))
    assert "step 20 of 200" in text
    assert not [secret for secret in s3_options["s3"].values() if secret in text]
