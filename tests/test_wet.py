"""WET files to documents: records of both writers, truncations, and headers that lie."""

from __future__ import annotations

import gzip
import io
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import Dribble, comparable, cut, limits, until_fault

from pipeline.sources import Format, format_of, read_whole
from pipeline.wet import split_records

PLAIN, GZIPPED = Format("wet", ""), Format("wet", "gz")


def record(kind: bytes, payload: bytes, line_end: bytes = b"\r\n", length: bytes | None = None) -> bytes:
    length = b"%d" % len(payload) if length is None else length
    fields = [b"WARC/1.0", b"WARC-Type: " + kind, b"WARC-Target-URI: http://example.org/", b"Content-Length: " + length]
    return line_end.join([*fields, b"", payload + line_end * 2])


RECORDS = st.lists(
    st.tuples(
        st.sampled_from([b"conversion", b"warcinfo", b"metadata"]),
        st.one_of(st.binary(max_size=60), st.sampled_from([b"WARC/1.0\r\n", b"\n\n\n", b"\r\n", b"a\n\nWARC/1.0\nb"])),
        st.sampled_from([b"\r\n", b"\n"]),
    )
)


@given(RECORDS, st.lists(st.integers(0)), st.sampled_from([5, 1000]))
def test_each_conversion_record_is_a_document(
    records: list[tuple[bytes, bytes, bytes]], positions: list[int], cap: int
) -> None:
    content, expected = b"", []
    for kind, payload, line_end in records:
        content += record(kind, payload, line_end)
        if kind == b"conversion":
            offset = len(content) - len(payload) - 2 * len(line_end)
            expected.append((offset, payload if len(payload) <= cap else "document_too_large"))
    members = b"".join(gzip.compress(record(*each)) for each in records)
    with limits(MAX_DOCUMENT_BYTES=cap):
        assert comparable(split_records(cut(content, positions))) == expected
        assert comparable(read_whole(io.BytesIO(content), PLAIN, "")) == expected
        if records:
            assert comparable(read_whole(Dribble(members), GZIPPED, "")) == expected


FILE = record(b"warcinfo", b"about") + record(b"conversion", b"first\n\npage") + record(b"conversion", b"second")


def test_every_truncation_gives_the_documents_before_it() -> None:
    whole = list(read_whole(io.BytesIO(FILE), PLAIN, ""))
    complete = 0
    for length in range(len(FILE)):
        found, reason = until_fault(read_whole(io.BytesIO(FILE[:length]), PLAIN, ""))
        assert found == whole[: len(found)] and reason in {None, "truncated_wet"}
        complete += reason is None
    assert complete == 1 + 5 + 5 + 4  # the empty file, and each place among the line ends after a record


def test_every_truncation_of_a_compressed_file_is_a_reject() -> None:
    file = b"".join(map(gzip.compress, re.split(rb"(?=WARC/1.0)", FILE)[1:]))
    whole = list(read_whole(io.BytesIO(file), GZIPPED, ""))
    assert [raw for _, raw in whole] == [b"first\n\npage", b"second"]
    for length in range(len(file)):
        found, reason = until_fault(read_whole(io.BytesIO(file[:length]), GZIPPED, ""))
        assert found == whole[: len(found)] and reason in {None, "truncated_gz", "not_gz"}


def test_every_flipped_bit_ends_in_documents_or_a_reject() -> None:
    for position in range(len(FILE)):
        for bit in range(8):
            flipped = FILE[:position] + bytes([FILE[position] ^ 1 << bit]) + FILE[position + 1 :]
            _, reason = until_fault(read_whole(io.BytesIO(flipped), PLAIN, ""))
            assert reason in {None, "corrupt_wet", "truncated_wet"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (record(b"conversion", b"page", length=b"-4"), "corrupt_wet"),
        (record(b"conversion", b"page", length=b"+4"), "corrupt_wet"),
        (record(b"conversion", b"page", length=b"four"), "corrupt_wet"),
        (record(b"conversion", b"page", length=b""), "corrupt_wet"),
        (record(b"conversion", b"page", length=b"9" * 5000), "corrupt_wet"),
        (record(b"conversion", b"page", length=b"4\r\nContent-Length: 5"), "corrupt_wet"),
        (record(b"conversion\r\nWARC-Type: response", b"page"), "corrupt_wet"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\npage\r\n\r\n", "corrupt_wet"),
        (b"WARC/1.0\r\nContent-Length: 4\r\n\r\npage\r\n\r\n", "corrupt_wet"),
        (b"WARC/2.0\r\nContent-Length: 4\r\n\r\npage\r\n\r\n", "corrupt_wet"),
        (b"garbage between records\r\n\r\n" + FILE, "corrupt_wet"),
        (b"no record at all", "corrupt_wet"),
        (record(b"conversion", b"a page longer than it says", length=b"6"), "corrupt_wet"),
        (b"\0" * 200_000 + FILE, "corrupt_wet"),
        (b"WARC/1.0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", "corrupt_wet"),
        (record(b"conversion", b"page", length=b"1000000000000000"), "truncated_wet"),
        (record(b"warcinfo", b"page", length=b"1000000000000000"), "truncated_wet"),
        (b"WARC/1.0\r\nWARC-Ty", "truncated_wet"),
    ],
)
def test_a_false_record_ends_the_file_after_the_documents_before_it(fault: bytes, reason: str) -> None:
    tracemalloc.start()
    found, found_reason = until_fault(read_whole(io.BytesIO(FILE + fault), PLAIN, ""))
    assert ([raw for _, raw in found], found_reason) == ([b"first\n\npage", b"second"], reason)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_payload_too_large_is_never_held_and_read_past() -> None:
    def blocks() -> Iterator[bytes]:
        yield record(b"conversion", b"", length=b"100000000").rstrip() + b"\r\n\r\n"
        yield from (bytes(1_000_000) for _ in range(100))
        yield b"\r\n\r\n" + record(b"conversion", b"next")

    with limits(MAX_DOCUMENT_BYTES=4_000_000):
        tracemalloc.start()
        assert [raw for _, raw in comparable(split_records(blocks()))] == ["document_too_large", b"next"]
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
        tracemalloc.stop()


def test_a_file_of_nothing_but_line_ends_has_no_documents() -> None:
    for content in (b"", b"\n", b"\r\n" * 1_000_000):
        assert list(read_whole(io.BytesIO(content), PLAIN, "")) == []


@pytest.mark.parametrize("name", ["whirlwind-whirlwind.warc.wet", "whirlwind-whirlwind.warc.wet.gz"])
def test_a_real_file_has_its_conversion_record(shared_data: Path, name: str) -> None:
    data = (shared_data / "messy" / name).read_bytes()
    content = gzip.decompress(data) if name.endswith(".gz") else data
    [(offset, raw)] = read_whole(io.BytesIO(data), format_of(f"an.{name}"), "")
    assert content.count(b"WARC-Type: conversion") == 1 and isinstance(raw, bytes)
    assert raw.startswith(b"Escopete - Biquipedia") and len(raw) == 4456
    assert content[offset:] == raw + b"\r\n\r\n"


def test_a_real_file_with_false_lengths_is_a_reject_and_readable_once_they_are_true(shared_data: Path) -> None:
    """Whoever made this file counted letters instead of bytes."""
    content = (shared_data / "messy" / "cc_net-sample.warc.wet").read_bytes()
    assert until_fault(read_whole(io.BytesIO(content), PLAIN, "")) == ([], "corrupt_wet")
    payloads = [part.partition(b"\n\n")[2].rstrip() for part in content.split(b"WARC/1.0\n")[1:]]
    repaired = record(b"warcinfo", payloads[0]) + b"".join(record(b"conversion", payload) for payload in payloads[1:])
    assert [raw for _, raw in read_whole(io.BytesIO(repaired), PLAIN, "")] == payloads[1:] and len(payloads) == 4
