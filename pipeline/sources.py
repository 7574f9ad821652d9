"""Input files as streams of documents: names, compression, and documents of whole files and of byte ranges.

The layout is CC100's: UTF-8, one paragraph a line, blank lines between documents. A document is a maximal run of
non-blank lines, from its first to its last byte that is no blank; its place is the offset of that first byte in the
decompressed file. A blank line holds spaces and tabs alone, and a line ends with LF, CRLF or a lone CR.

Everything streams: memory is a few blocks and one document of at most `MAX_DOCUMENT_BYTES`, and time is linear whatever
the input. What is yielded depends on the file alone, never on how a stream hands out its bytes, so reading a file again
gives the same documents and the same rejects. A fault in a file raises `Rejected` after the documents before it.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

from pipeline.errors import UserError
from pipeline.text import Rejected

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 64 << 20
MAX_BYTES = 1 << 42
MAX_RATIO = 200  # CC100 has 3 to 10
RATIO_FREE_BYTES = 64 << 20  # output that the ratio does not count: small files may hold one sentence a thousand times
MAX_WINDOW_BYTES = 128 << 20  # decoder memory that a file may ask for: what `xz -9` and `zstd --ultra` need at most

_READ_BYTES = 64 << 10  # small, because every member that ends inside one read copies what is left of it
_ZSTD_SLICE_BYTES = 256
_BLANK = b" \t\r\n"

Document = tuple[int, bytes | Rejected]
"""Offset in the decompressed file, and the bytes, or why there are none."""


# ---------------------------------------------------------------------------------------------------------------- names

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


def compression_of(name: str) -> str:
    """The compression by the file name's ending: `xz`, `gz`, `bz2`, `zst`, or `""` for plain text.

    Raises:
        UserError: the ending is not a supported one.
    """
    endings = {".txt": "", **{f".txt.{compression}": compression for compression in _FORMATS}}
    for ending, compression in endings.items():
        if name.endswith(ending):
            return compression
    raise UserError(f"input file {name!r}: its name must end with one of {', '.join(endings)}")


# -------------------------------------------------------------------------------------------------------- decompression


class _Decoder(Protocol):
    """One compressed member (xz stream, gzip member, zstd frame), with bounded output a call as in `bz2` and `lzma`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def needs_input(self) -> bool:
        return not self._inflate.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)


class _ZstdDecoder:
    """The library cannot bound its output, but 4 bytes stand for 128 KiB at most, so a slice of 256 for 8 MiB."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        self._input = memoryview(b"")

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def needs_input(self) -> bool:
        return not self._input

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + bytes(self._input)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._input = memoryview(bytes(self._input) + data)
        parts: list[bytes] = []
        size = 0
        while self._input and size < max_length and not self.eof:
            parts.append(self._frame.decompress(self._input[:_ZSTD_SLICE_BYTES]))
            self._input = self._input[_ZSTD_SLICE_BYTES:]
            size += len(parts[-1])
        return b"".join(parts)


class _Format(NamedTuple):
    magic: re.Pattern[bytes]
    decoder: Callable[[], _Decoder]
    padding: int  # zero bytes may follow a member, in multiples of this; 0: none may


_FORMATS = {
    "xz": _Format(re.compile(rb"\xfd7zXZ\0"), partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, MAX_WINDOW_BYTES), 4),
    "gz": _Format(re.compile(rb"\x1f\x8b\x08"), _GzipDecoder, 1),
    "bz2": _Format(re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor, 0),
    "zst": _Format(re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _ZstdDecoder, 0),  # or a skippable frame
}
_CORRUPTION = (lzma.LZMAError, zlib.error, zstandard.ZstdError, OSError)  # OSError is bz2's


def decompress(
    stream: BinaryIO, compression: str, max_ratio: float = MAX_RATIO, max_bytes: int = MAX_BYTES
) -> Iterator[bytes]:
    """The content of a file in blocks; several members one after the other are one content.

    Blocks have `BLOCK_BYTES` or less, for zstd up to 8 MiB more. What the file gives before a fault is yielded before
    the fault is raised, and always the same; of a corrupt member that may be wrong content, whose checksum comes later.

    Raises:
        Rejected: `not_xz`, `truncated_xz`, `corrupt_xz` (likewise for gz, bz2, zst), `window_too_large` (decoding would
            need more than `MAX_WINDOW_BYTES`), `decompression_bomb` (more than `max_bytes`, or more than `max_ratio`
            times the compressed bytes beyond the first `RATIO_FREE_BYTES`).
    """
    written = 0
    for read, block in _members(stream, compression) if compression else _plain(stream):
        written += len(block)
        if written > min(max_bytes, RATIO_FREE_BYTES + max_ratio * read):
            raise Rejected("decompression_bomb", f"more than {written - len(block)} bytes from the first {read}")
        yield block


def _plain(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(bytes read so far, block)."""
    read = 0
    while block := stream.read(BLOCK_BYTES):
        read += len(block)
        yield read, block


def _members(stream: BinaryIO, compression: str) -> Iterator[tuple[int, bytes]]:
    """(compressed bytes read so far, block of content)."""
    magic, new_decoder, _ = _FORMATS[compression]
    compressed = _Input(stream)
    data = compressed.read()
    if not data:
        raise Rejected(f"truncated_{compression}", "the file is empty")
    if not magic.match(data):
        raise Rejected(f"not_{compression}", f"the content is {_kind(data)}")
    while data:
        decoder = new_decoder()
        while not decoder.eof:
            if decoder.needs_input and not data and not (data := compressed.read()):
                raise Rejected(f"truncated_{compression}", f"it ends after {compressed.size} bytes")
            try:
                block = decoder.decompress(data, BLOCK_BYTES)
            except _CORRUPTION as error:  # the libraries tell a memory limit from corruption in the message alone
                reason = "window_too_large" if "emory" in str(error) else f"corrupt_{compression}"
                raise Rejected(reason, f"{error}, in the first {compressed.size} bytes") from None
            data = b""
            if block:
                yield compressed.size, block
        data = _after_padding(decoder.unused_data, compressed, compression)


def _after_padding(data: bytes, compressed: _Input, compression: str) -> bytes:
    """The beginning of the next member, or nothing at the end of the file."""
    multiple = _FORMATS[compression].padding
    padding = 0
    while data or (data := compressed.read()):
        rest = data.lstrip(b"\0") if multiple else data
        padding += len(data) - len(rest)
        if data := rest:
            break
    if padding and padding % multiple:
        raise Rejected(f"corrupt_{compression}", f"{padding} bytes of padding are no multiple of {multiple}")
    return data


class _Input:
    """Reads of a fixed size, and the number of bytes read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = 0

    def read(self) -> bytes:
        data = _read(self._stream, _READ_BYTES)
        self.size += len(data)
        return data


def _read(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the file alone, however few the stream gives at a time."""
    data = stream.read(size)
    while 0 < len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


# ------------------------------------------------------------------------------------------------------------ documents

# From the end of a document's last line to the first byte of the next document that is no blank, for files without and
# with carriage returns; `\r\n?+` never gives the two halves of one line end away as two.
_LF_GAP = re.compile(rb"\n[ \t\n]*\n[ \t]*")
_GAP = re.compile(rb"(?:\r\n?+|\n)[ \t\r\n]*[\r\n][ \t]*")


class _Gathered:
    """The document under way, whose bytes come from one block or from several."""

    def __init__(self, begin: int) -> None:
        self.begin = self.end = begin
        self._pieces: list[bytes] = []

    @property
    def too_large(self) -> bool:
        return self.end - self.begin > MAX_DOCUMENT_BYTES

    def add(self, piece: bytes, offset: int) -> None:
        if piece:
            self.end = offset + len(piece)
            self._pieces.append(piece)
        if self.too_large:
            self._pieces.clear()

    def document(self) -> Document:
        if self.too_large:
            return self.begin, Rejected("document_too_large", f"more than {MAX_DOCUMENT_BYTES} bytes")
        return self.begin, b"".join(self._pieces)


def split_documents(blocks: Iterable[bytes], start_offset: int = 0, stop: int = sys.maxsize) -> Iterator[Document]:
    """The documents of consecutive blocks, whatever the borders of the blocks.

    A document of more than `MAX_DOCUMENT_BYTES` is yielded as a `Rejected`, and never held.

    Args:
        blocks: the content.
        start_offset: where the first block begins in the decompressed file.
        stop: end after the first document with a byte at or beyond this offset.
    """
    document = _Gathered(start_offset)
    position = start_offset
    blank = b"\n\n"  # white space after the last byte of `document`; a file begins as if after a blank line
    for block in blocks:
        origin = position - len(blank)  # of `text` below
        position += len(block)
        body = block.rstrip(_BLANK)
        if not body:
            blank = _shortened(blank + block)
            continue
        text = blank + body
        blank = _shortened(block[len(body) :])
        done = 0
        for gap in (_GAP if b"\r" in text else _LF_GAP).finditer(text):
            document.add(text[done : gap.start()].rstrip(_BLANK), origin + done)
            if document.end > document.begin:
                yield document.document()
            if document.end > stop:
                return
            done = gap.end()
            document = _Gathered(origin + done)
        document.add(text[done:], origin + done)
        if document.too_large and document.end > stop:
            break
    if document.end > document.begin:
        yield document.document()


def _shortened(blank: bytes) -> bytes:
    """White space that separates what `blank` separates, in little memory."""
    line_ends = blank.replace(b"\r\n", b"\n")
    if line_ends.count(b"\n") + line_ends.count(b"\r") > 1:
        return b"\n\n"
    # A document that goes on after so much white space is too large: only its line ends still matter.
    return re.sub(rb"[ \t]+", b" ", blank) if len(blank) > MAX_DOCUMENT_BYTES else blank


def read_documents(stream: BinaryIO, compression: str) -> Iterator[Document]:
    """The documents of a whole file.

    Raises:
        Rejected: as `decompress`; or the content is no UTF-8 text by its first bytes: `utf16`, `utf32`, `not_text`.
    """
    blocks = decompress(stream, compression)
    head = b""
    for block in blocks:
        head += block
        if len(head) >= _HEAD_BYTES:
            break
    if fault := _foreign(head):
        raise fault
    yield from split_documents(chain([head], blocks))


def read_range(stream: BinaryIO, start: int, stop: int) -> Iterator[Document]:
    """The documents of a plain file's byte range: any ranges that cover a file once give each of its documents once.

    A document belongs to the range that reads it first, when each reads on to the end of the last document it touches.
    So a range skips the first document that has a byte at or beyond `start`, but for `start` 0, and ends with the first
    one that has a byte at or beyond `stop`. It is found from the range's own bytes and at most one document more.

    Raises:
        Rejected: as `read_documents`, and in the range that begins at 0 alone; the other ones are then empty.
    """
    if start >= stop:
        return
    stream.seek(0)
    fault = _foreign(_read(stream, _HEAD_BYTES))
    if fault and start == 0:
        raise fault
    if not fault:
        stream.seek(start)
        yield from islice(split_documents(decompress(stream, ""), start, stop), 1 if start else 0, None)


_HEAD_BYTES = 16
_BYTE_ORDER_MARKS = [
    ("utf32", codecs.BOM_UTF32_LE), ("utf32", codecs.BOM_UTF32_BE),
    ("utf16", codecs.BOM_UTF16_LE), ("utf16", codecs.BOM_UTF16_BE),
]  # fmt: skip


def _foreign(head: bytes) -> Rejected | None:
    """Why a file that begins like this is not UTF-8 text, if that shows."""
    for encoding, mark in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return Rejected(encoding, "the file begins with its byte order mark")
    kind = _kind(head)
    return Rejected("not_text", f"the content is {kind}") if kind in _FORMATS else None


def _kind(head: bytes) -> str:
    return next((name for name, known in _FORMATS.items() if known.magic.match(head)), "of no known kind")
