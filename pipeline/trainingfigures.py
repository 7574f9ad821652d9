"""Which chart shows which values of a training log: for one run, and for the arms of an ablation.

Of one run blue is the generator, vermilion the discriminator. In an ablation a colour is an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.page import Figure, Panel, measured, share
from pipeline.plots import Curve, LineChart, Style, key, linear, percent, short
from pipeline.traininglog import TrainingLog

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
)
_UNDER_MLM = {"Generator": "Masked language model", "generator": "model"}
"""What the one network of a masked language model is called where the log says generator."""

METRICS = [prefix + metric.key for chart in _CHARTS for metric in chart.metrics for prefix in ("", "validation_")]
"""Everything in a training log that has a chart."""


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
