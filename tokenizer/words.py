"""Where words begin among pieces: at the mark of a space, and at every piece of a script without spaces."""

from __future__ import annotations

import re
from collections.abc import Iterable

SPACE_MARK = "▁"

# Thai and Lao, Tibetan, Burmese, Khmer, New Tai Lue and Tai Tham, Balinese, kana, Han and its extensions, Yi, Javanese.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\u3040-\u30ff\u3400-\u9fff"
    "\ua000-\ua4cf\ua980-\ua9df\uf900-\ufaff\U00020000-\U0003ffff]"
)


def begins_word(pieces: Iterable[str]) -> list[bool]:
    """For each piece, whether a word begins with it; the first piece after a special token does so in any case."""
    return [piece.startswith(SPACE_MARK) or bool(UNSPACED.match(piece)) for piece in pieces]
