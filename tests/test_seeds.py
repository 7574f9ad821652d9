"""Seeds: exactly the substrings worth something by a slow count, in any order of text, the best where not all fit."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.aggregate import Segments, aggregate
from tokenizer.seeds import LONGEST, seed_pieces

WORDS = st.dictionaries(st.text("abc字", min_size=1, max_size=20), st.integers(1, 5), min_size=1, max_size=8)


def segments_of(words: dict[str, int]) -> Segments:
    return aggregate((" ".join([word] * number)).encode() for word, number in words.items())


def slowly(words: dict[str, int]) -> dict[str, tuple[float, int]]:
    """Every seed with its value in bits, and its count."""
    segments = Counter[str]()
    for text, number in zip(*(list(column) for column in _columns(words)), strict=True):
        segments[text] += number
    grams, letters = Counter[str](), Counter[str]()
    for text, number in segments.items():
        letters.update({c: text.count(c) * number for c in set(text)})
        for start in range(len(text)):
            for stop in range(start + 2, min(len(text), start + LONGEST + 1) + 1):
                grams[text[start:stop]] += number
    frequent = {gram: number for gram, number in grams.items() if number >= 2}
    found = {}
    for gram, number in frequent.items():
        around = [other for other in frequent if len(other) == len(gram) + 1 and gram in (other[1:], other[:-1])]
        residual = number - max((frequent[other] for other in around), default=0)
        if residual and len(gram) <= LONGEST:
            bits = sum(-math.log2(letters[c] / letters.total()) for c in gram)
            found[gram] = (residual * math.sqrt(bits), number)
    return found


def _columns(words: dict[str, int]) -> tuple[list[str], list[int]]:
    segments = segments_of(words)
    return [text.decode() for text in segments.texts.to_pylist()], segments.counts.tolist()


@settings(deadline=None)
@given(WORDS)
def test_seeds_are_those_of_a_slow_count(words: dict[str, int]) -> None:
    expected = {gram: number for gram, (_, number) in slowly(words).items()}
    found = list(seed_pieces(segments_of(words), 10**6, 10**6))
    assert dict(found) == expected
    assert len(found) == len(expected)


@settings(deadline=None)
@given(WORDS, st.integers(1, 6))
def test_the_most_valuable_are_kept(words: dict[str, int], wanted: int) -> None:
    values = {gram: value for gram, (value, _) in slowly(words).items()}
    found = [gram for gram, _ in seed_pieces(segments_of(words), wanted, wanted)]
    assert len(found) == min(wanted, len(values))
    best = sorted(values.values(), reverse=True)[: len(found)]
    assert all(
        abs(values[gram] - value) < 0.05 * value for gram, value in zip(_by_value(found, values), best, strict=True)
    )


def _by_value(grams: list[str], values: dict[str, float]) -> list[str]:
    return sorted(grams, key=lambda gram: -values[gram])


def test_parts_of_one_longer_substring_are_no_seeds() -> None:
    found = dict(seed_pieces(segments_of({"information": 5, "informal": 2}), 100, 100))
    assert found == {"▁informa": 7, "▁informal": 2, "▁information": 5}


def test_what_occurs_once_is_no_seed() -> None:
    assert list(seed_pieces(segments_of({"abcdef": 1}), 100, 100)) == []
    assert list(seed_pieces(aggregate([]), 100, 100)) == []


def test_a_sixth_is_taken_within_the_limits() -> None:
    words = {f"{first}{second}{third}": 2 for first in "abcdef" for second in "ghijkl" for third in "mnopqr"}
    everything = list(seed_pieces(segments_of(words), 10**6, 10**6))
    assert len(everything) > 200
    for least, most, expected in ((1, 10**6, len(everything) // 6), (100, 10**6, 100), (1, 20, 20)):
        assert len(list(seed_pieces(segments_of(words), least, most))) == expected
