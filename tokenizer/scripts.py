"""The Unicode script of every character, from the tables of Arrow's regular expressions.

A character is looked up once a process: a new one is tried against each script's class, about 2 microseconds a script;
after that it costs one array access.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UNKNOWN = "Unknown"
"""The script of characters that the tables do not know, such as those of a later Unicode."""

SCRIPTS = (
    UNKNOWN,
    *("Common", "Inherited", "Latin", "Cyrillic", "Greek", "Han", "Hangul", "Hiragana", "Katakana", "Arabic"),
    *("Armenian", "Bengali", "Bopomofo", "Braille", "Buginese", "Canadian_Aboriginal", "Chakma", "Cherokee", "Coptic"),
    *("Deseret", "Devanagari", "Ethiopic", "Georgian", "Glagolitic", "Gothic", "Gujarati", "Gurmukhi", "Hebrew"),
    *("Balinese", "Bamum", "Batak", "Cham", "Cuneiform", "Javanese", "Kannada", "Kayah_Li", "Khmer", "Lao", "Lepcha"),
    *("Limbu", "Lisu", "Malayalam", "Mandaic", "Meetei_Mayek", "Mongolian", "Myanmar", "New_Tai_Lue", "Nko", "Ogham"),
    *("Ol_Chiki", "Oriya", "Osage", "Osmanya", "Rejang", "Runic", "Samaritan", "Saurashtra", "Sinhala", "Sundanese"),
    *("Syloti_Nagri", "Syriac", "Tagalog", "Tagbanwa", "Tai_Le", "Tai_Tham", "Tai_Viet", "Tamil", "Telugu", "Thaana"),
    *("Thai", "Tibetan", "Tifinagh", "Vai", "Yi", "Adlam", "Hanifi_Rohingya", "Egyptian_Hieroglyphs", "Phoenician"),
)
"""Names of the scripts; the number of a script is its place here."""


_SHARED = [SCRIPTS.index("Common"), SCRIPTS.index("Inherited")]


def script_numbers(characters: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The place in `SCRIPTS` of each code point."""
    table = _table()
    found = table[characters]
    if not found.all():
        _look_up(table, np.unique(characters[found == 0]))
        found = table[characters]
    return np.asarray(found - 1)


def main_script(text: str) -> str:
    """The script of most of a text's characters, not counting those that any script may use."""
    counts = np.bincount(script_numbers(_code_points(text)), minlength=len(SCRIPTS))
    own = counts.copy()
    own[_SHARED] = 0
    return SCRIPTS[int(np.argmax(own if own.any() else counts))]


def count_by_script(texts: list[str]) -> dict[str, int]:
    """How many of the texts are in each script, going by the first character of each that belongs to one script only.

    A text without such a character counts as "Common".
    """
    numbers = script_numbers(_code_points("".join(texts)))
    owners = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    own = ~np.isin(numbers, _SHARED)
    decided, first = np.unique(owners[own], return_index=True)
    counts = np.bincount(numbers[own][first], minlength=len(SCRIPTS))
    counts[SCRIPTS.index("Common")] += len(texts) - len(decided)
    return {name: int(count) for name, count in zip(SCRIPTS, counts, strict=True) if count}


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@cache
def _table() -> NDArray[np.uint8]:
    """By code point: 1 + the script's number, 0 where it was not looked up yet."""
    return np.zeros(0x110000, np.uint8)


def _look_up(table: NDArray[np.uint8], characters: NDArray[np.intp]) -> None:
    texts = pa.array([chr(character) for character in characters])
    table[characters] = 1 + SCRIPTS.index(UNKNOWN)
    for number, name in enumerate(SCRIPTS[1:], 1):
        member = pc.match_substring_regex(texts, rf"\p{{{name}}}").to_numpy(zero_copy_only=False)
        table[characters[member]] = 1 + number
