"""WET files of Common Crawl to documents: the payload of each `conversion` record.

A record is a version line, header fields, an empty line, as many bytes of payload as its Content-Length says, and line
ends. Lines may end with CRLF, as the standard has it, or with LF. A file gives its documents up to its first fault:
after a false length no later byte can be trusted to begin a record. Cost: linear; memory is a few blocks and one
payload of at most `MAX_DOCUMENT_BYTES`, gathered from what the file has and never by what its header says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pipeline.documents import Document, Gathered
from pipeline.text import Rejected

MAX_HEADER_BYTES = 64 << 10

_LINE_ENDS = re.compile(rb"[\r\n]*")
_VERSION = re.compile(rb"WARC/1\.\d\r?\n")
_HEADER_END = re.compile(rb"\n\r?\n")
_LENGTH = re.compile(rb"\d{1,18}")


def split_records(content: Iterable[bytes]) -> Iterator[Document]:
    """The payloads of the conversion records of consecutive blocks, with the offsets where they begin.

    Raises:
        Rejected: `corrupt_wet` (something else than a record, or a record without one proper length and one type),
            `truncated_wet`.
    """
    source = _Content(content)
    while source.skip_line_ends():
        kind, length = _kind_and_length(source.take_header(), source.position)
        document = Gathered(source.position)
        for piece in source.take(length):
            if kind == b"conversion":
                document.add(piece, source.position - len(piece))
        if not source.is_at_line_end():
            raise Rejected("corrupt_wet", f"a record goes on at byte {source.position}, beyond its Content-Length")
        if kind == b"conversion":
            yield document.document()


def _kind_and_length(header: bytes, position: int) -> tuple[bytes, int]:
    fields: dict[bytes, list[bytes]] = {}
    for line in header.splitlines():
        name, _, value = line.partition(b":")
        fields.setdefault(name.lower(), []).append(value.strip())
    match fields.get(b"warc-type"), fields.get(b"content-length"):
        case [kind], [length] if _LENGTH.fullmatch(length):
            return kind, int(length)
    raise Rejected("corrupt_wet", f"the header before byte {position} has no single WARC-Type and Content-Length")


class _Content:
    """Blocks as one run of bytes to take from, without a copy of what is not taken."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = filter(None, blocks)
        self._data = b""
        self._taken = 0  # of `_data`
        self.position = 0

    def skip_line_ends(self) -> bool:
        """Go to the next record; False at the end of the content."""
        while True:
            line_ends = _LINE_ENDS.match(self._data, self._taken)
            self._advance(line_ends.end() if line_ends else self._taken)
            if self._taken < len(self._data):
                return True
            if not self._read():
                return False

    def is_at_line_end(self) -> bool:
        """Whether a line end comes next, or nothing."""
        return (self._taken == len(self._data) and not self._read()) or self._data[self._taken] in b"\r\n"

    def take_header(self) -> bytes:
        """The header of the record that begins here, and with it the empty line."""
        while not (end := _HEADER_END.search(self._data, self._taken, self._taken + MAX_HEADER_BYTES)):
            if len(self._data) - self._taken >= MAX_HEADER_BYTES:
                break
            if not self._read():
                begins_well = b"WARC/1.".startswith(self._data[self._taken : self._taken + 7])
                reason = "truncated_wet" if begins_well else "corrupt_wet"
                raise Rejected(reason, f"it ends in what should be a header, at byte {self.position}")
        if not end or not _VERSION.match(self._data, self._taken):
            raise Rejected("corrupt_wet", f"no header of a record is at byte {self.position}")
        header = self._data[self._taken : end.start()]
        self._advance(end.end())
        return header

    def take(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces."""
        while size:
            piece = self._data[self._taken : self._taken + size]
            if piece:
                size -= len(piece)
                self._advance(self._taken + len(piece))
                yield piece
            elif not self._read():
                raise Rejected("truncated_wet", f"it ends at byte {self.position}, {size} bytes before its record")

    def _advance(self, taken: int) -> None:
        self.position += taken - self._taken
        self._taken = taken

    def _read(self) -> bool:
        block = next(self._blocks, b"")
        self._data = self._data[self._taken :] + block
        self._taken = 0
        return bool(block)
