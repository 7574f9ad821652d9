"""What every stage of a config has come to: read from the work directory alone, so it works from any machine.

A look changes nothing. It costs one listing of `logs/`, a look at each stage's directory and lock, the end of the
training metrics and the training processes' newest heartbeats.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.plan import PlanRow, plan
from pipeline.progress import duration as duration
from pipeline.storage import Folder

METRICS_FILE = "metrics.jsonl"
HEARTBEATS_FILE = "heartbeats.json"
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class StageStatus:
    """One stage: its row of the plan, whether a run holds its lock, and the logs of its executions, oldest first."""

    row: PlanRow
    held: bool
    logs: list[dict[str, Any]]


def stage_statuses(config: Config) -> list[StageStatus]:
    """The status of every stage, in stage order."""
    work_dir = Folder(config.work_dir, config.storage_options)
    logs = sorted(name for name in work_dir.files("logs") if name.endswith(".json")) if work_dir.exists("logs") else []
    found = []
    for row in plan(config):
        label = f"{row.stage}-{row.fingerprint}"
        own = work_dir.read_many([name for name in logs if name.startswith(f"logs/{label}-")])
        found.append(StageStatus(row, is_held(work_dir / ".locks", label), _objects(own.values())))
    return found


def is_held(locks: Folder, name: str) -> bool:
    """Whether a run holds this lock now. On an object store a lease that a killed run left behind counts as held."""
    if not locks.is_local:
        return locks.exists(f"{name}.lease")
    try:
        with open(locks.path(f"{name}.lock"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def newest_metrics(folder: Folder) -> dict[str, Any]:
    """The last step and the last value of every name in a stage's training metrics; empty where there are none."""
    if not folder.exists(METRICS_FILE):
        return {}
    with folder.open(METRICS_FILE) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().splitlines()
    newest: dict[str, Any] = {}
    for entry in _objects(lines):
        newest.update(entry)
    return newest


def newest_heartbeats(folder: Folder) -> dict[str, Any]:
    """What the processes of a training run last said of themselves; empty where they said nothing."""
    found = _objects(folder.read_many([HEARTBEATS_FILE]).values())
    return found[0] if found else {}


def status_lines(config: Config) -> list[str]:
    """One line a stage for people: state, parts, whether it runs, time of its last execution, training progress."""
    lines = []
    for status in stage_statuses(config):
        row = status.row
        progress = _progress(config, row) if row.stage == "pretrain" and row.state != "missing" else []
        facts = [_parts(row), _running(status), _last_log(status.logs), *progress]
        lines.append(f"{row.stage:9}{row.fingerprint or '-':14}{row.state:9}{', '.join(filter(None, facts))}")
    return lines


def _parts(row: PlanRow) -> str:
    if row.state == "missing":
        return row.reason
    total = "" if row.parts_total is None else f" of {row.parts_total:,}"
    return f"{row.parts_done:,}{total} part{'' if (row.parts_total or row.parts_done) == 1 else 's'}"


def _running(status: StageStatus) -> str:
    if status.held:
        return "a run is working on it"
    return "no run is working on it" if status.row.state == "partial" else ""


def _last_log(logs: list[dict[str, Any]]) -> str:
    if not logs:
        return ""
    last = logs[-1]
    return f"last execution {last.get('outcome', 'ended')} after {duration(float(last.get('seconds', 0)))}"


def _progress(config: Config, row: PlanRow) -> list[str]:
    """How far training is: step, speed and slowest process, the losses logged, the checkpoint to go on from."""
    folder = Folder(config.work_dir, config.storage_options) / row.stage / str(row.fingerprint)
    last, facts = newest_metrics(folder), []
    pulse = newest_heartbeats(folder) if row.state == "partial" else {}
    if steps := [found["step"] for found in (last, pulse) if "step" in found]:
        facts.append(f"step {max(steps):,} of {config.pretrain.steps:,}")
    facts += [_loss(name, last) for name in ("generator_loss", "discriminator_loss") if name in last]
    if "tokens_per_second" in last:
        facts.append(f"{last['tokens_per_second']:,.0f} tokens/s")
    facts += _pulse(pulse) if pulse else []
    if saved := checkpoint_steps(folder / "checkpoints"):
        facts.append(f"checkpoint at step {max(saved):,}")
    return facts


def _pulse(news: dict[str, Any]) -> list[str]:
    """The run's speed, its slowest process, which holds up all others, and how old that is by this machine's clock."""
    facts = [f"{news['steps_per_second']:.4g} steps/s"] if news.get("steps_per_second") else []
    ranks = news["ranks"]
    if len(ranks) > 1:
        slowest = max(ranks, key=lambda rank: float(rank["busy_seconds"]))
        typical = statistics.median(float(rank["busy_seconds"]) for rank in ranks)
        host = f" on {slowest['host']}" if len({rank["host"] for rank in ranks}) > 1 else ""
        facts.append(
            f"slowest of {len(ranks)} processes: rank {slowest['rank']}{host}, {slowest['busy_seconds']:.3g} s a step "
            f"(median {typical:.3g} s)"
        )
    age = max(0.0, time.time() - news["time"])
    return [*facts, f"last sign of life {duration(age)} ago (phase {news['phase']})"]


def checkpoint_steps(folder: Folder) -> list[int]:
    """The steps of the whole checkpoints in a folder, ascending."""
    names = [name for name in folder.folders() if name.removeprefix("step-").isdecimal()]
    return sorted(int(name.removeprefix("step-")) for name in names if folder.exists(f"{name}/COMMITTED.json"))


def _loss(name: str, last: dict[str, Any]) -> str:
    held_out = last.get(f"validation_{name}")
    return f"{name} {last[name]:.4g}" + (f" (held-out {held_out:.4g})" if held_out is not None else "")


def _objects(texts: Iterable[bytes]) -> list[dict[str, Any]]:
    """The JSON objects among some texts; a line that is cut off at either end is none."""
    found = []
    for text in texts:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return [value for value in found if isinstance(value, dict)]
