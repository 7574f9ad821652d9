"""Compressed files as streams of bounded blocks, with every fault of a file as a `Rejected`.

The four methods share one loop over the members of a file (xz streams, gzip members, bzip2 streams, zstd frames), each
decoded with bounded output a call. Time is linear, memory a few blocks and the decoder's window; a file that asks for
more than `MAX_WINDOW_BYTES` of window, or that swells beyond `MAX_RATIO`, is refused. What is yielded depends on the
file alone, never on how a stream hands out its bytes, so reading a file again gives the same blocks and the same fault.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

from pipeline.text import Rejected

BLOCK_BYTES = 1 << 20
MAX_BYTES = 1 << 42
MAX_RATIO = 200  # CC100 has 3 to 10
RATIO_FREE_BYTES = 64 << 20  # output that the ratio does not count: small files may hold one sentence a thousand times
MAX_WINDOW_BYTES = 128 << 20  # decoder memory that a file may ask for: what `xz -9` and `zstd --ultra` need at most

_READ_BYTES = 64 << 10  # small, because every member that ends inside one read copies what is left of it
_ZSTD_SLICE_BYTES = 256


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


class _Method(NamedTuple):
    magic: re.Pattern[bytes]
    decoder: Callable[[], _Decoder]
    padding: int  # zero bytes may follow a member, in multiples of this; 0: none may


_METHODS = {
    "xz": _Method(re.compile(rb"\xfd7zXZ\0"), partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, MAX_WINDOW_BYTES), 4),
    "gz": _Method(re.compile(rb"\x1f\x8b\x08"), _GzipDecoder, 1),
    "bz2": _Method(re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor, 0),
    "zst": _Method(re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _ZstdDecoder, 0),  # or a skippable frame
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
    magic, new_decoder, _ = _METHODS[compression]
    compressed = _Input(stream)
    data = compressed.read()
    if not data:
        raise Rejected(f"truncated_{compression}", "the file is empty")
    if not magic.match(data):
        raise Rejected(f"not_{compression}", f"the content is {compression_of_content(data) or 'of no known kind'}")
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
    multiple = _METHODS[compression].padding
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
        data = read_fully(self._stream, _READ_BYTES)
        self.size += len(data)
        return data


def read_fully(stream: BinaryIO, size: int) -> bytes:
    """The next `size` bytes, or fewer at the end of the file alone, however few the stream gives at a time."""
    pieces: list[bytes] = []
    while size and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def compression_of_content(head: bytes) -> str | None:
    """The compression of a file that begins like this (`xz`, `gz`, `bz2` or `zst`), or None."""
    return next((name for name, method in _METHODS.items() if method.magic.match(head)), None)
