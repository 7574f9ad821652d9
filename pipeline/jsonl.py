"""JSON lines to documents: one JSON object a line, its text under a key.

A line ends with LF or CRLF and nothing else, so U+2028 or a lone CR inside it ends nothing; a line of blanks is no
document. Damages and ranges are as in `documents`. Cost: linear, one `bytes.split` over each block and one step of
Python a line; memory is one block and one line of at most `MAX_DOCUMENT_BYTES`.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator, Sequence

import orjson

from pipeline.documents import Damage, Document, Gathered, bounded
from pipeline.text import Rejected

_BLANK = b" \t\r"


def split_lines(
    content: Iterable[bytes | Damage], start: int = 0, stop: int = sys.maxsize, *, skip_first: bool = False
) -> Iterator[Document]:
    """The lines that are not blank of consecutive blocks, without their ends, whatever the borders of the blocks.

    A line belongs to the range in which it begins, one that begins at a border to the range before: there, whether a
    line begins is known without the bytes before `start`. Arguments as in `documents.split_documents`.
    """
    line = Gathered(start)
    foreign = skip_first  # `line` is another range's, or goes with a damage
    position = start
    for block in content:
        if isinstance(block, Damage):
            if line.too_large and not foreign:
                yield line.document()
            if block.start >= stop:
                return
            if block.start >= start:
                yield block.start, block.fault
            line, foreign = Gathered(block.stop), True
            position = block.stop
        else:
            first, *others = block.split(b"\n")
            line.add(first, position)
            position += len(first)
            if others:
                if not foreign:
                    yield from _document(*line.document())
                position += 1
                foreign = False
                last = others.pop()
                for other in others:
                    if position > stop:
                        return
                    yield from _document(position, bounded(other))
                    position += len(other) + 1
                if position > stop:
                    return
                line = Gathered(position)
                line.add(last, position)
                position += len(last)
        if position >= stop and (foreign or line.too_large):
            break
    if not foreign:
        yield from _document(*line.document())


def _document(begin: int, line: bytes | Rejected) -> Sequence[Document]:
    """What a line is as a document: nothing, if it is blank."""
    if isinstance(line, Rejected):
        return ((begin, line),)
    return ((begin, line.removesuffix(b"\r")),) if line.strip(_BLANK) else ()


def text_of_line(raw: bytes, text_key: str) -> bytes:
    """The UTF-8 of a line's text. A byte order mark, as may begin a file, is skipped.

    Raises:
        Rejected: `invalid_utf8` (escaped lone surrogates included), `invalid_json`, `no_text` (the line is no object,
            or its key is missing or no string).
    """
    try:
        value = orjson.loads(raw.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        reason = "invalid_utf8" if "surrogate" in error.msg else "invalid_json"
        raise Rejected(reason, f"{error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise Rejected("no_text", f"the line is a JSON {type(value).__name__} and no object")
    if text_key not in value:
        raise Rejected("no_text", f"no key {text_key!r}")
    if not isinstance(text := value[text_key], str):
        raise Rejected("no_text", f"the value of {text_key!r} is a {type(text).__name__} and no string")
    return text.encode()
