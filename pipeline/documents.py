"""Content to documents: the layout of CC100, and what every layout says about a document.

A text file is UTF-8, one paragraph a line, blank lines between documents. A document is a maximal run of non-blank
lines, from its first to its last byte that is no blank; its place is the offset of that first byte in the content. A
blank line holds spaces and tabs alone, and a line ends with LF, CRLF or a lone CR.

Content comes as blocks in order, and instead of a block that cannot be read comes a `Damage`. A document that runs into
or out of a damage goes with it; reading begins again with the first document that is whole. Any ranges that cover a
content once give each of its documents and damages once, wherever they cut it. Cost: linear, one regular expression
over each block; memory is a few blocks and one document of at most `MAX_DOCUMENT_BYTES`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.text import Rejected

MAX_DOCUMENT_BYTES = 64 << 20

Document = tuple[int, bytes | Rejected]
"""Offset in the content, and the bytes, or why there are none."""


@dataclass(frozen=True)
class Damage:
    """The bytes [start, stop) of a content, at least one, that cannot be read."""

    start: int
    stop: int
    fault: Rejected


class Gathered:
    """The document under way, whose bytes come from one block or from several; too large a one is never held."""

    def __init__(self, begin: int) -> None:
        self.begin = self.end = begin
        self._pieces: list[bytes] = []

    @property
    def too_large(self) -> bool:
        """Whether it has more than `MAX_DOCUMENT_BYTES`."""
        return self.end - self.begin > MAX_DOCUMENT_BYTES

    def add(self, piece: bytes, offset: int) -> None:
        """Append what the content has at an offset; between this piece and the last one may lie nothing else."""
        if piece:
            self.end = offset + len(piece)
            self._pieces.append(piece)
        if self.too_large:
            self._pieces.clear()

    def document(self) -> Document:
        """The document, or a `Rejected` in its place (`document_too_large`)."""
        return (self.begin, _too_large()) if self.too_large else (self.begin, b"".join(self._pieces))


def bounded(raw: bytes) -> bytes | Rejected:
    """A document as it is, or a `Rejected` in its place (`document_too_large`)."""
    return _too_large() if len(raw) > MAX_DOCUMENT_BYTES else raw


def _too_large() -> Rejected:
    return Rejected("document_too_large", f"more than {MAX_DOCUMENT_BYTES} bytes")


_BLANK = b" \t\r\n"
_BLANK_LINE = b"\n\n"
# From the end of a document's last line to the first byte of the next document that is no blank, for files without and
# with carriage returns; `\r\n?+` never gives the two halves of one line end away as two.
_LF_GAP = re.compile(rb"\n[ \t\n]*\n[ \t]*")
_GAP = re.compile(rb"(?:\r\n?+|\n)[ \t\r\n]*[\r\n][ \t]*")


def split_documents(
    content: Iterable[bytes | Damage], start: int = 0, stop: int = sys.maxsize, *, skip_first: bool = False
) -> Iterator[Document]:
    """The documents of consecutive blocks, whatever the borders of the blocks.

    A range that begins inside a file skips its first document, as the range before reads on to the end of the last
    document that it touches. So a range is found from its own bytes and at most one document more.

    Args:
        content: the content from `start` on; it may go on beyond `stop`.
        start: where the first block begins in the file.
        stop: end after the first document with a byte at or beyond this offset, and before a damage that begins there.
        skip_first: leave out the first document with a byte at or beyond `start`, and a damage that begins before.
    """
    document = Gathered(start)
    foreign = skip_first  # `document` is another range's, or goes with a damage
    position = start
    blank = _BLANK_LINE  # white space after the last byte of `document`; a file begins as if after a blank line
    for block in content:
        if isinstance(block, Damage):
            if not foreign and (document.too_large or (blank == _BLANK_LINE and document.end > document.begin)):
                yield document.document()
            if block.start >= stop:
                return
            if block.start >= start:
                yield block.start, block.fault
            document, foreign = Gathered(block.start), True
            document.end = position = block.stop
            blank = b""
        elif not (body := block.rstrip(_BLANK)):
            position += len(block)
            blank = _shortened(blank + block)
            continue
        else:
            origin = position - len(blank)  # of `text`
            position += len(block)
            text = blank + body
            blank = _shortened(block[len(body) :])
            done = 0
            for gap in (_GAP if b"\r" in text else _LF_GAP).finditer(text):
                document.add(text[done : gap.start()].rstrip(_BLANK), origin + done)
                if document.end > document.begin:
                    if not foreign:
                        yield document.document()
                    foreign = False
                if document.end > stop:
                    return
                done = gap.end()
                document = Gathered(origin + done)
            document.add(text[done:], origin + done)
        if document.end > stop and (foreign or document.too_large):
            break
    if document.end > document.begin and not foreign:
        yield document.document()


def _shortened(blank: bytes) -> bytes:
    """White space that separates what `blank` separates, in little memory: `_BLANK_LINE` if it holds one."""
    line_ends = blank.replace(b"\r\n", b"\n")
    if line_ends.count(b"\n") + line_ends.count(b"\r") > 1:
        return _BLANK_LINE
    # A document that goes on after so much white space is too large: only its line ends still matter.
    return re.sub(rb"[ \t]+", b" ", blank) if len(blank) > MAX_DOCUMENT_BYTES else blank
