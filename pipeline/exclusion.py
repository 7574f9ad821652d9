"""Decontamination: documents that hold a sentence of an evaluation file.

A document and a sentence are compared by their letters, marks and digits alone, casefolded: white space, punctuation
and symbols differ between copies of one sentence. Beyond the basic plane everything but the pictographs counts as a
letter. A document is excluded if it contains such a sentence anywhere: an Aho-Corasick automaton finds where any of
them may begin, by its first bytes, and the rest is compared there.

Sentences of fewer than twenty letters (ten in Han, kana and Hangul, where one says as much as two) are ignored: they
occur in text that has never seen the evaluation.

Cost: linear in the document whatever the number of sentences, 50 MB/s a core. Every worker holds all the sentences:
85 MB for the fifty thousand of XNLI's validation set.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import orjson

from pipeline.decompress import decompress
from pipeline.errors import UserError
from pipeline.storage import open_url, redact
from pipeline.text import BASIC_PLANE, Rejected, character_class, clean, decode

_MIN_LETTERS = 20
_BEGINNING_BYTES = 24  # what the automaton sees of a sentence: whole ones would take it four times the memory
_WORTH_TWO = re.compile("[\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff]")

_FILE_NAME = re.compile(r".*\.(tsv|jsonl|txt)(?:\.(xz|gz|bz2|zst))?")


def _is_dropped(code: int) -> bool:
    return unicodedata.category(chr(code))[0] not in "LMN"


_DROPPED_BYTES = bytes(code for code in range(0x80) if _is_dropped(code))
_DROPPED_CLASS = character_class(code for code in BASIC_PLANE[0x80:] if _is_dropped(code))
_DROPPED = re.compile(f"[{_DROPPED_CLASS}\U0001f000-\U0001faff]+")


def letters_of(text: str) -> bytes:
    """UTF-8 of a clean text's letters, marks and digits, casefolded."""
    folded = text.casefold()
    if not folded.isascii():
        folded = _DROPPED.sub("", folded)
    return folded.encode().translate(None, _DROPPED_BYTES)


@dataclass(frozen=True)
class EvaluationFiles:
    """Evaluation files by URL and content, and the fsspec options to open them, which it does not show."""

    urls: tuple[str, ...]
    options: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    digests: tuple[str, ...] = ()


class Exclusion:
    """The sentences that no document may hold.

    Attributes:
        sentences: number of different ones that are looked for.
        ignored: number of different ones that are too short for that.
    """

    def __init__(self, sentences: set[str]) -> None:
        import ahocorasick_rs

        found = {letters_of(clean(sentence)) for sentence in sentences} - {b""}
        telling = sorted(filter(_is_telling, found))
        self.sentences = len(telling)
        self.ignored = len(found) - len(telling)
        groups = groupby(telling, key=lambda letters: letters[:_BEGINNING_BYTES])
        by_beginning = {beginning: list(group) for beginning, group in groups}
        self._automaton = ahocorasick_rs.BytesAhoCorasick(list(by_beginning))
        self._groups = list(by_beginning.values())

    def holds_sentence(self, text: str) -> bool:
        """Whether a clean text contains one of the sentences."""
        letters = letters_of(text)
        return any(
            letters.startswith(sentence, start)
            for group, start, _ in self._automaton.find_matches_as_indexes(letters, overlapping=True)
            for sentence in self._groups[group]
        )


def _is_telling(letters: bytes) -> bool:
    text = letters.decode()
    return len(text) + len(_WORTH_TWO.findall(text)) >= _MIN_LETTERS


@lru_cache(maxsize=1)
def load_exclusion(files: EvaluationFiles) -> Exclusion:
    """The sentences of some files: every column of `.tsv`, every string of `.jsonl`, every line of `.txt`.

    The files may be compressed, as `.tsv.xz`. They are read whole, and once a process.

    Raises:
        UserError: a file has another ending, cannot be read, is damaged, or holds no sentence that is long enough.
    """
    sentences: set[str] = set()
    for url in files.urls:
        of_file = set(_sentences(url, files.options))
        if not any(_is_telling(letters_of(clean(sentence))) for sentence in of_file):
            raise _unusable(url, f"holds no sentence of {_MIN_LETTERS} letters or more; take it out of the list")
        sentences |= of_file
    return Exclusion(sentences)


def _sentences(url: str, options: dict[str, dict[str, Any]]) -> Iterator[str]:
    name = _FILE_NAME.fullmatch(url)
    if not name:
        raise _unusable(url, "must be named .tsv, .jsonl or .txt, with .xz, .gz, .bz2 or .zst behind it if compressed")
    kind, compression = name.groups(default="")
    for number, line in enumerate(_content(url, compression, options).split("\n"), start=1):
        if kind == "jsonl" and line.strip():
            try:
                yield from _strings(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                raise _unusable(url, f"line {number} is no JSON ({error.msg})") from None
        elif kind != "jsonl":
            yield from line.split("\t") if kind == "tsv" else [line]


def _content(url: str, compression: str, options: dict[str, dict[str, Any]]) -> str:
    try:
        with open_url(url, options) as stream:
            return decode(b"".join(decompress(stream, compression)))
    except OSError as error:
        raise _unusable(url, f"cannot be read: {error.strerror or error}") from None
    except Rejected as fault:
        raise _unusable(url, f"is damaged or no UTF-8 text: {fault}") from None


def _strings(value: Any) -> Iterator[str]:
    """Every string value of a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _unusable(url: str, fault: str) -> UserError:
    return UserError(f"corpus.exclude: {redact(url)} {fault}")
