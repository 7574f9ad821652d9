"""Reads the log of a training run as columns: the committed `losses.jsonl`, and `metrics.jsonl`, which grows meanwhile.

Each line is a JSON object with a `step` and what was measured at it: numbers, and now and then an object of numbers
by language. Only what is asked for is kept: half a million steps are read in a few seconds and held in 8 bytes a value.
The objects by language are few; the lines that have one are found by a search for its name and parsed one by one.
"""

from __future__ import annotations

import io
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.json
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.status import METRICS_FILE
from pipeline.storage import Folder, redact

LOSSES_FILE = "losses.jsonl"
TIME = "seconds"
"""Training time since the line before that has it; measurements on held-out rows and checkpoints do not count."""
PHASES = ("data", "generator", "sampling", "discriminator", "optimizer")
"""What a step spends its time on, each logged as `..._seconds` over the same steps as `seconds`."""
CLOCK = frozenset(
    {
        TIME,
        *(f"{phase}_seconds" for phase in PHASES),
        "checkpoint_seconds",
        "tokens_per_second",
        "model_tflops",
        "utilisation",
        "memory_mb",
    }
)
"""What only `metrics.jsonl` says, because it differs from one execution to the next."""

Floats = NDArray[np.float64]
Series = tuple[Floats, Floats]
"""Steps, and the values at them."""


@dataclass(frozen=True, eq=False)
class TrainingLog:
    """What was logged, in two forms.

    Args:
        tables: each with a `step` and columns of float64, null where a step measured no such thing.
        languages: measure -> language -> series, for the measures that are logged by language.
    """

    tables: tuple[pa.Table, ...]
    languages: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The greatest step of all, 0 in an empty log."""
        return max((pyarrow.compute.max(table["step"]).as_py() or 0 for table in self.tables), default=0)

    @property
    def not_finite(self) -> int:
        """How many values are NaN or infinite."""
        columns = [_measured(table, name) for table in self.tables for name in table.column_names]
        columns += [series for found in self.languages.values() for series in found.values()]
        return sum(int(np.sum(~np.isfinite(values))) for _, values in columns)

    def column(self, name: str) -> Series:
        """Steps and finite values of a name; empty where the log has none."""
        for table in self.tables:
            if name in table.column_names:
                return _finite(*_measured(table, name))
        return np.empty(0), np.empty(0)

    def by_language(self, measure: str) -> dict[str, Series]:
        """Steps and finite values of each language that has any; see `training_log` for the measure's name."""
        found = {language: _finite(*series) for language, series in self.languages.get(measure, {}).items()}
        return {language: series for language, series in found.items() if series[0].size}

    @cached_property
    def elapsed(self) -> Series:
        """Steps, and the seconds of training up to each; empty where the log has no times."""
        steps, seconds = self.column(TIME)
        return steps, np.cumsum(seconds)

    def time_at(self, steps: Floats) -> Floats:
        """Seconds of training up to these steps, in between the logged ones in proportion."""
        known, seconds = self.elapsed
        return np.interp(steps, np.append(0.0, known), np.append(0.0, seconds))


def training_log(
    folder: Folder, artifact: Artifact | None, names: Sequence[str], by_language: Sequence[str] = ()
) -> TrainingLog:
    """The named columns of a pretrain stage's log: what is committed after checking it, the rest from its metrics.

    Args:
        folder: of the stage.
        artifact: the committed stage; None while it is trained.
        names: columns of numbers.
        by_language: columns of objects, `tokens_by_language`, or one measure of those that have several for each
            language, `validation_by_language/generator_loss`. They do not depend on the clock.

    Raises:
        PipelineError: a file is damaged.
    """
    logs = []
    if artifact and LOSSES_FILE in artifact.manifest.parts:
        with open(artifact.fetch(LOSSES_FILE), "rb") as file:
            logs.append(_read(file.read(), LOSSES_FILE, [name for name in names if name not in CLOCK], by_language))
        names, by_language = [name for name in names if name in CLOCK], ()
    if folder.exists(METRICS_FILE):
        data = _whole_lines(folder.read(METRICS_FILE))
        logs.append(_read(data, f"{redact(folder.url)}/{METRICS_FILE}", names, by_language))
    return TrainingLog(tuple(table for table, _ in logs), {k: v for _, found in logs for k, v in found.items()})


def _read(
    data: bytes, source: str, names: Sequence[str], by_language: Sequence[str]
) -> tuple[pa.Table, dict[str, dict[str, Series]]]:
    try:
        return _columns(data, names), _by_language(data, by_language)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PipelineError(f"{source}: not a log of training steps ({error}); run the stage again") from None


def _whole_lines(data: bytes) -> bytes:
    """All but the last line of a run that works or was killed, where it is half written."""
    return data[: data.rfind(b"\n") + 1]


def _measured(table: pa.Table, name: str) -> Series:
    there = table[name].is_valid()
    return tuple(table[key].filter(there).to_numpy().astype(np.float64) for key in ("step", name))


def _finite(steps: Floats, values: Floats) -> Series:
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _columns(data: bytes, names: Sequence[str]) -> pa.Table:
    schema = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in names)])
    if not data:
        return schema.empty_table()
    options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    return pyarrow.json.read_json(io.BytesIO(data), parse_options=options)


def _by_language(data: bytes, measures: Sequence[str]) -> dict[str, dict[str, Series]]:
    found: dict[str, dict[str, tuple[array[int], array[float]]]] = {measure: {} for measure in measures}
    for line in _lines_by_language(data) if measures else ():
        entry = json.loads(line)
        for measure in measures:
            column, _, inner = measure.partition("/")
            for language, value in entry.get(column, {}).items():
                if not inner or inner in value:
                    steps, values = found[measure].setdefault(language, (array("q"), array("d")))
                    steps.append(entry["step"])
                    values.append(value[inner] if inner else value)
    return {
        measure: {language: (np.array(steps, float), np.array(values)) for language, (steps, values) in series.items()}
        for measure, series in found.items()
    }


def _lines_by_language(data: bytes) -> Iterator[bytes]:
    """The lines that have a column by language."""
    end = 0
    for column in re.finditer(b'_by_language"', data):
        if column.start() >= end:
            end = data.find(b"\n", column.start()) + 1
            yield data[data.rfind(b"\n", 0, column.start()) + 1 : end]
