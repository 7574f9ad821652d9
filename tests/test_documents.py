"""Text to documents: the layout of CC100, whatever the borders of blocks and ranges."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from streams import borders_in, comparable, cut, documents_by_definition, limits, read_cut, with_cap

from pipeline.documents import split_documents
from pipeline.sources import Format, Span, read_span, read_whole

TEXT = Format("text", "")
CONTENT = st.lists(
    st.sampled_from(
        [b"a", b"bc d", b" ", b"\t", b"   ", b"\n", b"\n\n", b"\r\n", b"\r", b"\r\n\r\n", b"\x0b", b"\xc2\x85"]
    )
).map(b"".join)


@given(CONTENT, st.integers(0, 1000), st.sampled_from([1, 3, 1000]))
@example(b"a\r\n \r\nb", 0, 1000)
@example(b" \n a\n\tb \n\n", 7, 1000)
def test_split_gives_the_documents_of_the_definition(content: bytes, start: int, cap: int) -> None:
    expected = [(start + offset, raw) for offset, raw in with_cap(documents_by_definition(content), cap)]
    with limits(MAX_DOCUMENT_BYTES=cap):
        assert comparable(split_documents([content], start)) == expected


@given(CONTENT, st.lists(st.integers(0)), st.sampled_from([1, 3, 1000]))
@example(b"a\r\n\r\nb", [2, 3, 4], 1000)
@example(b"a\r       \nb", [2, 3, 4, 5, 6, 7], 3)
@example(b"a      \r\nb", [2, 3, 4, 5, 6, 7, 8], 3)
@example(b"a\r      \nb", [2, 8], 3)
def test_block_borders_do_not_show(content: bytes, positions: list[int], cap: int) -> None:
    expected = with_cap(documents_by_definition(content), cap)
    with limits(MAX_DOCUMENT_BYTES=cap):
        assert comparable(split_documents(cut(content, positions))) == expected
        assert comparable(split_documents(bytes([byte]) for byte in content)) == expected


@given(CONTENT, st.lists(st.integers(0)), st.sampled_from([1, 3, 1000]), st.sampled_from([1, 4, 1000]))
def test_ranges_give_each_document_once(content: bytes, positions: list[int], cap: int, block_bytes: int) -> None:
    expected = with_cap(documents_by_definition(content), cap)
    with limits(MAX_DOCUMENT_BYTES=cap, BLOCK_BYTES=block_bytes):
        assert read_cut(content, TEXT, borders_in(len(content), positions)) == (expected, None)


def test_every_file_of_up_to_six_bytes_cut_anywhere() -> None:
    for content in (bytes(letters) for size in range(7) for letters in product(b"a \r\n", repeat=size)):
        expected = documents_by_definition(content)
        assert list(split_documents([content])) == expected
        for middle in range(len(content) + 1):
            assert list(split_documents([content[:middle], content[middle:]])) == expected
            assert read_cut(content, TEXT, [0, middle, len(content)]) == (expected, None)


def test_a_file_without_blank_lines_is_not_read_by_every_range() -> None:
    content = b"one sentence a line\n" * 1000

    class Counting(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            block = super().read(size)
            self.given += len(block)
            return block

    with limits(MAX_DOCUMENT_BYTES=500, BLOCK_BYTES=100):
        streams = [Counting(content) for _ in range(20)]
        found = [
            comparable(read_span(stream, TEXT, Span(i * 1000, i * 1000 + 1000), "")) for i, stream in enumerate(streams)
        ]
    assert found == [[(0, "document_too_large")], *[[]] * 19]
    assert max(stream.given for stream in streams) < 2000


def test_a_document_too_large_is_never_held() -> None:
    def blocks() -> Iterator[bytes]:
        yield from (b"%d" % (i % 10) * 1_000_000 for i in range(100))
        yield b"\n\nnext\n"
        yield from (b" " * 1_000_000 for _ in range(20))
        yield b"\nlast"

    with limits(MAX_DOCUMENT_BYTES=4_000_000):
        tracemalloc.start()
        found = comparable(split_documents(blocks()))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found == [(0, "document_too_large"), (100_000_002, b"next"), (120_000_008, b"last")]
    assert peak < 12_000_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", [], id="empty file"),
        pytest.param(b"\n", [], id="one newline"),
        pytest.param(b" \t\r\n \n", [], id="only blanks"),
        pytest.param(b"one\n\ntwo", [b"one", b"two"], id="no trailing newline"),
        pytest.param(b"one\r\nmore\r\n\r\ntwo\r\n", [b"one\r\nmore", b"two"], id="CRLF"),
        pytest.param(b"one\rmore\r\rtwo\r", [b"one\rmore", b"two"], id="lone CR"),
        pytest.param(b"one\n \t\n\n\n  two", [b"one", b"two"], id="blank lines with spaces"),
        pytest.param(
            b"\xef\xbb\xbfone\n\ntwo", [b"\xef\xbb\xbfone", b"two"], id="UTF-8 BOM is the text layer's matter"
        ),
        pytest.param(
            "a\u2028\u2028b\x85\x85c\x0c\x0cd".encode(), ["a\u2028\u2028b\x85\x85c\x0c\x0cd".encode()], id="NEL"
        ),
        pytest.param(b"good\n\nb\xffd\n\ngood", [b"good", b"b\xffd", b"good"], id="a bad document ends with itself"),
        pytest.param(b"same\n\nsame", [b"same", b"same"], id="duplicates are the shards' matter"),
        pytest.param(b"x" * 50_000_000 + b"\n\ny", [b"x" * 50_000_000, b"y"], id="a line of 50 MB"),
        pytest.param(b"x" + b"\n" * 1_000_000 + b"y", [b"x", b"y"], id="a million blank lines"),
        pytest.param(b"x" + b"\r\n \t" * 1_000_000 + b"y", [b"x", b"y"], id="a million CRLF blank lines"),
        pytest.param(b"x" + b" " * 10_000_000 + b"\ny", [b"x" + b" " * 10_000_000 + b"\ny"], id="10 MB of spaces"),
    ],
)
def test_documents_of_a_file(content: bytes, expected: list[bytes]) -> None:
    assert [raw for _, raw in read_whole(io.BytesIO(content), TEXT, "")] == expected
    assert [raw for _, raw in read_span(io.BytesIO(content), TEXT, Span(0, len(content)), "")] == expected
