"""Charts as inline SVG strings: line charts for curves over steps, row charts for measures with a language a row.

A chart is an axis, marks and text. Colours and fonts are classes of the page's style sheet, so one drawing serves light
and dark mode and print. Every panel is `WIDTH` units wide and meant to be shown about that many pixels wide: wide
figures are several panels side by side, which stack on a narrow screen with their text at full size.

Curves are drawn in O(points), whatever their length, with at most a few hundred vertices: a running mean, and behind it
a band from the smallest to the largest raw value of each bucket of neighbours, so that no spike is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

WIDTH = 360
ROW = 14.0
BUCKETS = 300
_CHARACTER = 6.2  # width of one in a label, at most
_GAP = 28.0  # between the columns of a row chart
_MARGIN = 14.0  # right of the last column, for half a tick label
_HEADER = 46.0  # height of label, unit and ticks above the rows
_TICK = 36.0  # where the tick labels stand in it
_MOST_POINTS = 80
_MOST_RINGS = 30
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Floats = NDArray[np.float64]
Style = Literal["smooth", "exact", "points"]


def printable(text: str) -> str:
    """The text with every character that neither HTML nor XML may hold replaced by U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def short(value: float) -> str:
    """A number in at most five characters, for tick labels: 0.25, 30, 4k, 1.5M."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.0e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share as a number of per cent, for axes whose unit says so."""
    return short(100 * share)


@dataclass(frozen=True)
class Axis:
    """A numeric axis: what it measures, in which unit, its range, whether it is logarithmic, how a tick is written."""

    label: str
    unit: str
    low: float
    high: float
    log: bool = False
    write: Callable[[float], str] = short

    @property
    def scale(self) -> str:
        """The unit, and the word for a logarithmic scale."""
        return ", ".join(filter(None, (self.unit, "log scale" if self.log else "")))

    def at(self, value: float) -> float:
        """Place of a value between 0 (low end) and 1 (high end); values outside lie on the nearer end."""
        if self.log:
            if value <= self.low:
                return 0.0
            return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, most: int) -> list[float]:
        """At most `most` round values inside the range."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = math.ceil((last - first + 1) / most)
            return [10.0**power for power in range(first, last + 1, stride)]
        step = _step(self.high - self.low, most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]

    def ticks_within(self, width: float) -> list[float]:
        """As many ticks as have room for their labels, a character apart, on an axis of this width."""
        for most in range(7, 1, -1):
            ticks = self.ticks(most)
            ends = [(width * self.at(tick), _CHARACTER * len(self.write(tick)) / 2) for tick in ticks]
            if all(right - left > half + other + _CHARACTER for (left, half), (right, other) in pairwise(ends)):
                return ticks
        return ticks[:1]


def linear(
    label: str, unit: str, values: Sequence[float], *, write: Callable[[float], str] = short, zero: bool = False
) -> Axis:
    """A linear axis over the values, widened to round ends; with `zero` it reaches zero."""
    ends = [0.0, *values] if zero else values
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    if high - low < 1e-12:
        low, high = (0.0, high) if high > 0 else (0.0, 1.0)
    step = _step(high - low, 9)
    return Axis(label, unit, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, write=write)


def logarithmic(label: str, unit: str, values: Sequence[float], *, write: Callable[[float], str] = short) -> Axis:
    """A logarithmic axis over the positive values; its ends are 1, 2 or 5 times a power of ten beyond them."""
    positive = [value for value in values if value > 0] or [1.0]
    low = 1 / _round_up(1.25 / min(positive))
    return Axis(label, unit, low, max(_round_up(max(positive)), 10 * low), log=True, write=write)


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts the span into at most `most - 1` pieces."""
    return _round_up(span / max(1, most - 1))


def _round_up(value: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not less than the value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


# ----------------------------------------------------------------------------------------------------------- row charts


@dataclass(frozen=True)
class Mark:
    """One thing in a row: a `bar` or `rule` from start to end, or a `dot` or `ring` at end; `tip` shows on hover."""

    shape: Literal["bar", "rule", "dot", "ring"]
    colour: str
    end: float
    start: float = 0.0
    tip: str = ""


@dataclass(frozen=True)
class Column:
    """One measure of a row chart: its axis, the marks of every row, and where a reference line stands."""

    axis: Axis
    rows: Sequence[Sequence[Mark]]
    reference: float | None = None


@dataclass(frozen=True)
class RowChart:
    """Measures side by side over the same named rows."""

    title: str
    names: Sequence[str]
    columns: Sequence[Column]
    row: float = ROW

    def panels(self, most: int = 40) -> list[Markup]:
        """Up to `most` rows, a panel for each measure; beyond, panels that show every measure of some of the rows."""
        if len(self.names) <= most:
            parts = [RowChart(f"{self.title}: {c.axis.label}", self.names, [c], self.row) for c in self.columns]
        else:
            size = math.ceil(len(self.names) / max(3, math.ceil(len(self.names) / most)))
            parts = [self._slice(first, first + size) for first in range(0, len(self.names), size)]
        gutter = 12 + _CHARACTER * max((len(_clip(name)) for name in self.names), default=0)
        return [part._panel(gutter) for part in parts]

    def _slice(self, first: int, end: int) -> RowChart:
        names = self.names[first:end]
        columns = [Column(c.axis, c.rows[first:end], c.reference) for c in self.columns]
        title = f"{self.title}, rows {first + 1} to {first + len(names)} of {len(self.names)}"
        return RowChart(title, names, columns, self.row)

    def _panel(self, gutter: float) -> Markup:
        width = (WIDTH - _MARGIN - gutter - _GAP * (len(self.columns) - 1)) / len(self.columns)
        middles = [_HEADER + self.row * (index + 0.5) for index in range(len(self.names))]
        bottom = _HEADER + self.row * len(self.names)
        rows = zip(self.names, middles, strict=True)
        body = [_label(_clip(name), gutter - 6, y + 3.7, "name last") for name, y in rows]
        for number, column in enumerate(self.columns):
            left = gutter + number * (width + _GAP)
            body += _column_frame(column, left, width, bottom)
            for y, marks in zip(middles, column.rows, strict=True):
                body += [_mark(mark, column.axis, left, width, y, self.row) for mark in marks]
        return _svg(self.title, bottom + 6, body)


def _column_frame(column: Column, left: float, width: float, bottom: float) -> list[Markup]:
    """Axis label, unit and tick labels above the rows, hairlines through them, and the reference line."""
    axis = column.axis
    parts = [_label(axis.label, left, 10, "axis"), _label(axis.scale, left, 22, "unit")]
    for tick in axis.ticks_within(width):
        x = left + width * axis.at(tick)
        parts.append(_path("grid", f"M{x:.1f} {_TICK + 4:.1f}V{bottom:.1f}"))
        parts.append(_label(axis.write(tick), x, _TICK, "tick middle"))
    if column.reference is not None:
        x = left + width * axis.at(column.reference)
        parts.append(_path("reference", f"M{x:.1f} {_HEADER - 4:.1f}V{bottom:.1f}"))
    return parts


def _clip(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def _mark(mark: Mark, axis: Axis, left: float, width: float, y: float, row: float) -> Markup:
    start, end = left + width * axis.at(mark.start), left + width * axis.at(mark.end)
    x0, x1 = sorted((start, end))
    tip = tag("title", mark.tip) if mark.tip else Markup()
    if mark.shape == "bar":
        thick = 0.6 * row
        return tag("rect", tip, class_=f"{mark.colour} bar", x=x0, y=y - thick / 2, width=x1 - x0, height=thick)
    if mark.shape == "rule":
        return _path(f"{mark.colour} rule", f"M{x0:.1f} {y:.1f}H{x1:.1f}", tip)
    return tag("circle", tip, class_=f"{mark.colour} {mark.shape}", cx=end, cy=y, r=3)


# ---------------------------------------------------------------------------------------------------------- line charts


@dataclass(frozen=True)
class Curve:
    """Values over steps, or over time, in one of three styles.

    `smooth`: a running mean in front of the band of raw values; `exact`: the values as they are; `points`: held-out
    measurements, dashed and ringed. A curve with `gaps` lets an equal one behind it show.
    """

    style: Style
    colour: str
    steps: Floats
    values: Floats
    gaps: bool = False


@dataclass(frozen=True)
class LineChart:
    """Curves over a common horizontal axis that begins at zero."""

    title: str
    x_label: str
    y_axis: Axis
    curves: Sequence[Curve]

    def panel(self) -> Markup:
        """The chart as one panel."""
        last = max((float(curve.steps[-1]) for curve in self.curves if curve.steps.size), default=1.0)
        plot = _Plot(Axis(self.x_label, "", 0.0, last or 1.0), self.y_axis)
        body = plot.frame()
        for curve in sorted(self.curves, key=lambda curve: curve.style == "points"):
            body += plot.curve(curve) if curve.steps.size else []
        return _svg(self.title, 230, body)


@dataclass(frozen=True)
class _Plot:
    """Data coordinates to the panel's, inside the margins that the labels need."""

    x_axis: Axis
    y_axis: Axis
    left: float = 42.0
    right: float = WIDTH - 10.0
    top: float = 24.0
    bottom: float = 192.0

    def x(self, step: float) -> float:
        return self.left + (self.right - self.left) * self.x_axis.at(step)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.y_axis.at(value)

    def frame(self) -> list[Markup]:
        unit = tag("tspan", f" ({self.y_axis.scale})", class_="unit") if self.y_axis.scale else Markup()
        parts = [tag("text", escape(self.y_axis.label) + unit, class_="axis", x=0, y=10)]
        parts.append(_label(self.x_axis.label, self.right, 224, "axis last"))
        for tick in self.y_axis.ticks(6):
            y = self.y(tick)
            parts.append(_path("grid", f"M{self.left:.1f} {y:.1f}H{self.right:.1f}"))
            parts.append(_label(self.y_axis.write(tick), self.left - 6, y + 3.7, "tick last"))
        for tick in self.x_axis.ticks(6):
            parts.append(_path("stub", f"M{self.x(tick):.1f} {self.bottom:.1f}v4"))
            anchor = "last" if self.x_axis.at(tick) > 0.96 else "middle"
            parts.append(_label(self.x_axis.write(tick), self.x(tick), self.bottom + 16, f"tick {anchor}"))
        return [*parts, _path("stub", f"M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}")]

    def curve(self, curve: Curve) -> list[Markup]:
        steps, values, gaps = curve.steps, curve.values, " gaps" if curve.gaps else ""
        rings = zip(steps.tolist(), values.tolist(), strict=True) if steps.size <= self._most_rings(curve) else []
        drawn = [tag("circle", class_=f"{curve.colour} ring", cx=self.x(x), cy=self.y(y), r=2.6) for x, y in rings]
        if curve.style == "points":
            dashes = self._path(*bucket_means(steps, values, _MOST_POINTS))
            return [_path(f"{curve.colour} dashed{gaps}", dashes), *drawn]
        if curve.style == "exact":
            line = self._path(*bucket_means(steps, values))
            return [_path(f"{curve.colour} line{gaps or ' exact'}", line), *drawn]
        middles, lows, highs = bucket_band(steps, values)
        band = f"{self._path(middles, highs)}L{self._path(middles[::-1], lows[::-1])[1:]}Z"
        mean = self._path(*bucket_means(steps, running_mean(values)))
        return [_path(f"{curve.colour} raw", band), _path(f"{curve.colour} line{gaps}", mean), *drawn]

    @staticmethod
    def _most_rings(curve: Curve) -> int:
        """Up to how many values are ringed: a single one always, as it makes no line."""
        return _MOST_RINGS if curve.style == "points" and not curve.gaps else 1

    def _path(self, steps: Floats, values: Floats) -> str:
        points = zip(steps.tolist(), values.tolist(), strict=True)
        return "M" + "L".join(f"{self.x(step):.1f} {self.y(value):.1f}" for step, value in points)


def running_mean(values: Floats) -> Floats:
    """Mean over a centred window of a fiftieth of the curve, narrower towards its ends so that they do not bend."""
    index = np.arange(values.size)
    widest = max(2, values.size // 100) if values.size > 20 else 0
    half = np.minimum(widest, np.minimum(index, values.size - 1 - index))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def bucket_means(steps: Floats, values: Floats, most: int = BUCKETS) -> tuple[Floats, Floats]:
    """Mean step and mean value of each of at most `most` buckets of neighbours."""
    starts = _bucket_starts(steps.size, most)
    sizes = np.diff(np.append(starts, steps.size))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def bucket_band(steps: Floats, values: Floats, most: int = BUCKETS) -> tuple[Floats, Floats, Floats]:
    """Mean step, smallest and largest value of each of at most `most` buckets of neighbours."""
    starts = _bucket_starts(steps.size, most)
    middles, _ = bucket_means(steps, values, most)
    return middles, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _bucket_starts(size: int, most: int) -> NDArray[np.int64]:
    count = min(size, most)
    return np.arange(count) * size // count


# --------------------------------------------------------------------------------------------------------- SVG elements


def tag(name: str, content: str = "", **attributes: str | float) -> Markup:
    """An SVG element; content and attributes are escaped unless they are markup, and `class_` stands for `class`."""
    pairs = [f' {key.rstrip("_").replace("_", "-")}="{_safe(value)}"' for key, value in attributes.items()]
    return Markup(f"<{name}{''.join(pairs)}>{_safe(content)}</{name}>")  # noqa: S704, all that varies went through _safe


def key(shape: str, colour: str) -> Markup:
    """The swatch of a legend entry, drawn as the chart draws it."""
    ring = tag("circle", class_=f"{colour} ring", cx=8, cy=5, r=2.6)
    drawn = {
        "bar": tag("rect", class_=f"{colour} bar", x=2, y=1, width=12, height=8),
        "dot": tag("circle", class_=f"{colour} dot", cx=8, cy=5, r=3),
        "ring": ring,
        "line": _path(f"{colour} line", "M1 5H15"),
        "reference": _path("reference", "M8 0V10"),
        "dashed": _path(f"{colour} dashed", "M0 5H16") + ring,
    }
    return tag("svg", drawn[shape], class_="key", viewBox="0 0 16 10", aria_hidden="true")


def _svg(title: str, height: float, body: list[Markup]) -> Markup:
    content = tag("title", title) + Markup().join(body)
    return tag("svg", content, class_="chart", viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=title)


def _label(text: str, x: float, y: float, style: str) -> Markup:
    return tag("text", text, class_=style, x=x, y=y)


def _path(style: str, d: str, content: str = "") -> Markup:
    return tag("path", content, class_=style, d=d)


def _safe(value: str | float) -> Markup:
    """Text or a coordinate as it may stand in the document; markup passes through."""
    if isinstance(value, Markup):
        return value
    return escape(printable(value) if isinstance(value, str) else f"{round(value, 1):g}")
