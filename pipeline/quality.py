"""Why a clean document is not worth training on: its length, lines that repeat, too many symbols.

The measures are two shares of a document's characters. Lines that occurred before in the document are the mark of
menus, forms and generated lists; symbols (punctuation included) that of program code, tables of figures and rules of
dots. Both limits lie far beyond prose: they drop one document in a thousand of ordinary web text.

Cost: bounded but for few documents. A look at a part (the beginning for lines, characters spread over the document for
symbols) tells whether it holds half of what is allowed, and only then the whole document is measured. So no document
is dropped by a guess, and one is missed whose part is very unlike the rest.
"""

from __future__ import annotations

import re
import unicodedata

from pipeline.config import CorpusConfig
from pipeline.text import BASIC_PLANE, BEYOND_BASIC_PLANE, character_class, keep

_MIN_LINES = 5  # in fewer lines a refrain or a heading said twice is a large share
_LINE_LOOK_CHARS = 4000
_SYMBOL_LOOK_CHARS = 100

_MAX_REPEATED_LINE_SHARE = 0.4
# By the script of most letters. Prose has 2 to 3 % of symbols; in Han, kana and Hangul a character is a syllable or a
# word, so that a sentence has fewer of them: 5 to 9 %; scripts that put a space where others put a comma have 1 %.
_MAX_SYMBOL_SHARE = 0.25
_MAX_SYMBOL_SHARE_BY_SCRIPT = {
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]": 0.20,  # Thai, Lao, Burmese, Khmer
    "[\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]": 0.35,  # Han, kana, Hangul
}
_SCRIPTS = [(re.compile(letters), limit) for letters, limit in _MAX_SYMBOL_SHARE_BY_SCRIPT.items()]
_LOWEST_SYMBOL_SHARE = min(_MAX_SYMBOL_SHARE, *_MAX_SYMBOL_SHARE_BY_SCRIPT.values())


def _is_symbol(char: str) -> bool:
    """Whether a character is punctuation or a symbol: no letter, mark, digit, white space or format character."""
    return unicodedata.category(char)[0] in "PS"


_SYMBOL_CLASS = character_class(code for code in BASIC_PLANE if _is_symbol(chr(code)))
_PERHAPS_SYMBOL = re.compile(f"[{_SYMBOL_CLASS}{BEYOND_BASIC_PLANE}]")
_LETTER = re.compile(r"[^\W\d_]")


def drop_reason(text: str, config: CorpusConfig) -> str | None:
    """None to keep a clean text, or the first of these reasons to drop it.

    `empty`, `too_short`, `too_long` (as `pipeline.text.keep`), `repeated_lines`, `symbols`. A share has to be above its
    limit, so that a limit of 1 drops nothing.
    """
    if reason := keep(text, config.min_chars, config.max_chars):
        return reason
    limit = _MAX_REPEATED_LINE_SHARE if config.max_repeated_line_share is None else config.max_repeated_line_share
    if 2 * repeated_line_share(text[:_LINE_LOOK_CHARS]) >= limit and repeated_line_share(text) > limit:
        return "repeated_lines"
    return "symbols" if _exceeds_symbols(text, config.max_symbol_share) else None


def repeated_line_share(text: str) -> float:
    """Characters in lines that occurred before, by the characters in all lines; 0 for less than five lines."""
    lines = text.split("\n")
    if len(lines) < _MIN_LINES:
        return 0.0
    distinct = set(lines)
    chars = len(text) - (len(lines) - 1)
    return 1.0 - sum(map(len, distinct)) / chars if chars and len(distinct) < len(lines) else 0.0


def symbol_share(text: str) -> float:
    """Punctuation marks and symbols by all characters of the text; 0 for an empty text."""
    return sum(map(_is_symbol, _PERHAPS_SYMBOL.findall(text))) / len(text) if text else 0.0


def _exceeds_symbols(text: str, limit: float | None) -> bool:
    look = text[:: len(text) // _SYMBOL_LOOK_CHARS + 1]
    lowest = _LOWEST_SYMBOL_SHARE if limit is None else limit
    if 2 * len(_PERHAPS_SYMBOL.findall(look)) < lowest * len(look):
        return False
    return symbol_share(text) > (_symbol_limit_of(look) if limit is None else limit)


def _symbol_limit_of(look: str) -> float:
    letters = len(_LETTER.findall(look))
    limits = (limit for script, limit in _SCRIPTS if 2 * len(script.findall(look)) > letters)
    return next(limits, _MAX_SYMBOL_SHARE)
