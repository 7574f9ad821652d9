"""What the HTML pages are made of: sections of sentences, figures and tables, how numbers are written, the layout.

A page is self-contained: the template `report.html.j2` forbids it any network access, and text that came from data is
escaped. Whoever builds one puts no host, path or option into it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.config import Section as Settings
from pipeline.config import fingerprint_slice
from pipeline.plots import printable

FOLD_ROWS = 16


@dataclass(frozen=True)
class Panel:
    """One drawing, with a heading and a legend of its own where the figure's do not say it."""

    svg: Markup
    heading: str = ""
    legend: list[tuple[Markup, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, under one caption: `title` in a few words, `caption` how to read it."""

    title: str
    caption: str
    panels: list[Panel]
    legend: list[tuple[Markup, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A table: headings and rows of finished cells; the first `texts` columns are text, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    total: list[str] = field(default_factory=list)
    texts: int = 1

    @property
    def folded(self) -> bool:
        """Whether the page shows it only on request."""
        return len(self.rows) > FOLD_ROWS

    def lines(self) -> list[str]:
        """Headings, a word a line, and rows as aligned plain text for a terminal."""
        stacked = zip_longest(*(reversed(heading.split()) for heading in self.headings), fillvalue="")
        grid = [list(words) for words in stacked][::-1] + self.rows
        widths = [max(len(row[column]) for row in grid) for column in range(len(self.headings))]

        def aligned(row: list[str]) -> str:
            texts = [cell.ljust(width) for cell, width in zip(row[: self.texts], widths, strict=False)]
            numbers = [cell.rjust(width) for cell, width in zip(row[self.texts :], widths[self.texts :], strict=True)]
            return "  ".join([*texts, *numbers]).rstrip()

        return [aligned(row) for row in grid]


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading; `missing` says why there is nothing, `beside` puts tables next to figures."""

    heading: str
    sentences: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: str = ""
    beside: bool = False


@dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        title: of the window.
        heading: of the text.
        introduction: a sentence on what was run.
        sections: in their order.
        settings: the last table.
        facts: the run in a few figures, as (value, what it is).
        overview: the table in front of the sections.
    """

    title: str
    heading: str
    introduction: str
    sections: list[Section]
    settings: Table
    facts: list[tuple[str, str]] = field(default_factory=list)
    overview: Table | None = None

    def render(self) -> str:
        """The page as text."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("pipeline", ""),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=_finalize,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.j2").render(page=self).lstrip()


def _finalize(value: Any) -> Any:
    """What the template puts in place of an expression, before it is escaped."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# ---------------------------------------------------------------------------------------------------------------- cells


def count(number: int) -> str:
    """A whole number with thousands separators."""
    return f"{number:,}"


def about(number: int) -> Markup:
    """A whole number, from a million on in three digits and a word; the exact one is in the element and on hover."""
    shown = count(number)
    for limit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= limit:
            shown = f"{number / limit:.3g} {word}"
            break
    return Markup('<data value="{}" title="{:,}">{}</data>').format(number, number, shown)


def size(number: int) -> Markup:
    """Bytes in decimal units; the exact number is in the element and shows on hover."""
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    shown = f"{value:.0f}" if unit == "B" else f"{value:.3g}"
    return Markup('<data value="{}" title="{:,} bytes">{} {}</data>').format(number, number, shown, unit)


def share(value: float, digits: int = 2) -> str:
    """A fraction in per cent."""
    return f"{100 * value:.{digits}f} %"


def measured(value: float) -> str:
    """A measurement in about four digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if value >= 0.1 else f"{value:.4g}"


def setting_rows(name: str, settings: Settings) -> list[list[str]]:
    """Key and value of every setting of a config section that its fingerprint is made of."""
    return [[f"{name}.{key}", value] for key, value in _leaves(fingerprint_slice(settings))]


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return found
