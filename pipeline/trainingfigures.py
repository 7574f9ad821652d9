"""Which chart or table shows which values of a training log: for one run, and for the arms of an ablation.

Of one run blue is the generator, vermilion the discriminator; where languages are compared, a line is a language. In an
ablation a colour is an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.page import Figure, Panel, Table, measured, share
from pipeline.plots import Curve, LineChart, Style, key, linear, percent, short
from pipeline.status import duration
from pipeline.traininglog import PHASES, TIME, TrainingLog

# ------------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class _Metric:
    """One curve: its key in the log (held-out values have the prefix `validation_`), name in the legend and colour."""

    key: str
    name: str
    colour: str


@dataclass(frozen=True)
class _Chart:
    """One panel of the training figure."""

    heading: str
    label: str
    unit: str
    metrics: tuple[_Metric, ...]
    write: Callable[[float], str] = short
    style: Style = "smooth"


def _both(measure: str) -> tuple[_Metric, _Metric]:
    return (
        _Metric(f"generator_{measure}", "generator", "blue"),
        _Metric(f"discriminator_{measure}", "discriminator", "vermilion"),
    )


_CHARTS = (
    _Chart("Generator", "masked-token loss", "nats", (_Metric("generator_loss", "loss", "blue"),)),
    _Chart("Discriminator", "replaced-token loss", "nats", (_Metric("discriminator_loss", "loss", "vermilion"),)),
    _Chart(
        "Finding the replaced tokens",
        "accuracy and F1",
        "%",
        (_Metric("replaced_accuracy", "accuracy", "purple"), _Metric("replaced_f1", "F1", "vermilion")),
        percent,
    ),
    _Chart("Guessing the masked tokens", "accuracy", "%", (_Metric("masked_accuracy", "accuracy", "blue"),), percent),
    _Chart("Embeddings' mean cosine", "cosine of two pieces", "", _both("embedding_cosine"), style="exact"),
    _Chart("Learning rate", "learning rate", "", _both("learning_rate"), style="exact"),
    _Chart("Gradient norm", "before clipping", "", (*_both("grad_norm"), _Metric("joint_grad_norm", "joint", "blue"))),
    _Chart("Throughput", "speed", "tokens a second", (_Metric("tokens_per_second", "speed", "steel"),)),
    _Chart("Computation", "model operations", "TFLOP a second", (_Metric("model_tflops", "TFLOP/s", "steel"),)),
    _Chart("Utilisation", "share of the device's peak", "%", (_Metric("utilisation", "share", "steel"),), percent),
    _Chart("Loss scale", "factor under fp16", "", (_Metric("loss_scale", "factor", "steel"),), style="exact"),
)
_UNDER_MLM = {"Generator": "Masked language model", "generator": "model"}
"""What the one network of a masked language model is called where the log says generator."""

_PHASE_TIMES = {f"{phase}_seconds": phase for phase in PHASES}
_COUNTERS = ["skipped_steps", "rollbacks", "memory_mb"]
METRICS = [prefix + metric.key for chart in _CHARTS for metric in chart.metrics for prefix in ("", "validation_")]
METRICS += [*_COUNTERS, TIME, *_PHASE_TIMES]
"""Every column of a training log that the report shows."""


def training_figure(log: TrainingLog, objective: str) -> Figure | None:
    """The curves of every known metric that the log holds; None where it holds none."""
    names = _UNDER_MLM if objective == "mlm" else {}
    panels = [panel for chart in _CHARTS if (panel := _training_panel(chart, log, names))]
    if not panels:
        return None
    return Figure(
        "Training curves.",
        "Bands: the range of the logged values. Lines: their running mean. Dashes: held-out rows. Beside each name is "
        "the last value.",
        panels,
    )


def _training_panel(chart: _Chart, log: TrainingLog, names: Mapping[str, str]) -> Panel | None:
    heading, curves, legend = names.get(chart.heading, chart.heading), [], []
    for number, metric in enumerate(chart.metrics):
        gaps = chart.style == "exact" and number > 0
        training = Curve(chart.style, metric.colour, *log.column(metric.key), gaps=gaps)
        held_out = Curve("points", metric.colour, *log.column(f"validation_{metric.key}"))
        if training.steps.size:
            name = names.get(metric.name, metric.name)
            legend.append((key("line", metric.colour), f"{name} {_last(training, chart)}"))
        if held_out.steps.size:
            legend.append((key("dashed", metric.colour), f"held-out {_last(held_out, chart)}"))
        curves += [training, held_out]
    if not legend:
        return None
    values = np.concatenate([curve.values for curve in curves]).tolist()
    axis = linear(chart.label, chart.unit, values, write=chart.write, zero=True)
    return Panel(LineChart(heading, "step", axis, curves).panel(), heading, legend)


def _last(curve: Curve, chart: _Chart) -> str:
    value = float(curve.values[-1])
    return share(value) if chart.write is percent else measured(value)


def incidents(log: TrainingLog) -> list[str]:
    """Sentences on what went wrong in training and was overcome, and on its memory; none where there is nothing."""
    skipped, rollbacks, memory = (max(log.column(name)[1].tolist(), default=0.0) for name in _COUNTERS)
    sentences = []
    if log.not_finite:
        sentences.append(f"{log.not_finite:,} logged values are not finite numbers and are not drawn.")
    if skipped:
        sentences.append(f"Steps skipped because their gradient was not finite: {skipped:,.0f}.")
    if rollbacks:
        sentences.append(f"Returns to an earlier checkpoint after the loss had jumped: {rollbacks:,.0f}.")
    if memory:
        sentences.append(f"The first process had at most {memory / 1000:.3g} GB of memory in use.")
    return sentences


def phases_table(log: TrainingLog, objective: str) -> Table | None:
    """Where the training time of the first process went; None where the log does not say."""
    times = {phase: float(np.sum(log.column(name)[1])) for name, phase in _PHASE_TIMES.items()}
    spent = {_PHASE_NAMES[phase]: seconds for phase, seconds in times.items() if seconds}
    if not spent:
        return None
    total = max(float(np.sum(log.column(TIME)[1])), sum(spent.values()))
    if (rest := total - sum(spent.values())) > 0:
        spent["the rest"] = rest
    names = _UNDER_MLM if objective == "mlm" else {}
    rows = [[names.get(name, name), duration(seconds), share(seconds / total)] for name, seconds in spent.items()]
    return Table("Where the training time goes", ["Phase", "Time", "Share"], rows, ["all", duration(total), ""])


_PHASE_NAMES = {
    "data": "waiting for rows",
    "generator": "generator",
    "sampling": "masked tokens: head, loss and draws",
    "discriminator": "discriminator",
    "optimizer": "optimisers",
}


# ---------------------------------------------------------------------------------------- one run, language by language

TOKENS_SEEN = "tokens_by_language"
_LOSS, _REPLACED_LOSS, _F1 = (
    f"validation_by_language/{measure}" for measure in ("generator_loss", "discriminator_loss", "replaced_f1")
)
BY_LANGUAGE = [TOKENS_SEEN, _LOSS, _REPLACED_LOSS, _F1]
"""Every measure by language of a training log that the report shows."""
_COLOURS = ("blue", "vermilion", "green", "purple", "amber")
_LINES: tuple[tuple[Style, str, str], ...] = (
    *(("exact", colour, "line") for colour in _COLOURS),
    *(("points", colour, "dashed") for colour in _COLOURS),
)
_LANGUAGE_CHARTS: tuple[tuple[str, str, str, str, Callable[[float], str]], ...] = (
    (_LOSS, "Guessing the masked tokens", "masked-token loss", "nats", short),
    (_REPLACED_LOSS, "Telling the replaced tokens", "replaced-token loss", "nats", short),
    (_F1, "Finding the replaced tokens", "F1", "%", percent),
)


def languages_figure(log: TrainingLog, order: Sequence[str]) -> Figure | None:
    """Held-out losses and F1 of the first ten languages of an order that the log has; None where it has none."""
    there = log.by_language(_LOSS)
    lines = dict(zip((name for name in order if name in there), _LINES, strict=False))
    panels = []
    for measure, heading, label, unit, write in _LANGUAGE_CHARTS:
        series = log.by_language(measure)
        curves = [Curve(style, hue, *series[name]) for name, (style, hue, _) in lines.items() if name in series]
        if curves:
            axis = linear(label, unit, np.concatenate([c.values for c in curves]).tolist(), write=write, zero=True)
            panels.append(Panel(LineChart(f"{heading}, by language", "step", axis, curves).panel(), heading))
    if not panels:
        return None
    return Figure(
        "Held-out rows, language by language.",
        f"The {len(lines)} languages with the most tokens, measured on rows that are not trained on.",
        panels,
        [(key(swatch, hue), name) for name, (_, hue, swatch) in lines.items()],
    )


def languages_table(log: TrainingLog, order: Sequence[str]) -> Table | None:
    """Held-out loss and F1 of every language at the first and the last measurement; None where there are none."""
    losses, scores = log.by_language(_LOSS), log.by_language(_F1)
    rows = []
    for name in (name for name in order if name in losses):
        first, last = losses[name][1][[0, -1]].tolist()
        row = [name, measured(first), measured(last), f"{last - first:+.3f}"]
        if name in scores:
            first, last = scores[name][1][[0, -1]].tolist()
            row += [share(first), share(last), f"{100 * (last - first):+.2f}"]
        rows.append(row + ["–"] * (7 - len(row) if scores else 0))
    headings = ["Language", "Loss at first", "Loss at last", "Change", "F1 at first", "F1 at last", "Change in points"]
    return Table("Held-out rows by language", headings[: 7 if scores else 4], rows) if rows else None


def improvement(log: TrainingLog) -> list[str]:
    """A sentence on how many languages' held-out loss fell; none where it was measured less than twice."""
    losses = [values for _, values in log.by_language(_LOSS).values() if values.size > 1]
    fallen = sum(bool(values[-1] < values[0]) for values in losses)
    return [f"The loss on held-out rows fell in {fallen:,} of {len(losses):,} languages."] if losses else []


# ----------------------------------------------------------------------------------------------- arms of an ablation

ARM_COLOURS = {"mlm": "ink", "es": "green", "nes": "amber", "gdes": "blue"}
"""Arm -> colour, in the order in which they are trained and drawn."""


@dataclass(frozen=True)
class _Comparison:
    """One measure, of which every arm has a curve."""

    key: str
    heading: str
    label: str
    unit: str = ""
    write: Callable[[float], str] = short
    style: Style = "smooth"


_LOSSES = (
    _Comparison("generator_loss", "Generator", "masked-token loss", "nats"),
    _Comparison("discriminator_loss", "Discriminator", "replaced-token loss", "nats"),
    _Comparison("replaced_f1", "Finding the replaced tokens", "F1", "%", percent),
)
_COSINES = (
    _Comparison("generator_embedding_cosine", "Embeddings E_G of the generator", "mean cosine", style="exact"),
    _Comparison("discriminator_embedding_cosine", "Embeddings E_D of the discriminator", "mean cosine", style="exact"),
)
COMPARED = [prefix + chart.key for chart in (*_LOSSES, *_COSINES) for prefix in ("", "validation_")]
"""Everything in a training log that an ablation compares."""
_UNITS = ((7200.0, 3600.0, "hours"), (60.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def ablation_figures(logs: Mapping[str, TrainingLog]) -> list[Figure]:
    """Losses and F1 against steps and against training time, and the embeddings' cosines; arm -> log, all in order."""
    legend = [(key("line", ARM_COLOURS[arm]), arm) for arm, log in logs.items() if log.last_step]
    unit, per_unit = time_unit(logs)
    reading = (
        "Bands: the range of the logged values. Lines: their running mean. Dashes: held-out rows. Gaps in a line show "
        "an equal one behind it."
    )
    timed = {arm: log for arm, log in logs.items() if log.elapsed[1].size}
    figures = [
        Figure("The arms step by step.", reading, _panels(_LOSSES, logs, "step"), legend),
        Figure(
            "The arms against training time.",
            "The same over the time that training took, without measurements on held-out rows and checkpoints.",
            _panels(_LOSSES, timed, f"{unit} of training", per_unit),
            legend,
        ),
        Figure(
            "How alike the embeddings of different pieces are.",
            "The mean cosine over all pairs of different pieces. Under es both networks have the one table, and mlm "
            "has one network.",
            _panels(_COSINES, logs, "step"),
            legend,
        ),
    ]
    return [figure for figure in figures if figure.panels]


def time_unit(logs: Mapping[str, TrainingLog]) -> tuple[str, float]:
    """The unit for the training times of all these logs, and the seconds in it."""
    longest = max((float(log.elapsed[1][-1]) for log in logs.values() if log.elapsed[1].size), default=0.0)
    return next((name, length) for least, length, name in _UNITS if longest >= least)


def _panels(
    charts: Sequence[_Comparison], logs: Mapping[str, TrainingLog], x_label: str, per_unit: float | None = None
) -> list[Panel]:
    """A panel for each measure that a log holds, over steps, or over time where `per_unit` gives a unit's seconds."""
    panels = []
    for chart in charts:
        curves: list[Curve] = []
        for arm, log in logs.items():
            for style, name in ((chart.style, chart.key), ("points", f"validation_{chart.key}")):
                steps, values = log.column(name)
                x = steps if per_unit is None else log.time_at(steps) / per_unit
                curve = Curve(style, ARM_COLOURS[arm], x, values)
                curves.append(replace(curve, gaps=any(_covers(curve, other) for other in curves)))
        drawn = [curve for curve in curves if curve.values.size]
        if drawn:
            axis = linear(
                chart.label,
                chart.unit,
                np.concatenate([curve.values for curve in drawn]).tolist(),
                write=chart.write,
                zero=True,
            )
            title = f"{chart.heading}, {x_label}"
            panels.append(Panel(LineChart(title, x_label, axis, drawn).panel(), chart.heading))
    return panels


def _covers(curve: Curve, other: Curve) -> bool:
    """Whether a curve would hide one drawn before it: values at the same places that differ by less than a line."""
    if curve.style != other.style or curve.values.size != other.values.size or not curve.values.size:
        return False
    return all(
        float(np.abs(a - b).max()) <= 0.005 * float(np.abs(b).max())
        for a, b in ((curve.steps, other.steps), (curve.values, other.values))
    )
