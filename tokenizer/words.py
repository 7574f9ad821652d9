"""Where words begin among pieces: at the mark of a space, and at every piece of a script without spaces."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.text import UNSPACED_RANGES

SPACE_MARK = "▁"

UNSPACED = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSPACED_RANGES) + "]")


def begins_word(pieces: Iterable[str]) -> list[bool]:
    """For each piece, whether a word begins with it; the first piece after a special token does so in any case."""
    return [piece.startswith(SPACE_MARK) or bool(UNSPACED.match(piece)) for piece in pieces]
