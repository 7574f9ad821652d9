"""What the tests of the readers share: streams that behave badly, lowered limits, and outcomes in comparable form."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import pytest
import zstandard

from pipeline import decompress, documents
from pipeline.documents import Document
from pipeline.sources import Format, Span, read_span
from pipeline.text import Rejected

Item = TypeVar("Item")
Outcomes = list[tuple[int, bytes | str]]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
_LIMITED = {"MAX_DOCUMENT_BYTES": documents, "BLOCK_BYTES": decompress, "RATIO_FREE_BYTES": decompress}


def comparable(found: Iterable[Document]) -> Outcomes:
    """Documents with their offsets, a reject as its reason."""
    return [(offset, raw.reason if isinstance(raw, Rejected) else raw) for offset, raw in found]


def until_fault(items: Iterator[Item]) -> tuple[list[Item], str | None]:
    """What comes before the fault, and its reason."""
    got: list[Item] = []
    try:
        for item in items:
            got.append(item)
    except Rejected as rejected:
        return got, rejected.reason
    return got, None


class Dribble(io.BytesIO):
    """A stream that gives at most three bytes at a time, as a slow connection may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size, 3) if size and size > 0 else size)


@contextmanager
def limits(**values: int) -> Iterator[None]:
    """Other values of the readers' limits."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(_LIMITED[name], name, value)
        yield


def borders_in(size: int, positions: Iterable[int]) -> list[int]:
    """Any numbers as the borders of a cutting of [0, size)."""
    return [0, *sorted(position % (size + 1) for position in positions), size]


def cut(content: bytes, positions: Iterable[int]) -> list[bytes]:
    return [content[start:stop] for start, stop in pairwise(borders_in(len(content), positions))]


def read_cut(
    file: bytes, format: Format, borders: Sequence[int], text_key: str = "text"
) -> tuple[Outcomes, str | None]:
    """The documents of the spans between borders, one after the other, and the reason of the first fault."""
    found: Outcomes = []
    reasons: list[str] = []
    for start, stop in pairwise(borders):
        got, reason = until_fault(read_span(io.BytesIO(file), format, Span(start, stop), text_key))
        found += comparable(got)
        if reason:
            assert start == 0 and not got
            reasons.append(reason)
    return found, reasons[0] if reasons else None


def with_cap(found: Iterable[tuple[int, bytes]], cap: int) -> Outcomes:
    """Documents as they come out where none may have more than `cap` bytes."""
    return [(offset, raw if len(raw) <= cap else "document_too_large") for offset, raw in found]


def documents_by_definition(content: bytes) -> list[tuple[int, bytes]]:
    """Line after line, as the layout is described."""
    documents: list[tuple[int, bytes]] = []
    open_document = False
    for line in re.finditer(rb"([^\r\n]*)(?:\r\n|\r|\n|\Z)", content):
        text = line[1].strip(b" \t")
        if not text:
            open_document = False
            continue
        begin, end = line.start() + line[1].index(text), line.start() + len(line[1].rstrip(b" \t"))
        if open_document:
            begin = documents.pop()[0]
        documents.append((begin, content[begin:end]))
        open_document = True
    return documents


def json_lines_by_definition(content: bytes, cap: int = sys.maxsize) -> Outcomes:
    """Line after line, as the layout is described."""
    found: Outcomes = []
    for line in re.finditer(rb"[^\n]+", content):
        if len(line[0]) > cap:
            found.append((line.start(), "document_too_large"))
        elif line[0].strip(b" \t\r"):
            found.append((line.start(), line[0].removesuffix(b"\r")))
    return found


_HEADER_BYTES = _FOOTER_BYTES = 12


def _number(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def _crc32(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def xz_stream(blocks: Iterable[bytes], records: Iterable[tuple[int, int]], count: int, flags: bytes) -> bytes:
    index = b"\0" + _number(count) + b"".join(_number(unpadded) + _number(size) for unpadded, size in records)
    index += bytes(-len(index) % 4)
    index += _crc32(index)
    footer = (len(index) // 4 - 1).to_bytes(4, "little") + flags
    header = b"\xfd7zXZ\0" + flags + _crc32(flags)
    return header + b"".join(blocks) + index + _crc32(footer) + footer + b"YZ"


def xz_file(parts: list[bytes], check: int = lzma.CHECK_CRC32) -> bytes:
    """One stream with a block for each part, whose blocks are those of files that the library makes of one part."""
    blocks, records = [], []
    for part in parts:
        one = lzma.compress(part, check=check, preset=0)
        index_bytes = (int.from_bytes(one[-8:-4], "little") + 1) * 4
        blocks.append(one[_HEADER_BYTES : -_FOOTER_BYTES - index_bytes])
        index = one[-_FOOTER_BYTES - index_bytes : -_FOOTER_BYTES]
        unpadded = next(
            n for n in range(len(blocks[-1]) - 3, len(blocks[-1]) + 1) if _number(n) == index[2:][: len(_number(n))]
        )
        records.append((unpadded, len(part)))
    return xz_stream(blocks, records, len(parts), bytes([0, check]))
