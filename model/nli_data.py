"""Natural-language-inference pairs: TSV files in, token ids out.

Two layouts are read, told apart by the first line; both are UTF-8, with literal quotes, plain or .xz .gz .bz2 .zst:

* with a header line, as XNLI, its machine-translated training files and MultiNLI have: columns are found by name;
* without one: `premise TAB hypothesis TAB label`.

A row's language stands in its `language` column. Where there is none, the file's name says it: the last of its pieces
between dots, dashes and underscores that is an ISO 639-1 code (`multinli.train.ar.tsv` is Arabic, `snli-en-20k.tsv.xz`
English), and English where no piece is one. Folders do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import xxhash

from pipeline.decompress import decompress
from pipeline.errors import UserError
from pipeline.storage import filesystem
from pipeline.text import Rejected

LABELS = ("entailment", "neutral", "contradiction")
NO_LABEL = -1
COLUMNS = {
    "language": ("language",),
    "premise": ("sentence1", "premise"),
    "hypothesis": ("sentence2", "hypothesis", "hypo"),
    "label": ("gold_label", "label"),
}
MAX_LINE_BYTES = 1 << 20

_LABEL_IDS = {
    **{name: label for label, name in enumerate(LABELS)},
    **{str(label): label for label in range(len(LABELS))},
    "contradictory": LABELS.index("contradiction"),  # so spelt in XNLI's translated training files
    "-": NO_LABEL,  # the annotators did not agree
}
_PLAIN = ["premise", "hypothesis", "label"]
_COMPRESSIONS = ("xz", "gz", "bz2", "zst")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8}){0,3}")
_ISO_639_1 = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el "
    "en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it "
    "iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt "
    "my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl "
    "sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo "
    "za zh zu"
)
_ENCODED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Pair:
    """One premise with its hypothesis and where they stand; `label` indexes `LABELS` or is `NO_LABEL`."""

    language: str
    premise: str
    hypothesis: str
    label: int
    file: str
    line: int


def is_english(language: str) -> bool:
    """Whether a language code is English of any region."""
    return re.split("[-_]", language)[0] in {"en", "eng"}


def language_in_name(name: str) -> str:
    """The language that a file's bare name states, by the rule in this module's docstring."""
    known = set(_ISO_639_1.split())
    codes = [piece for piece in re.split("[._-]", name) if piece in known]
    return codes[-1] if codes else "en"


def read_pairs(url: str, storage_options: dict[str, dict[str, Any]]) -> Iterator[Pair]:
    """The pairs of one file in its order.

    Raises:
        UserError: a column is missing, a label unknown, a line too long or not UTF-8, or the file is damaged; the
            sentence names file, line and column.
    """
    name = url.rsplit("/", 1)[-1]
    lines = enumerate(_lines(url, name, storage_options), 1)
    first = next(lines, (1, ""))
    layout = _layout(name, first[1].split("\t"))
    rows = lines if layout.has_header else chain([first], lines)
    yield from (layout.pair(line, number) for number, line in rows if line)


def _lines(url: str, name: str, storage_options: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Decoded lines without their ends; LF and CRLF end a line, nothing else does."""
    number = 0
    ending = name.rsplit(".", 1)[-1]
    try:
        with filesystem(url, storage_options).open(url, "rb") as stream:
            for raw in _split(decompress(stream, ending if ending in _COMPRESSIONS else "")):
                number += 1
                yield raw.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {number}: its byte {error.start} is not UTF-8; save it as UTF-8") from None
    except Rejected as error:
        raise UserError(f"{name}, after line {number}: cannot be read ({error}); replace the file") from None


def _split(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
        if len(rest) > MAX_LINE_BYTES:
            raise Rejected("line_too_long", f"more than {MAX_LINE_BYTES} bytes without a line end")
    if rest:
        yield rest


@dataclass(frozen=True)
class _Layout:
    """Where a file's rows have what. `places` maps the keys of `COLUMNS` to positions in `header`."""

    file: str
    language: str
    header: list[str]
    places: dict[str, int]
    has_header: bool

    def pair(self, line: str, number: int) -> Pair:
        """Parse one line."""
        cells = line.split("\t")
        missing = [self.header[place] for place in self.places.values() if place >= len(cells)]
        if missing or len(cells) > len(self.header):
            problem = f"column {missing[0]} is missing" if missing else "there is a tab too many"
            raise UserError(f"{self.file}, line {number}: {problem} ({len(cells)} of {len(self.header)} columns)")
        cell = {column: cells[place] for column, place in self.places.items()}
        language = cell.get("language", self.language)
        if not _LANGUAGE.fullmatch(language):
            raise self._refuse("language", number, f"{language[:40]!r} is not a language code such as en or zh-Hans")
        if cell["label"] not in _LABEL_IDS:
            known = f"known are {', '.join(LABELS)}, 0, 1, 2 and - for no gold label"
            raise self._refuse("label", number, f"unknown label {cell['label'][:40]!r}; {known}")
        return Pair(language, cell["premise"], cell["hypothesis"], _LABEL_IDS[cell["label"]], self.file, number)

    def _refuse(self, column: str, number: int, problem: str) -> UserError:
        return UserError(f"{self.file}, line {number}, column {self.header[self.places[column]]}: {problem}")


def _layout(file: str, first_line: list[str]) -> _Layout:
    """The layout that a file's first line shows."""
    language = language_in_name(file)
    if not any(name in first_line for column in _PLAIN for name in COLUMNS[column]):
        return _Layout(file, language, _PLAIN, {column: place for place, column in enumerate(_PLAIN)}, False)
    places = {column: first_line.index(n) for column, names in COLUMNS.items() for n in names if n in first_line}
    for column in _PLAIN:
        if column not in places:
            raise UserError(
                f"{file}, line 1: column {COLUMNS[column][0]} is missing, there are {', '.join(first_line)[:200]!r}; "
                "name the columns as XNLI does, or leave the header line out"
            )
    return _Layout(file, language, first_line, places, True)


@dataclass(frozen=True, eq=False)
class EncodedPairs:
    """Labelled pairs as token ids, end to end in one array: 4 bytes a token however many pairs there are."""

    ids: np.ndarray  # [tokens] int32
    starts: np.ndarray  # [pairs + 1] int64, where each pair begins in `ids`
    labels: np.ndarray  # [pairs] int64
    keys: np.ndarray  # [pairs] uint64, seeded hash of premise and hypothesis

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair."""
        return np.diff(self.starts)

    def take(self, rows: np.ndarray) -> EncodedPairs:
        """The pairs at these places, in that order."""
        pieces = [self.ids[self.starts[row] : self.starts[row + 1]] for row in rows]
        starts = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        return EncodedPairs(np.concatenate(pieces), starts, self.labels[rows], self.keys[rows])

    def shuffled(self, most: int | None = None) -> EncodedPairs:
        """The first `most` pairs in the order of their keys: a shuffle in which the order of the files has no part."""
        return self.take(np.lexsort((self.labels, self.keys))[:most])


def encode(pairs: Iterable[Pair], tokenizer: Callable[..., Any], max_seq_len: int, seed: int) -> EncodedPairs:
    """Encode labelled pairs as `[CLS] premise [SEP] hypothesis [SEP]`, cutting the longer sentence first.

    Pairs may come from a generator: only their ids stay in memory.
    """
    ids, lengths, labels, keys = [np.zeros(0, np.int32)], [0], [], []
    stream = iter(pairs)
    while batch := list(islice(stream, _ENCODED_AT_ONCE)):
        texts = [pair.premise for pair in batch], [pair.hypothesis for pair in batch]
        rows = tokenizer(*texts, truncation=True, max_length=max_seq_len)["input_ids"]
        ids.append(np.concatenate(rows).astype(np.int32))
        lengths += [len(row) for row in rows]
        labels += [pair.label for pair in batch]
        keys += [xxhash.xxh3_64_intdigest("\t".join(text).encode(), seed % 2**64) for text in zip(*texts, strict=True)]
    return EncodedPairs(np.concatenate(ids), np.cumsum(lengths), np.array(labels, np.int64), np.array(keys, np.uint64))
