"""xz files of many blocks, as `xz -T0` and pixz write them, read from any of their blocks on.

An xz stream ends with an index of its blocks' sizes, so the indexes of a file, parsed backwards from its end, say where
every block begins and which bytes of the content it holds. A block is decoded as a stream of its own, between a header
and an index made for it, so that the decoder checks its sizes and its checksum. A block is given whole or not at all:
no byte of it counts before its checksum does, and so a damaged file reads the same from everywhere.

Cost: three reads a stream for the indexes, which have about 8 bytes a block. Memory: one block, compressed and not, so
a file with blocks of more than `MAX_BLOCK_BYTES` is refused (`xz -9 -T0` makes 192 MiB), as is every size that cannot
be true of the file: nothing is allocated by a number that a file states.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

from pipeline import decompress
from pipeline.documents import Damage
from pipeline.text import Rejected

MAX_BLOCK_BYTES = 256 << 20
MAX_BLOCKS = 1 << 20  # and streams of a file; at the 24 MiB of `xz -T0` these are 25 TB
MAX_INDEX_BYTES = 20 * MAX_BLOCKS

_MAGIC, _END_MAGIC = b"\xfd7zXZ\0", b"YZ"
_HEADER_BYTES = _FOOTER_BYTES = 12
_TAIL_BYTES = 4096  # holds a footer and the padding after it, which is rarely there at all

_Record = tuple[int, int, int, bytes]
"""A block, maybe empty: place in the file, unpadded size, size of its content, flags of its stream."""


@dataclass(frozen=True)
class Block:
    """One block that is not empty: the bytes [start, stop) of the content, and where it lies in the file."""

    start: int
    stop: int
    place: int
    unpadded_bytes: int
    flags: bytes  # of its stream: the kind of checksum


def blocks_of(stream: BinaryIO) -> list[Block]:
    """The blocks of all streams of a file.

    Raises:
        Rejected: `corrupt_xz` (the indexes are no true description of the file, or have absurd numbers),
            `decompression_bomb` (by the limits of `decompress`, looked at between blocks).
    """
    end = stream.seek(0, os.SEEK_END)
    streams: list[list[_Record]] = []
    count = 0
    while end:
        end, records = _last_stream(stream, end)
        streams.append(records)
        count += len(records) + 1
        if count > MAX_BLOCKS:
            raise Rejected("corrupt_xz", f"the file has more than {MAX_BLOCKS} blocks")
    blocks: list[Block] = []
    position = 0
    for place, unpadded, size, flags in chain.from_iterable(reversed(streams)):
        position += size
        allowed = decompress.RATIO_FREE_BYTES + decompress.MAX_RATIO * (place + unpadded)
        if position > min(allowed, decompress.MAX_BYTES):
            raise Rejected("decompression_bomb", f"more than {position - size} bytes from the first {place}")
        if size:
            blocks.append(Block(position - size, position, place, unpadded, flags))
    return blocks


def read_blocks(stream: BinaryIO, blocks: list[Block], start: int) -> Iterator[bytes | Damage]:
    """The content from an offset on, with a `Damage` instead of every block that does not decode to what it should."""
    for block in blocks:
        if block.stop > start:
            try:
                content = _decoded(stream, block)
            except Rejected as fault:
                yield Damage(block.start, block.stop, fault)
                continue
            position = block.start
            for piece in content:
                if position + len(piece) > start:
                    yield piece[max(start - position, 0) :]
                position += len(piece)


def _decoded(stream: BinaryIO, block: Block) -> list[bytes]:
    size = block.stop - block.start
    index = b"\0\1" + _number_bytes(block.unpadded_bytes) + _number_bytes(size)
    index += bytes(-len(index) % 4)
    index += _checksum(index)
    footer = (len(index) // 4 - 1).to_bytes(4, "little") + block.flags
    data = _read_at(stream, block.place, block.place + _padded(block.unpadded_bytes))
    one_block = b"".join((_header(block.flags), data, index, _checksum(footer), footer, _END_MAGIC))
    del data
    try:
        return list(decompress.decompress(io.BytesIO(one_block), "xz", max_ratio=math.inf, max_bytes=size))
    except Rejected as fault:  # what it says of the stream made here is not true of the file
        reason = fault.reason if fault.reason == "window_too_large" else "corrupt_xz"
        raise Rejected(reason, f"the block of {size} bytes at byte {block.place} of the file") from None


# -------------------------------------------------------------------------------------------------------------- indexes


def _last_stream(stream: BinaryIO, end: int) -> tuple[int, list[_Record]]:
    """Where the last stream before `end` begins, and its blocks."""
    tail = _read_at(stream, max(end - _TAIL_BYTES, 0), end)
    padding = len(tail) - len(tail.rstrip(b"\0"))
    end -= padding
    footer = tail[: len(tail) - padding][-_FOOTER_BYTES:]
    flags = footer[8:10]
    if padding % 4 or footer[:4] != _checksum(footer[4:10]) or footer[10:] != _END_MAGIC:
        raise Rejected("corrupt_xz", f"no stream ends before byte {end}")
    index_bytes = (int.from_bytes(footer[4:8], "little") + 1) * 4
    index_place = end - _FOOTER_BYTES - index_bytes
    if index_bytes > MAX_INDEX_BYTES or index_place < _HEADER_BYTES:
        raise Rejected("corrupt_xz", f"an index of {index_bytes} bytes before byte {end}")
    sizes = _index(_read_at(stream, index_place, end - _FOOTER_BYTES))
    place = index_place - sum(_padded(unpadded) for unpadded, _ in sizes)
    header_place = place - _HEADER_BYTES
    if header_place < 0 or _read_at(stream, header_place, place) != _header(flags):
        raise Rejected("corrupt_xz", f"the index before byte {end} does not fit the file")
    records: list[_Record] = []
    for unpadded, size in sizes:
        records.append((place, unpadded, size, flags))
        place += _padded(unpadded)
    return header_place, records


def _index(data: bytes) -> list[tuple[int, int]]:
    """(unpadded size, size of its content) of each block."""
    numbers, checksum = data[:-4], data[-4:]
    if checksum != _checksum(numbers) or numbers[:1] != b"\0":
        raise Rejected("corrupt_xz", "an index with a wrong checksum")
    count, position = _number(numbers, 1)
    sizes: list[tuple[int, int]] = []
    while len(sizes) < count and position < len(numbers):
        unpadded, position = _number(numbers, position)
        size, position = _number(numbers, position)
        if not 0 < unpadded <= MAX_BLOCK_BYTES or size > MAX_BLOCK_BYTES:
            raise Rejected("corrupt_xz", f"a block of {unpadded} bytes for {size} bytes of content")
        sizes.append((unpadded, size))
    if len(sizes) < count or position > len(numbers) or numbers[position:] != bytes(-position % 4):
        raise Rejected("corrupt_xz", f"an index of {len(data)} bytes for {count} blocks")
    return sizes


def _number(data: bytes, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least significant first, and the position after it."""
    value = 0
    for shift in range(0, 63, 7):
        byte = data[position] if position < len(data) else 0
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise Rejected("corrupt_xz", "an index with a number of more than 63 bits")


def _number_bytes(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _header(flags: bytes) -> bytes:
    return _MAGIC + flags + _checksum(flags)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _padded(size: int) -> int:
    return -(-size // 4) * 4


def _read_at(stream: BinaryIO, start: int, stop: int) -> bytes:
    stream.seek(start)
    return decompress.read_fully(stream, stop - start)
