"""One document's text: bytes to `str`, cleaning, the length filter and the content hash.

`clean` is the pipeline's only normalisation: the tokenizer is trained with identity normalisation, so that its ids are
the same in SentencePiece and in every `transformers` release. It maps a text to NFC, one paragraph a line, one space
between words, and nothing invisible but what a script needs to be spelt; on request it first repairs mojibake.

Almost all text is clean already, and three tests in C recognise that: `str.isprintable` is false for exactly the
characters that need a look, `unicodedata.normalize` returns NFC text as it is, and blanks to collapse show as two
neighbours once line ends are read as spaces. Everything slower runs on the documents that fail one of them. Mojibake
shows in UTF-8 as a byte pattern behind a byte that most alphabets never use, so that looking for it is a search for
single bytes; ftfy, which is a hundred times slower than all the rest, sees the lines that hold the pattern alone.

Which code points are assigned, and how they compose, is the matter of the interpreter's Unicode version
(`unicodedata.unidata_version`): it changes bytes, so it belongs in the fingerprint of a stage that cleans.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable

import xxhash


class Rejected(Exception):  # noqa: N818, an outcome to count and no error of the run
    """An input, or the rest of it, that cannot be read as text; it is counted and the run goes on.

    `reason` is a short name to count by, `detail` says where or why and never quotes the input.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


# UTF-16 without a byte order mark is often valid UTF-8 too: in most alphabets every second byte is a control character.
_CONTROL_BYTES = bytes(sorted({*range(0x20), 0x7F} - set(b"\t\n\v\f\r")))
_MAX_CONTROL_SHARE = 1 / 20


def decode(raw: bytes) -> str:
    """Strict UTF-8, without a leading byte order mark.

    Stray NUL and other control characters pass, for `clean` to remove; a document where they are more than one byte in
    twenty is in another encoding, or no text at all.

    Raises:
        Rejected: `invalid_utf8` (overlong forms, surrogates and a cut last character included) or `control_bytes`.
    """
    controls = len(raw) - len(raw.translate(None, _CONTROL_BYTES))
    if controls > _MAX_CONTROL_SHARE * len(raw):
        raise Rejected("control_bytes", f"{controls} of {len(raw)} bytes are control characters")
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected("invalid_utf8", f"{error.reason} at byte {error.start}") from None


_LINE_ENDS = frozenset("\n\v\f\r\x85\u2028\u2029")
_REMOVED_CATEGORIES = frozenset(["Cc", "Cf", "Cn", "Co", "Cs"])
# Format characters that are visible (Arabic number signs, Syriac and Kaithi marks, hieroglyph joiners) or that shape
# the letters beside them (the Mongolian vowel separator, ZWNJ, ZWJ). The other ones only steer a renderer.
_KEPT_FORMAT_RANGES = [
    (0x0600, 0x0605), (0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x180E, 0x180E),
    (0x200C, 0x200D), (0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x13430, 0x1343F),
]  # fmt: skip
_KEPT_FORMAT = frozenset(chr(code) for first, last in _KEPT_FORMAT_RANGES for code in range(first, last + 1))


def _replacement(char: str) -> str:
    """What stands for `char` in clean text: itself, a line end, a space or nothing."""
    if char in _LINE_ENDS:
        return "\n"
    category = unicodedata.category(char)
    if category == "Zs" or char == "\t":
        return " "
    return "" if category in _REMOVED_CATEGORIES and char not in _KEPT_FORMAT else char


class _Replacements(dict[int, str]):
    """`_replacement` as a table for `str.translate`, filled with the code points that were met."""

    def __missing__(self, code: int) -> str:
        self[code] = _replacement(chr(code))
        return self[code]


BASIC_PLANE = range(0x10000)
BEYOND_BASIC_PLANE = r"\U00010000-\U0010ffff"


def character_class(codes: Iterable[int]) -> str:
    """The inside of a regular expression's `[...]` for these code points of the basic plane, in ascending order.

    `re` tests a set of the basic plane in one table look-up, but walks a list of ranges beyond it; to have all of those
    looked at add the one range `BEYOND_BASIC_PLANE`.
    """
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\u{first:04x}-\u{last:04x}" for first, last in ranges)


# Mojibake is UTF-8 that was read in a single-byte encoding: `é`, C3 A9, became `Ã©`. Written as UTF-8, a first byte
# that was read as Latin-1 or Windows-1252 is C3 and one byte more, whatever the alphabet, and as many characters follow
# as it asks for. `_MOJIBAKE` is exact about those two encodings. For the other ones there are signs that no word has: a
# symbol right behind a letter that Windows-1250, -1251, -1253, -1257 or Mac Roman has for a first byte, a frame that
# runs into a letter (code page 437), and what they make of the first two bytes of `’`, `“` and `–`.
_CONTINUATIONS = sorted(
    {bytes([byte]).decode(encoding, "ignore") for byte in range(0x80, 0xC0) for encoding in ("cp1252", "latin-1")}
    - {""}
)
_FOLLOWING = b"(?:" + b"|".join(char.encode() for char in _CONTINUATIONS) + b")"
_MOJIBAKE = re.compile(
    rb"\xc3[\x82-\xb4](?=[\xc2\xc5\xc6\xcb\xe2])"
    rb"(?:(?<=[\x82-\x9b])%b|(?<=[\xa0-\xaf])%b{2}|(?<=[\xb0-\xb4])%b{3})" % (_FOLLOWING, _FOLLOWING, _FOLLOWING)
)
_SYMBOL_BEHIND_LETTER = re.compile(
    rb"\xc2[\xa4\xa6-\xa9\xac-\xb1\xb4-\xb8]"  # from ¤ to ¸
    rb"(?:(?<=[\xc3-\xc5]...)|(?<=\xd0[\x92-\xbf]..)|(?<=\xce[\x92-\xa9]..)|(?<=\xe2\x88\x9a..))",  # as Ĺ, Р, Ξ, √
    re.DOTALL,
)
_FRAME_OR_QUOTE = re.compile(
    rb"\xe2(?:[\x94\x95].(?:[\xc2\xc3]|\xe2\x8c|\xe2\x96[\x91-\x93])"  # as ├⌐, ╨░; then β€ ā€, ‚Ä, Ђ™
    rb"|\x82\xac(?<=\xce\xb2...|\xc4\x81...)|\x80\x9a\xc3\x84|(?:\x84\xa2|\x80[\x93\x94])(?<=\xd0\x82...))",
    re.DOTALL,
)
_RUN_FOLLOWING = f"[{''.join(_CONTINUATIONS)}]"
_MOJIBAKE_RUN = re.compile(
    f"(?:[\xc2-\xdb]{_RUN_FOLLOWING}|[\xe0-\xef]{_RUN_FOLLOWING}{{2}}|[\xf0-\xf4]{_RUN_FOLLOWING}{{3}})+"
)
_MAX_REPAIRS = 8  # one after the other, each of what the one before has laid open; real text needs two


def shows_mojibake(raw: bytes) -> bool:
    """Whether UTF-8 text may hold mojibake, for `clean` to look at; one real document in a thousand does.

    Cost: 1.2 GB/s.
    """
    return bool(
        (b"\xc3" in raw and _MOJIBAKE.search(raw))
        or (b"\xc2" in raw and _SYMBOL_BEHIND_LETTER.search(raw))
        or (b"\xe2" in raw and _FRAME_OR_QUOTE.search(raw))
    )


def _shows_mojibake(text: str) -> bool:
    return not text.isascii() and shows_mojibake(text.encode("utf-8", "surrogatepass"))


def _repair(text: str) -> str:
    """The text with the lines repaired that show mojibake."""
    return "\n".join(_repair_line(line) if _shows_mojibake(line) else line for line in text.split("\n"))


def _repair_line(line: str) -> str:
    """The line read in the right encoding if that makes sense of all of it, or else of the runs that are surely wrong.

    ftfy has a repair of parts too, but its time is quadratic in the line.
    """
    import ftfy

    config = ftfy.TextFixerConfig(
        decode_inconsistent_utf8=False, replace_lossy_sequences=False, fix_c1_controls=False, explain=False
    )
    line = ftfy.fix_encoding(line, config)
    return _MOJIBAKE_RUN.sub(lambda run: ftfy.fix_encoding(run[0], config), line)


_MAX_MARKS = 30  # in a row, as in the Stream-Safe Text Format of UAX #15
_PROBE_STEP = 10  # any 31 characters in a row hold three whose index is a multiple of 10

_MARK_CLASS = character_class(code for code in BASIC_PLANE if unicodedata.combining(chr(code))) + BEYOND_BASIC_PLANE
_SUSPECT_CLASS = character_class(code for code in BASIC_PLANE if _replacement(chr(code)) != chr(code))
_SUSPECTS = re.compile(f"[{_SUSPECT_CLASS}{BEYOND_BASIC_PLANE}]+")
_LONG_MARK_RUN = re.compile(f"[{_MARK_CLASS}]{{{_MAX_MARKS + 1},}}")
_PROBED_MARK_RUN = re.compile(f"[{_MARK_CLASS}]{{{(_MAX_MARKS + 1) // _PROBE_STEP}}}")
_BLANKS = re.compile(r"[ \n]{2,}")
_REPLACEMENTS = _Replacements()


def clean(text: str, *, fix_mojibake: bool = False) -> str:
    """Clean text: NFC, "\\n" between non-empty lines, single spaces between words, no tab, nothing invisible.

    Line ends of every kind (LF, CR, CRLF, VT, FF, NEL, U+2028, U+2029) become "\\n"; other white space becomes spaces.
    Control, unassigned, private-use and surrogate code points go, as do format characters (bidi controls, zero-width
    spaces, soft hyphens, tags) but not ZWJ and ZWNJ, which Indic and Arabic scripts spell with. Of more than 30
    combining marks in a row, the rest is cut. Idempotent; the result may be empty.

    Cost: linear.

    Args:
        text: any text.
        fix_mojibake: first read lines again that were decoded in a wrong encoding, where that is sure.

    Raises:
        Rejected: `nested_mojibake`, the text still changes after eight repairs.
    """
    if not fix_mojibake:
        return _tidy(text)
    for _ in range(_MAX_REPAIRS):
        cleaned = _tidy(_repair(text) if _shows_mojibake(text) else text)
        if cleaned == text or not _shows_mojibake(cleaned):
            return cleaned
        text = cleaned
    raise Rejected("nested_mojibake", f"it still changes after {_MAX_REPAIRS} repairs")


def _tidy(text: str) -> str:
    spaced = text.replace("\n", " ")
    if not spaced.isprintable():
        text = _SUSPECTS.sub(lambda run: run[0].translate(_REPLACEMENTS), text)
        spaced = text.replace("\n", " ")
    if not text.isascii() and (composed := _compose(text)) is not text:
        text = composed
        spaced = text.replace("\n", " ")
    if "  " in spaced:
        text = _BLANKS.sub(lambda run: "\n" if "\n" in run[0] else " ", text)
    return text.strip(" \n")


def _compose(text: str) -> str:
    """NFC with short runs of combining marks.

    The cut before bounds the sorting of marks, which is quadratic in a run's length; the one after is for marks that
    decompose into two. A cut leaves NFC text in NFC: what is left of the run still keeps its neighbours apart.
    """
    cut = _cut_mark_runs(text)
    composed = unicodedata.normalize("NFC", cut)
    return composed if composed is cut else _cut_mark_runs(composed)


def _cut_mark_runs(text: str) -> str:
    if _PROBED_MARK_RUN.search(text[::_PROBE_STEP]):
        return _LONG_MARK_RUN.sub(_cut_marks, text)
    return text


def _cut_marks(match: re.Match[str]) -> str:
    kept: list[str] = []
    marks = 0
    for char in match[0]:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= _MAX_MARKS:
            kept.append(char)
    return "".join(kept)


# Thai and Lao, Tibetan, Burmese, Khmer, New Tai Lue and Tai Tham, Balinese, kana, Han and its extensions, Yi, Javanese.
UNSPACED_RANGES = [
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x1AAF), (0x1B00, 0x1B7F), (0x3040, 0x30FF),
    (0x3400, 0x9FFF), (0xA000, 0xA4CF), (0xA980, 0xA9DF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
]  # fmt: skip
"""Code points of the scripts that put no spaces between words."""


def keep(text: str, min_chars: int, max_chars: int) -> str | None:
    """None to keep a clean text, or the reason to drop it: `empty`, `too_short`, `too_long` (bounds are inclusive)."""
    if not text:
        return "empty"
    if len(text) < min_chars:
        return "too_short"
    if len(text) > max_chars:
        return "too_long"
    return None


def content_hash(text: str) -> bytes:
    """The 16 bytes of xxh3_128 of the text's UTF-8, most significant first: equal text, equal hash."""
    return xxhash.xxh3_128_digest(text.encode())
