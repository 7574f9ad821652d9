"""JSON lines to documents, whatever the borders of blocks and ranges, and the text of a line."""

from __future__ import annotations

import io
import json
import lzma
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from streams import COMPRESS, borders_in, comparable, cut, json_lines_by_definition, limits, read_cut, until_fault

from pipeline.jsonl import split_lines, text_of_line
from pipeline.sources import Format, Span, format_of, read_span, read_whole, text_of
from pipeline.text import Rejected

JSONL = Format("jsonl", "")
LINE_PARTS = [b"a", b"bcd", b" ", b"\t", b"\n", b"\n\n", b"\r\n", b"\r", b"\xe2\x80\xa8", b"\x0b"]
CONTENT = st.lists(st.sampled_from(LINE_PARTS)).map(b"".join)


@given(CONTENT, st.lists(st.integers(0)), st.sampled_from([1, 3, 1000]), st.sampled_from([1, 4, 1000]))
@example(b"a\r\nb", [2], 1000, 1000)
@example(b"a\nb\n\nc", [1, 2, 3, 4], 1000, 1000)
@example(b"  \n  \r\n", [1], 1, 1)
def test_borders_do_not_show(content: bytes, positions: list[int], cap: int, block_bytes: int) -> None:
    expected = json_lines_by_definition(content, cap)
    with limits(MAX_DOCUMENT_BYTES=cap, BLOCK_BYTES=block_bytes):
        assert comparable(split_lines([content])) == expected
        assert comparable(split_lines(cut(content, positions))) == expected
        assert comparable(split_lines(bytes([byte]) for byte in content)) == expected
        assert read_cut(content, JSONL, borders_in(len(content), positions)) == (expected, None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", [], id="empty file"),
        pytest.param(b"\n", [], id="one newline"),
        pytest.param(b'{"a": 1}', [(0, b'{"a": 1}')], id="no trailing newline"),
        pytest.param(b"{}\r\n\r\n[]\r\n", [(0, b"{}"), (6, b"[]")], id="CRLF"),
        pytest.param(b'{"a":\r1}\n', [(0, b'{"a":\r1}')], id="a lone CR is a blank of JSON"),
        pytest.param('"\u2028\x85\x0c"'.encode(), [(0, '"\u2028\x85\x0c"'.encode())], id="U+2028, NEL and FF"),
        pytest.param(b'{}\n{"a\n{}', [(0, b"{}"), (3, b'{"a'), (7, b"{}")], id="a cut object"),
    ],
)
def test_lines_of_a_file(content: bytes, expected: list[tuple[int, bytes]]) -> None:
    assert list(read_whole(io.BytesIO(content), JSONL, "text")) == expected
    assert list(read_span(io.BytesIO(content), JSONL, Span(0, len(content)), "text")) == expected


def test_a_million_blank_lines_are_nothing_quickly() -> None:
    began = time.process_time()
    assert list(read_whole(io.BytesIO(b"\n" * 1_000_000 + b" \r\n" * 10 + b"{}"), JSONL, "text")) == [
        (1_000_030, b"{}")
    ]
    assert time.process_time() - began < 5


def test_a_line_too_large_is_never_held() -> None:
    def blocks() -> Iterator[bytes]:
        yield from (b"%d" % (i % 10) * 1_000_000 for i in range(100))
        yield b"\n{}\n"

    with limits(MAX_DOCUMENT_BYTES=4_000_000):
        tracemalloc.start()
        found = comparable(split_lines(blocks()))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found == [(0, "document_too_large"), (100_000_001, b"{}")]
    assert peak < 12_000_000


@pytest.mark.parametrize("compression", COMPRESS)
def test_every_truncation_gives_the_lines_before_it(compression: str) -> None:
    content = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(20))
    file = COMPRESS[compression](content)
    expected = json_lines_by_definition(content)
    for length in range(len(file)):
        found, reason = until_fault(read_whole(io.BytesIO(file[:length]), Format("jsonl", compression), "text"))
        assert reason in {f"truncated_{compression}", f"not_{compression}"}
        assert found[:-1] == expected[: len(found[:-1])]


# ---------------------------------------------------------------------------------------------------------- their text


@given(st.text(), st.text(min_size=1), st.booleans())
def test_the_text_of_a_line_is_what_was_written(text: str, key: str, ascii_only: bool) -> None:
    line = json.dumps({"other": [1, None], key: text}, ensure_ascii=ascii_only).encode()
    assert text_of_line(line, key) == text.encode()
    assert text_of_line(b"\xef\xbb\xbf " + line + b" \r", key) == text.encode()


@pytest.mark.parametrize(
    ("raw", "reason", "detail"),
    [
        (b'{"text": "a"', "invalid_json", "character"),
        (b"plain text", "invalid_json", "character"),
        (b'{"text": "a"} {"text": "b"}', "invalid_json", "character"),
        (b'{"text": "a\x00"}', "invalid_json", "control character"),
        (b"[" * 100_000, "invalid_json", "depth"),
        (b'{"text": "\xff"}', "invalid_utf8", "UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "invalid_utf8", "UTF-8"),
        (b'{"text": "\\ud800"}', "invalid_utf8", "surrogate"),
        (b'{"text": "\\udc00 \\ud800"}', "invalid_utf8", "surrogate"),
        (b'{"txt": "a"}', "no_text", "no key 'text'"),
        (b'{"text": null}', "no_text", "NoneType"),
        (b'{"text": ["a"]}', "no_text", "list"),
        (b'["text"]', "no_text", "list and no object"),
        (b"7", "no_text", "int and no object"),
    ],
)
def test_a_line_without_text_says_why(raw: bytes, reason: str, detail: str) -> None:
    with pytest.raises(Rejected) as rejected:
        text_of_line(raw, "text")
    assert rejected.value.reason == reason and detail in rejected.value.detail


def test_a_real_file_has_the_lines_it_is_listed_with(shared_data: Path) -> None:
    path = shared_data / "messy" / "tesseract-langdata.jsonl.xz"
    listed = json.loads(path.with_name("tesseract-langdata.lines.json").read_text())
    with path.open("rb") as stream:
        raws = list(read_whole(stream, format_of("mul.tesseract.jsonl.xz"), "text"))
    content = lzma.decompress(path.read_bytes())
    assert raws == json_lines_by_definition(content)
    assert Counter(text_of(JSONL, raw, "lang_dir").decode() for _, raw in raws if isinstance(raw, bytes)) == listed
    texts = [text_of(JSONL, raw, "text").decode() for _, raw in raws if isinstance(raw, bytes)]
    assert texts == [json.loads(line)["text"] for line in content.decode().split("\n") if line]
    assert read_cut(content, JSONL, [*range(0, len(content), 1_234_567), len(content)]) == (raws, None)
