"""Reading the HTML pages that the project writes, as a browser does."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree


class Page(HTMLParser):
    """The page as a browser reads it: elements and their attributes, the text, every table's rows of cells.

    A cell is its text, or the exact value where a `data` element gives one; a table goes by the heading before it.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._heading = ""
        self._exact: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in {"meta", "br"}:
            return
        self._open.append(tag)
        if tag in {"h3", "summary"}:
            self._heading = ""
        elif tag == "table":
            self.tables[self._heading.strip()] = []
        elif tag == "tr":
            self.tables[self._heading.strip()].append([])
        elif tag in {"th", "td"}:
            self.tables[self._heading.strip()][-1].append("")
            self._exact = None
        elif tag == "data":
            self._exact = dict(attrs)["value"]

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
        if tag in {"th", "td"} and self._exact is not None:
            self.tables[self._heading.strip()][-1][-1] = self._exact

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in {"h3", "summary"}:
            self._heading += data
        if {"th", "td"} & set(self._open):
            self.tables[self._heading.strip()][-1][-1] += data

    def table(self, heading: str) -> dict[str, list[str]]:
        """A table's rows of cells by their first cell."""
        return {row[0].strip(): row[1:] for row in self.tables[heading]}


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg\b.*?</svg>", page, re.S)]


def assert_self_contained(text: str) -> None:
    """The page fetches nothing, runs nothing, and forbids itself to."""
    elements = Page(text).elements
    assert not {"script", "link", "img", "iframe", "object", "embed", "use", "image"} & {tag for tag, _ in elements}
    names = {name for _, found in elements for name in found}
    assert not {"src", "href", "srcset", "xlink:href", "style", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    policy = [found["content"] for tag, found in elements if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def assert_drawings_have_names(text: str) -> None:
    """Every chart is well-formed, says what it is and what its axis measures; no two are called the same."""
    charts = [svg for svg in svgs(text) if svg.get("class") == "chart"]
    for chart in charts:
        assert chart.get("role") == "img"
        assert chart.get("aria-label") == chart.findtext("title")
        assert any("axis" in str(label.get("class")) and label.text for label in chart.iter("text"))
    assert all(svg.get("aria-hidden") == "true" for svg in svgs(text) if svg.get("class") != "chart")
    assert len({chart.get("aria-label") for chart in charts}) == len(charts)
