"""Segments: no text is lost, they are what a slow reading gives, and no valid piece crosses a border."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import aggregate as aggregation
from tokenizer.aggregate import Segments, aggregate, cut
from tokenizer.scripts import SCRIPTS, count_by_script, main_script

CLASSES = {"a": "L", "é": "L", "я": "C", "字": "H", "か": "H", "ー": "H", "7": "N", ".": "N", "\u0301": "I", "▁": "S"}
TEXTS = st.lists(st.text(st.sampled_from([*CLASSES, " "]), max_size=30), max_size=12)


def slowly(sentences: list[str]) -> Counter[str]:
    """Segments by a regular expression over the class of each character."""
    found: Counter[str] = Counter()
    for sentence in sentences:
        for word in sentence.split():
            text = "▁" + word
            classes = "".join(CLASSES[character] for character in text)
            for match in re.finditer(r"S?(L|C|H|N|I)?(?:(?<=I).|I|\1)*", classes):
                found[text[match.start() : match.end()]] += match.end() > match.start()
    return +found


def counted(segments: Segments) -> dict[str, int]:
    return {text.decode(): int(n) for text, n in zip(segments.texts.to_pylist(), segments.counts, strict=True)}


@settings(deadline=None)
@given(TEXTS)
def test_segments_are_those_of_a_slow_reading(sentences: list[str]) -> None:
    sentences = [sentence.replace("\u0301", "") for sentence in sentences]
    assert counted(aggregate(sentence.encode() for sentence in sentences)) == slowly(sentences)


@settings(deadline=None)
@given(TEXTS)
def test_no_character_is_lost_or_added(sentences: list[str]) -> None:
    segments = counted(aggregate(sentence.encode() for sentence in sentences))
    found: Counter[str] = Counter()
    for text, number in segments.items():
        found.update({character: number for character in text} | {c: text.count(c) * number for c in set(text)})
    assert found == Counter("".join("▁" + word for sentence in sentences for word in sentence.split()))


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("two words", ["▁two", "▁words"]),
        ("  more \t spaces\r\n", ["▁more", "▁spaces"]),
        ("COVID-19,", ["▁COVID", "-19,"]),
        ("東京タワーへ", ["▁東京タワーへ"]),
        ("abcжде", ["▁abc", "жде"]),
        ("e\u0301te\u0301", ["▁e\u0301te\u0301"]),
        ("a\u0301я", ["▁a\u0301я"]),  # an accent goes with both sides: "\u0301я" would be a valid piece
        ("x▅y", ["▁x", "▅", "y"]),
        ("", []),
    ],
)
def test_borders_are_at_spaces_and_between_scripts(text: str, segments: list[str]) -> None:
    assert [segment.decode() for segment in cut([text.encode()]).to_pylist()] == segments


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [f"sentence {number % 7} of {number % 11} words".encode() for number in range(500)]
    whole = aggregate(sentences)
    monkeypatch.setattr(aggregation, "BATCH_BYTES", 100)
    assert aggregate(sentences).texts.equals(whole.texts)
    assert aggregate(sentences).counts.tolist() == whole.counts.tolist()


def test_sentencepiece_itself_makes_no_piece_across_a_border() -> None:
    """Its own training on raw text, with every mixture of scripts frequent, obeys the borders that are cut at."""
    runs = ["abc", "2024", "東京タワー", "жде", "कखग", "ελλ", "--", "ไทย", "e\u0301a", "한글"]
    lines = [first + second + " " + second + third for first in runs for second in runs for third in runs]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=200, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity",
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(number) for number in range(3, len(processor))]
    assert {"abc", "東京タワー", "▁жде", "2024"} <= set(pieces)
    for piece in pieces:
        assert len(cut([piece.lstrip("▁").encode()])) <= 1, piece


def test_texts_are_in_the_script_of_most_of_their_letters() -> None:
    assert main_script("Привет, Tom! 12345 67890") == "Cyrillic"
    assert main_script("日本語とひらがなをひらく") == "Hiragana"
    assert main_script("123 ...") == "Common"
    assert main_script("\U0010ffff\U0010ffff") == "Unknown"
    assert count_by_script(["▁the", "ing", "▁", "12", "на", "字"]) == {"Common": 2, "Latin": 2, "Cyrillic": 1, "Han": 1}
    assert len(set(SCRIPTS)) == len(SCRIPTS)
