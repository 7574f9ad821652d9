"""Contents of which some blocks cannot be read: the same documents and damages however the content is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from streams import Outcomes, borders_in, comparable, documents_by_definition, json_lines_by_definition, limits

from pipeline.documents import Damage, split_documents
from pipeline.jsonl import split_lines
from pipeline.text import Rejected

Block = tuple[bytes, bool]
"""What a block holds, and whether it can be read."""

SPLIT: dict[str, Callable[..., Iterator[tuple[int, bytes | Rejected]]]] = {
    "text": split_documents,
    "jsonl": split_lines,
}
every_layout = pytest.mark.parametrize("layout", SPLIT)
BLOCKS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\n\n", b"\r", b"\r\n"]), min_size=1).map(b"".join),
        st.sampled_from([True, True, False]),
    )
)


def content_from(blocks: Sequence[Block], start: int) -> Iterator[bytes | Damage]:
    position = 0
    for data, good in blocks:
        stop = position + len(data)
        if stop > start:
            yield data[max(start - position, 0) :] if good else Damage(position, stop, Rejected("damage"))
        position = stop


def by_definition(layout: str, blocks: Sequence[Block], cap: int) -> Outcomes:
    """As if damaged bytes were letters: what they make a document with goes with them, but where it is too large."""
    content = b"".join(data if good else b"\0" * len(data) for data, good in blocks)
    found: Outcomes = []
    for offset, raw in documents_by_definition(content) if layout == "text" else json_lines_by_definition(content):
        assert isinstance(raw, bytes)
        readable = raw.partition(b"\0")[0].rstrip(b" \t\r\n") if layout == "text" else raw.partition(b"\0")[0]
        if len(readable) > cap:
            found.append((offset, "document_too_large"))
        elif b"\0" not in raw:
            found.append((offset, raw))
    borders = borders_in(len(content), [len(b"".join(data for data, _ in blocks[:n])) for n in range(1, len(blocks))])
    damages = [(start, "damage") for start, (_, good) in zip(borders, blocks, strict=False) if not good]
    return sorted([*found, *damages], key=lambda outcome: outcome[0])


def read_in_ranges(layout: str, blocks: Sequence[Block], borders: Sequence[int]) -> Outcomes:
    found: Outcomes = []
    for start, stop in pairwise(borders):
        if start < stop:
            content = content_from(blocks, start)
            found += comparable(SPLIT[layout](content, start, stop, skip_first=start > 0))
    return found


@every_layout
@given(BLOCKS, st.lists(st.integers(0)), st.sampled_from([1, 3, 1000]))
@example([(b"a\n\n", True), (b"x", False), (b"\n\nb", True)], [3, 4], 1000)
@example([(b"abcdefg", True), (b"x", False), (b"\n", True)], [2], 3)
@example([(b"abc", True), (b"de", True), (b"x", False), (b"y", False), (b"\nb\n", True)], [2, 6], 3)
def test_ranges_show_neither_borders_nor_damages(
    layout: str, blocks: list[Block], positions: list[int], cap: int
) -> None:
    size = sum(len(data) for data, _ in blocks)
    with limits(MAX_DOCUMENT_BYTES=cap):
        whole = comparable(SPLIT[layout](content_from(blocks, 0)))
        if layout == "text" or cap == 1000:
            assert whole == by_definition(layout, blocks, cap)
        assert read_in_ranges(layout, blocks, borders_in(size, positions)) == whole


@every_layout
def test_every_small_content_with_one_damage_cut_anywhere(layout: str) -> None:
    for before, after in product((bytes(letters) for letters in product(b"a \r\n", repeat=3)), repeat=2):
        blocks = [(before, True), (b"xyz", False), (after, True)]
        expected = by_definition(layout, blocks, 1000)
        for middle in range(10):
            assert read_in_ranges(layout, blocks, [0, middle, 9]) == expected


@every_layout
def test_a_range_needs_nothing_beyond_the_document_at_its_end(layout: str) -> None:
    def content() -> Iterator[bytes | Damage]:
        yield b"one\n\n"
        yield Damage(5, 10, Rejected("damage"))
        pytest.fail("read on beyond the range")

    assert comparable(SPLIT[layout](content(), 0, 7)) == [(0, b"one"), (5, "damage")]
    assert comparable(SPLIT[layout](content(), 0, 5)) == [(0, b"one")]
    assert comparable(split_lines(content(), 0, 10)) == [(0, b"one"), (5, "damage")]
