"""Input files of every kind as streams of documents: names, ranges that can be read apart, and their documents.

A file is `LANGUAGE.anything.ENDING`; its ending says its layout (`text`, `jsonl`, `parquet`, `wet`) and how it is
compressed (`decompress`, `xz`). What can be read from its middle is cut into spans: plain files, xz files of several
blocks, and Parquet. Whichever spans cover a file, they give the same documents, each once, and the same rejects.

Everything streams: memory is a few blocks and one document, time is linear whatever the input. A fault that leaves
nothing more to read raises `Rejected` after the documents before it; one that can be read past comes as a document.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, Literal

from pipeline import documents, jsonl, parquet, wet, xz
from pipeline.decompress import compression_of_content, decompress, read_fully
from pipeline.documents import Damage, Document
from pipeline.errors import UserError
from pipeline.text import Rejected

Layout = Literal["text", "jsonl", "parquet", "wet"]


@dataclass(frozen=True)
class Format:
    """How a file holds its documents, and its compression: `xz`, `gz`, `bz2`, `zst`, or `""` for none."""

    layout: Layout
    compression: str


@dataclass(frozen=True)
class Span:
    """A half-open range of a file: of bytes of its content, or of rows if it is Parquet."""

    start: int
    stop: int


_COMPRESSIONS = ("", "xz", "gz", "bz2", "zst")
_LINE_LAYOUTS: tuple[tuple[str, Layout], ...] = ((".txt", "text"), (".jsonl", "jsonl"))
_FORMATS = {
    **{
        f"{ending}.{compression}".removesuffix("."): Format(layout, compression)
        for ending, layout in _LINE_LAYOUTS
        for compression in _COMPRESSIONS
    },
    ".parquet": Format("parquet", ""),
    ".warc.wet": Format("wet", ""),
    ".warc.wet.gz": Format("wet", "gz"),
}
_SPLIT = {"text": documents.split_documents, "jsonl": jsonl.split_lines}
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8}){0,3}")


def language_of(name: str) -> str:
    """The language of an input file: its bare name up to the first dot, such as `en`, `zh-Hans`, `bn_rom`, `my_zaw`.

    Raises:
        UserError: that is not a language code, or the name holds a folder.
    """
    language = name.partition(".")[0]
    if not _LANGUAGE.fullmatch(language):
        raise UserError(f"input file {name!r}: its name must begin with a language code and a dot, as in en.txt.xz")
    return language


def format_of(name: str) -> Format:
    """The format of an input file by its name's ending.

    Raises:
        UserError: the ending is not a supported one.
    """
    for ending, format in _FORMATS.items():
        if name.endswith(ending):
            return format
    raise UserError(f"input file {name!r}: its name must end with one of {', '.join(_FORMATS)}")


def spans(stream: BinaryIO, size_bytes: int, format: Format, span_bytes: int) -> list[Span] | None:
    """Spans of about `span_bytes` of uncompressed data that cover a file, at least one; None: it has to be read whole.

    A span of an xz file is made of whole blocks, and reading it decodes one block more, in which its last document
    ends. One of Parquet is made of whole row groups; where a single row group is larger than a span it is cut, and
    reading such a span decodes its row group from the beginning. Of a Parquet file that cannot be cut one span is all.
    """
    match format:
        case Format("parquet", _):
            try:
                return [Span(start, stop) for start, stop in parquet.row_ranges(stream, span_bytes)]
            except Rejected:
                return [Span(0, sys.maxsize)]
        case Format("text" | "jsonl", ""):
            starts = range(0, max(size_bytes, 1), span_bytes)
            return [Span(start, min(start + span_bytes, size_bytes)) for start in starts]
        case Format("text" | "jsonl", "xz"):
            return _block_spans(stream, span_bytes)
    return None


def _block_spans(stream: BinaryIO, span_bytes: int) -> list[Span] | None:
    try:
        blocks = xz.blocks_of(stream)
    except Rejected:  # reading the file as one stream finds the same fault, after the documents before it
        return None
    if len(blocks) < 2:
        return None
    cut = [Span(0, 0)]
    for block in blocks:
        if block.stop - cut[-1].start > span_bytes and block.start > cut[-1].start:
            cut.append(Span(block.start, block.stop))
        cut[-1] = Span(cut[-1].start, block.stop)
    return cut


def read_span(stream: BinaryIO, format: Format, span: Span, text_key: str) -> Iterator[Document]:
    """The documents of one span of a file that `spans` can cut.

    An xz block that is damaged is a `Rejected` (`corrupt_xz`, `window_too_large`) at its beginning, in the span where
    that lies; documents that run into or out of it go with it.

    Args:
        stream: the file, able to seek.
        format: its format.
        span: any range of it.
        text_key: the column of the texts, for Parquet.

    Raises:
        Rejected: the file cannot be read at all, and the span begins at 0; other spans are then empty. As `read_whole`.
    """
    if span.start >= span.stop:
        return
    if format.layout == "parquet":
        yield from parquet.read_rows(stream, text_key, span.start, span.stop)
        return
    try:
        content = _content_from(stream, format.compression, span.start)
    except Rejected:
        if span.start == 0:
            raise
        return
    yield from _SPLIT[format.layout](content, span.start, span.stop, skip_first=span.start > 0)


def read_whole(stream: BinaryIO, format: Format, text_key: str) -> Iterator[Document]:
    """The documents of a whole file, read from its beginning to its end.

    Raises:
        Rejected: as `decompress`, `wet.split_records`, `parquet.read_rows`; or the content is no UTF-8 text by its
            first bytes: `utf16`, `utf32`, `not_text`.
    """
    if format.layout == "parquet":
        yield from parquet.read_rows(stream, text_key, 0, sys.maxsize)
        return
    blocks = decompress(stream, format.compression)
    head = _head(blocks)
    _check_text(head)
    content = chain([head], blocks)
    yield from wet.split_records(content) if format.layout == "wet" else _SPLIT[format.layout](content)


def text_of(format: Format, raw: bytes, text_key: str) -> bytes:
    """What a document's bytes, as they are in the file, have to say: UTF-8 to decode and clean.

    Raises:
        Rejected: as `jsonl.text_of_line`.
    """
    return jsonl.text_of_line(raw, text_key) if format.layout == "jsonl" else raw


# -------------------------------------------------------------------------------------------------------------- content

_HEAD_BYTES = 16
_BYTE_ORDER_MARKS = [
    ("utf32", codecs.BOM_UTF32_LE), ("utf32", codecs.BOM_UTF32_BE),
    ("utf16", codecs.BOM_UTF16_LE), ("utf16", codecs.BOM_UTF16_BE),
]  # fmt: skip


def _content_from(stream: BinaryIO, compression: str, start: int) -> Iterable[bytes | Damage]:
    """The content from an offset on, of a file that is no Parquet; its first bytes are looked at in any case."""
    stream.seek(0)
    if not compression:
        _check_text(read_fully(stream, _HEAD_BYTES))
        stream.seek(start)
        return decompress(stream, "")
    blocks = xz.blocks_of(stream)
    _check_text(_first_bytes(stream))
    return xz.read_blocks(stream, blocks, start)


def _first_bytes(stream: BinaryIO) -> bytes:
    """The beginning of an xz file's content; nothing, if that is damaged."""
    stream.seek(0)
    try:
        return _head(decompress(stream, "xz"))
    except Rejected:
        return b""


def _head(blocks: Iterator[bytes]) -> bytes:
    """The first blocks of a content, until they have enough bytes to know it by."""
    head = b""
    while len(head) < _HEAD_BYTES and (block := next(blocks, b"")):
        head += block
    return head


def _check_text(head: bytes) -> None:
    """Raise a `Rejected` if a content that begins like this is not UTF-8 text, and that shows."""
    for encoding, mark in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            raise Rejected(encoding, "the file begins with its byte order mark")
    if compression := compression_of_content(head):
        raise Rejected("not_text", f"the content is {compression}")
