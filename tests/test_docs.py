"""The documentation: links lead somewhere, links into code name the line they point at, translations keep up."""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TRANSLATIONS = sorted(DOCS.glob("*.??.md"))
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DISPLAYED = re.compile(r"\$\$(.*?)\$\$", re.DOTALL)
INLINE = re.compile(r"\$([^$\n]+)\$")

over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
over_translations = pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)


class Link(NamedTuple):
    """A link of a page that stays within the repository."""

    where: str
    """`page:line`."""
    text: str
    path: Path
    fragment: str


def prose(page: Path) -> str:
    """The text with as many lines as the page, those of code blocks empty."""
    return FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[Link]:
    for number, line in enumerate(prose(page).split("\n"), 1):
        for text, target in LINK.findall(line):
            if "://" not in target:
                path, _, fragment = target.partition("#")
                yield Link(f"{name(page)}:{number}", text, (page.parent / path if path else page).resolve(), fragment)


def code_links(page: Path) -> Iterator[Link]:
    """Links to a line of a Python file."""
    return (link for link in links(page) if link.path.suffix == ".py" and link.fragment)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def definitions(path: Path) -> dict[str, set[int]]:
    """Dotted names that a file defines, with their lines; an attribute of `self` is its class's."""
    found: dict[str, set[int]] = {}

    def visit(node: ast.AST, scope: tuple[str, ...], owner: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner, inner_owner = scope, owner
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = (*scope, child.name)
                inner_owner = inner if isinstance(child, ast.ClassDef) else owner
                found.setdefault(".".join(inner), set()).add(child.lineno)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                found.setdefault(".".join((*scope, child.id)), set()).add(child.lineno)
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                found.setdefault(".".join((*owner, child.attr)), set()).add(child.lineno)
            visit(child, inner, inner_owner)

    visit(ast.parse(path.read_text(encoding="utf-8")), (), ())
    return found


def lines_of(path: Path, dotted: str) -> set[int]:
    """Where `dotted` is defined, be it inside of something else."""
    known = definitions(path).items()
    return set(chain.from_iterable(lines for full, lines in known if f".{full}".endswith(f".{dotted}")))


def complaint(link: Link) -> str | None:
    """What is wrong with a link to a line, and what to write instead."""
    if not re.fullmatch(r"`[\w.]+`", link.text) or not re.fullmatch(r"L\d+", link.fragment):
        return f"{link.where}: write [`Name`](path.py#L1), not [{link.text}](...#{link.fragment})"
    dotted = link.text.strip("`")
    right = sorted(lines_of(link.path, dotted))
    if not right:
        near = difflib.get_close_matches(dotted, definitions(link.path), n=1, cutoff=0.5)
        return f"{link.where}: {name(link.path)} defines no {dotted}" + (f"; is it {near[0]}?" if near else "")
    if int(link.fragment[1:]) in right:
        return None
    return f"{link.where}: `{dotted}` is not at #{link.fragment}: {name(link.path)}#L{' or #L'.join(map(str, right))}"


@over_pages
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    broken = [
        f"{link.where}: {os.path.relpath(link.path, page.parent)}"
        for link in links(page)
        if not (link.path.exists() and link.path.is_relative_to(ROOT))
    ]
    assert not broken, "links to nothing:\n" + "\n".join(broken)


@over_pages
def test_links_into_code_point_at_the_definition(page: Path) -> None:
    wrong = [said for link in code_links(page) if link.path.exists() and (said := complaint(link))]
    assert not wrong, "code has moved; `make links` mends\n" + "\n".join(wrong)


def test_quoted_code_is_in_the_code() -> None:
    known = {line.strip() for path in ROOT.glob("model/*.py") for line in path.read_text(encoding="utf-8").splitlines()}
    for page in DOCS.glob("*.md"):
        quotes = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python"]
        stale = [line for line in "".join(quotes).splitlines() if line.strip() not in known]
        assert not stale, f"{name(page)} quotes lines that no file of model has: {stale}"


@over_pages
def test_formulas_survive_github(page: Path) -> None:
    """Of what GitHub's Markdown takes for its own inside of formulas, or for no formula at all, none is used."""
    text = re.sub(r"`[^`\n]+`", "code", prose(page))
    displayed, rest = DISPLAYED.findall(text), DISPLAYED.sub("", text)
    eaten = re.compile(r"\\[^\w\s]|(?<!\w)_|[*<>`~|]")
    assert [formula for formula in displayed + INLINE.findall(rest) if eaten.search(formula)] == []
    assert all(f"\n\n$${formula}$$\n\n" in text for formula in displayed), "an empty line goes around $$ ... $$"
    glued = re.compile(r"(?:^|.)\$(?!\s)[^$\n]+(?<!\s)\$.?", re.MULTILINE)
    around = [found[0] for found in glued.finditer(rest)]
    assert [part for part in around if not re.fullmatch(r"\s?\$.+\$[^A-Za-z0-9]?", part)] == []
    assert rest.count("$") == 2 * len(around)


@over_translations
def test_translations_have_the_same_sections_links_and_formulas(page: Path) -> None:
    original = page.with_name(page.name[: -len(".??.md")] + ".md")

    def outline(page: Path) -> list[int]:
        return [len(marks) for marks in re.findall(r"^(#+) ", prose(page), re.MULTILINE)]

    def targets(page: Path) -> list[tuple[str, str, str]]:
        return sorted((link.text, name(link.path), link.fragment) for link in code_links(page))

    def formulas(page: Path) -> tuple[list[str], set[str]]:
        text = re.sub(r"`[^`\n]+`", "", prose(page))
        return DISPLAYED.findall(text), set(INLINE.findall(DISPLAYED.sub("", text)))

    assert outline(page) == outline(original)
    assert targets(page) == targets(original)
    assert formulas(page) == formulas(original)
    assert FENCE.findall(page.read_text(encoding="utf-8")) == FENCE.findall(original.read_text(encoding="utf-8"))
    for one, other in ((page, original), (original, page)):
        assert other in [link.path for link in links(one)], f"{name(one)} has no link to {other.name}"


def test_a_wrong_line_is_answered_with_the_right_one(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("SIZE = 1\n\n\nclass Table:\n    def __init__(self) -> None:\n        self.rows = SIZE\n")
    right = {"SIZE": 1, "Table": 4, "Table.__init__": 5, "__init__": 5, "Table.rows": 6}
    for dotted, line in right.items():
        assert lines_of(code, dotted) == {line}
    assert not lines_of(code, "Other.__init__")
    link = next(code_links(DOCS / "gdes.md"))
    moved = complaint(link._replace(fragment="L1000000"))
    assert moved and f"{name(link.path)}#{link.fragment}" in moved


def mend(page: Path) -> None:
    """Write the right line into links whose name is still defined in the same file, the nearest if there are more."""

    def mended(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, fragment = target.partition("#L")
        if not (path.endswith(".py") and fragment.isdigit()):
            return match[0]
        right = lines_of((page.parent / path).resolve(), text.strip("`"))
        line = min(right, key=lambda line: abs(line - int(fragment)), default=int(fragment))
        return f"[{text}]({path}#L{line})"

    page.write_text(LINK.sub(mended, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for each in PAGES:
        mend(each)
