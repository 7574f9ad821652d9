"""One document's text: bytes to `str`, cleaning, the length filter and the content hash.

`clean` is the pipeline's only normalisation: the tokenizer is trained with identity normalisation, so that its ids are
the same in SentencePiece and in every `transformers` release. It maps a text to NFC, one paragraph a line, one space
between words, and nothing invisible but what a script needs to be spelt.

Almost all text is clean already, and three tests in C recognise that: `str.isprintable` is false for exactly the
characters that need a look, `unicodedata.normalize` returns NFC text as it is, and blanks to collapse show as two
neighbours once line ends are read as spaces. Everything slower runs on the documents that fail one of them.

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


def _character_class(codes: Iterable[int]) -> str:
    """The inside of a regular expression's `[...]` for these code points of the basic plane and all beyond it.

    `re` tests a set of the basic plane in one table look-up, but walks a list of ranges beyond it.
    """
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\u{first:04x}-\u{last:04x}" for first, last in ranges) + r"\U00010000-\U0010ffff"


_MAX_MARKS = 30  # in a row, as in the Stream-Safe Text Format of UAX #15
_PROBE_STEP = 10  # any 31 characters in a row hold three whose index is a multiple of 10

_BASIC_PLANE = range(0x10000)
_MARK_CLASS = _character_class(code for code in _BASIC_PLANE if unicodedata.combining(chr(code)))
_SUSPECTS = re.compile(f"[{_character_class(c for c in _BASIC_PLANE if _replacement(chr(c)) != chr(c))}]+")
_LONG_MARK_RUN = re.compile(f"[{_MARK_CLASS}]{{{_MAX_MARKS + 1},}}")
_PROBED_MARK_RUN = re.compile(f"[{_MARK_CLASS}]{{{(_MAX_MARKS + 1) // _PROBE_STEP}}}")
_BLANKS = re.compile(r"[ \n]{2,}")
_REPLACEMENTS = _Replacements()


def clean(text: str) -> str:
    """Clean text: NFC, "\\n" between non-empty lines, single spaces between words, no tab, nothing invisible.

    Line ends of every kind (LF, CR, CRLF, VT, FF, NEL, U+2028, U+2029) become "\\n"; other white space becomes spaces.
    Control, unassigned, private-use and surrogate code points go, as do format characters (bidi controls, zero-width
    spaces, soft hyphens, tags) but not ZWJ and ZWNJ, which Indic and Arabic scripts spell with. Of more than 30
    combining marks in a row, the rest is cut. Idempotent; the result may be empty.

    Cost: linear.
    """
    if not text.replace("\n", " ").isprintable():
        text = _SUSPECTS.sub(lambda run: run[0].translate(_REPLACEMENTS), text)
    if not text.isascii():
        text = _compose(text)
    if "  " in text.replace("\n", " "):
        text = _BLANKS.sub(lambda run: "\n" if "\n" in run[0] else " ", text)
    return text.strip(" \n")


def _compose(text: str) -> str:
    """NFC with short runs of combining marks.

    The cut before bounds the sorting of marks, which is quadratic in a run's length; the one after is for marks that
    decompose into two. A cut leaves NFC text in NFC: what is left of the run still keeps its neighbours apart.
    """
    return _cut_mark_runs(unicodedata.normalize("NFC", _cut_mark_runs(text)))


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
