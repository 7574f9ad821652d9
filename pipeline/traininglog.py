"""Reads the log of a training run as columns: the committed `losses.jsonl`, and `metrics.jsonl`, which grows meanwhile.

Each line is a JSON object with a `step` and what was measured at it. Only the columns that are asked for are kept: half
a million steps are read in a few seconds and held in 8 bytes a value.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.json
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.stage import Artifact
from pipeline.status import METRICS_FILE
from pipeline.storage import Folder, redact

LOSSES_FILE = "losses.jsonl"
TIME = "seconds"
"""Training time since the line before that has it; measurements on held-out rows and checkpoints do not count."""
CLOCK = frozenset({TIME, "tokens_per_second", "model_tflops"})
"""What only `metrics.jsonl` says, because it differs from one execution to the next."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrainingLog:
    """Tables that each have a `step` and columns of float64, null where a step measured no such thing."""

    tables: tuple[pa.Table, ...]

    @property
    def last_step(self) -> int:
        """The greatest step of all, 0 in an empty log."""
        return max((pyarrow.compute.max(table["step"]).as_py() or 0 for table in self.tables), default=0)

    @property
    def not_finite(self) -> int:
        """How many values are NaN or infinite."""
        names = [(table, name) for table in self.tables for name in table.column_names]
        return sum(int(np.sum(~np.isfinite(_measured(table, name)[1]))) for table, name in names)

    def column(self, name: str) -> tuple[Floats, Floats]:
        """Steps and finite values of a name; empty where the log has none."""
        for table in self.tables:
            if name in table.column_names:
                steps, values = _measured(table, name)
                finite = np.isfinite(values)
                return steps[finite], values[finite]
        return np.empty(0), np.empty(0)

    @cached_property
    def elapsed(self) -> tuple[Floats, Floats]:
        """Steps, and the seconds of training up to each; empty where the log has no times."""
        steps, seconds = self.column(TIME)
        return steps, np.cumsum(seconds)

    def time_at(self, steps: Floats) -> Floats:
        """Seconds of training up to these steps, in between the logged ones in proportion."""
        known, seconds = self.elapsed
        return np.interp(steps, np.append(0.0, known), np.append(0.0, seconds))


def training_log(folder: Folder, artifact: Artifact | None, names: Sequence[str]) -> TrainingLog:
    """The named columns of a pretrain stage's log: what is committed after checking it, the rest from its metrics.

    Raises:
        PipelineError: a file is damaged.
    """
    losses, metrics = [], list(names)
    if artifact:
        losses = [name for name in names if name not in CLOCK]
        metrics = [name for name in names if name in CLOCK]
    tables = []
    if artifact and LOSSES_FILE in artifact.manifest.parts:
        with open(artifact.fetch(LOSSES_FILE), "rb") as file:
            tables.append(_read(file.read(), losses, LOSSES_FILE))
    if folder.exists(METRICS_FILE):
        tables.append(_read(folder.read(METRICS_FILE), metrics, f"{redact(folder.url)}/{METRICS_FILE}"))
    return TrainingLog(tuple(tables))


def _measured(table: pa.Table, name: str) -> tuple[Floats, Floats]:
    there = table[name].is_valid()
    return tuple(table[key].filter(there).to_numpy().astype(np.float64) for key in ("step", name))


def _read(data: bytes, names: Sequence[str], source: str) -> pa.Table:
    """Parse whole lines; the last one of a run that works or was killed may be half written."""
    schema = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in names)])
    whole = data if data.rstrip().endswith(b"}") else data[: data.rfind(b"\n") + 1]
    if not whole.strip():
        return schema.empty_table()
    options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        return pyarrow.json.read_json(io.BytesIO(whole), parse_options=options)
    except pa.ArrowInvalid as error:
        raise PipelineError(f"{source}: not a log of training steps ({error}); run the stage again") from None
