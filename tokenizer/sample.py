"""A language-balanced sample of the corpus to train a vocabulary on, the same for the same corpus and config.

Every language gets a quota of text proportional to bytes ** alpha; what a small language cannot fill is shared out
among the others by the same rule. Because shards are ordered by content hash, the first documents of a language are a
uniform sample of it: the sample is a prefix of every language, and what follows it is held-out text.

A training sentence is one paragraph, which is one line of a document. SentencePiece drops sentences that are too long;
here they are cut instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_SENTENCE_BYTES = 4192  # SentencePiece's own default


def quotas(sizes: dict[str, int], alpha: float, budget: int) -> dict[str, int]:
    """Bytes to take of each language: min(size, level * size ** alpha), with the level that uses up the budget.

    A language runs out at level size ** (1 - alpha), the smallest first. So one pass in order of size, giving each its
    share of what is left, finds the level without searching: O(n log n) for n languages.

    Args:
        sizes: language -> bytes of text, all positive.
        budget: bytes wanted over all languages.
    """
    left, weights = min(budget, sum(sizes.values())), {name: size**alpha for name, size in sizes.items()}
    weight_left = sum(weights.values())
    found = {}
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        share = min(1.0, weights[name] / weight_left)
        found[name] = min(sizes[name], int(left * share))
        left -= found[name]
        weight_left -= weights[name]
    return {name: found[name] for name in sizes}


def shares(counts: dict[str, int]) -> dict[str, float]:
    """Each language's part of the total, rounded to six digits."""
    total = sum(counts.values())
    return {name: round(count / total, 6) for name, count in counts.items()}


@dataclass
class LanguageSample:
    """What was taken of one language: its first `documents`, of the last one perhaps only the beginning."""

    documents: int = 0
    sentences: int = 0
    text_bytes: int = 0

    def take(self, texts: Iterable[bytes], quota: int) -> Iterator[bytes]:
        """Yield sentences until they hold `quota` bytes, which the last one may exceed, and count them."""
        for text in texts:
            if self.text_bytes >= quota:
                return
            self.documents += 1
            for sentence in sentences(text):
                if self.text_bytes >= quota:
                    return
                self.sentences += 1
                self.text_bytes += len(sentence)
                yield sentence


def sentences(text: bytes) -> Iterator[bytes]:
    """The lines of a UTF-8 text, long ones in pieces of at most `MAX_SENTENCE_BYTES`."""
    for line in text.split(b"\n"):
        yield from _cut(line) if len(line) > MAX_SENTENCE_BYTES else [line]


def _cut(line: bytes) -> Iterator[bytes]:
    """Cut at the last space that fits; where a script has none, before the first character that does not fit."""
    start = 0
    while len(line) - start > MAX_SENTENCE_BYTES:
        limit = start + MAX_SENTENCE_BYTES
        end = line.rfind(b" ", start + 1, limit + 1)
        if end < 0:
            end = limit
            while line[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield line[start:end]
        start = end
    yield line[start:]
