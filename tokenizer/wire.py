"""Reads and changes serialised SentencePiece models as protocol buffers, field by field.

The generated classes that come with SentencePiece demand a protobuf runtime as new as themselves, and writing a model
anew would not keep what they do not know. The wire format is simple enough to be read directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True)
class WireField:
    """A field of a message: its number, its value (an integer, or the bytes of anything else) and where it lies."""

    number: int
    value: int | bytes
    start: int
    stop: int


def fields(message: bytes) -> Iterator[WireField]:
    """The fields of a message in order.

    Raises:
        ValueError: these bytes are no protocol buffer message.
    """
    place = 0
    while place < len(message):
        start = place
        tag, place = varint(message, place)
        kind, value = tag & 7, 0
        if kind == _VARINT:
            value, place = varint(message, place)
            yield WireField(tag >> 3, value, start, place)
            continue
        if kind == _BYTES:
            size, place = varint(message, place)
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            raise ValueError(f"a field of unknown kind {kind} at byte {start}")
        if place + size > len(message):
            raise ValueError(f"the field at byte {start} ends beyond the message")
        yield WireField(tag >> 3, message[place : place + size], start, place + size)
        place += size


def replaced(message: bytes, values: Mapping[int, int | bytes | None]) -> bytes:
    """A message with some fields set to a value, or removed where that is None; the others stay as they are."""
    kept = [message[field.start : field.stop] for field in fields(message) if field.number not in values]
    added = [encoded_field(number, value) for number, value in sorted(values.items()) if value is not None]
    return b"".join([*kept, *added])


def submessage(message: bytes, number: int) -> bytes:
    """The bytes of a field; empty where the message has none of this number."""
    found = b""
    for field in fields(message):
        if field.number == number and isinstance(field.value, bytes):
            found = field.value
    return found


def integer(message: bytes, number: int, default: int) -> int:
    """The integer in a field, or what holds where the message has none of this number."""
    found = default
    for field in fields(message):
        if field.number == number and isinstance(field.value, int):
            found = field.value
    return found


def encoded_field(number: int, value: int | bytes) -> bytes:
    """A field as it stands in a message."""
    if isinstance(value, int):
        return _encoded(number << 3 | _VARINT) + _encoded(value)
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    """A number, seven bits a byte with the lowest first."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def varint(data: bytes | bytearray, place: int) -> tuple[int, int]:
    """The number that begins at `place` and the place after it."""
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError(f"a number without end at byte {place}")
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
