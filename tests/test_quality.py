"""Reasons to drop a clean document: length, repeated lines, symbols."""

from __future__ import annotations

import lzma
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CorpusConfig
from pipeline.quality import drop_reason, repeated_line_share, symbol_share
from pipeline.text import clean

PROSE = "The old boat lay on the beach for years. Nobody knew whose it was, and nobody asked."
MENU = "Home\nProducts\nContact\n" * 8
CODE = '{"a": [1, 2, {"b": "!!!"}], "c": [[], {}, ()]};' * 10
NEVER = CorpusConfig(max_repeated_line_share=1.0, max_symbol_share=1.0)


def share_by_definition(text: str) -> float:
    """Characters in lines that occurred before / all characters in lines."""
    seen: set[str] = set()
    repeated = total = 0
    for line in text.split("\n"):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / total if total else 0.0


@given(st.lists(st.sampled_from(["", "a", "bb", "bb b", "行"]), min_size=5).map("\n".join))
def test_repeated_line_share_is_what_it_says(text: str) -> None:
    assert repeated_line_share(text) == pytest.approx(share_by_definition(text))


def test_a_few_lines_never_count_as_repeated() -> None:
    assert repeated_line_share("same\nsame\nsame\nsame") == 0.0
    assert repeated_line_share("same\nsame\nsame\nsame\nsame") == 0.8


@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("a.€🙂𠀀_ ١ि\u200d।，"))))
def test_symbol_share_is_what_it_says(text: str) -> None:
    symbols = sum(unicodedata.category(char)[0] in "PS" for char in text)
    assert symbol_share(text) == pytest.approx(symbols / max(1, len(text)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "empty", id="empty"),
        pytest.param("short", "too_short", id="too short"),
        pytest.param("long " * 1000, "too_long", id="too long"),
        pytest.param("." * 5000, "too_long", id="length comes first"),
        pytest.param("-----\n" * 20 + "-----", "repeated_lines", id="repetition comes before symbols"),
        pytest.param(MENU, "repeated_lines", id="menu"),
        pytest.param(CODE, "symbols", id="code"),
        pytest.param("=== " * 50, "symbols", id="rules"),
        pytest.param("🙂🎉❤️ " * 50, "symbols", id="pictographs"),
        pytest.param(PROSE, None, id="prose"),
        pytest.param("\n".join(f"{n}. {PROSE}" for n in range(20)), None, id="a list of different lines"),
        pytest.param("Refrain, refrain!\nOne verse.\nRefrain, refrain!\nAnother verse.", None, id="short verses"),
        pytest.param("ฝนตกตลอดทั้งคืน เราจึงอยู่บ้าน " * 5, None, id="Thai marks are no symbols"),
        pytest.param("बारिश हुई, इसलिए हम घर पर रहे। " * 5, None, id="Devanagari marks are no symbols"),
        pytest.param("می\u200cخواهم کتاب\u200cها را بخوانم. " * 5, None, id="joiners are no symbols"),
    ],
)
def test_reason(text: str, reason: str | None) -> None:
    assert drop_reason(text, CorpusConfig(min_chars=20, max_chars=4000)) == reason


def with_symbols(letters: str, share: float) -> str:
    """A hundred letters and as many full stops as make up the share."""
    text = (letters * 100)[:100]
    return text + "." * round(100 * share / (1 - share))


LIMITS = {
    **dict.fromkeys(["letter", "Буква", "अक्षर", "حروف"], 0.25),
    **dict.fromkeys(["อักษรไทย", "ຕົວອັກສອນ", "ខ្មែរ", "မြန်မာ"], 0.20),
    **dict.fromkeys(["汉字", "ひらカタ", "한글"], 0.35),
}


@pytest.mark.parametrize(("letters", "limit"), LIMITS.items())
def test_each_script_has_its_limit_of_symbols(letters: str, limit: float) -> None:
    assert drop_reason(with_symbols(letters, limit - 0.03), CorpusConfig()) is None
    assert drop_reason(with_symbols(letters, limit + 0.03), CorpusConfig()) == "symbols"


def test_configured_limits_take_the_place_of_the_defaults() -> None:
    third = "one\n" * 2 + "two\nthree\nfour\nfive\n" + "one\n" * 2 + "six"
    assert drop_reason(third, CorpusConfig()) is None
    assert drop_reason(third, CorpusConfig(max_repeated_line_share=0.2)) == "repeated_lines"
    assert drop_reason(PROSE, CorpusConfig(max_symbol_share=0.01)) == "symbols"
    assert drop_reason(PROSE, CorpusConfig(max_symbol_share=0.0)) == "symbols"
    assert drop_reason(MENU, NEVER) is None
    assert drop_reason(CODE, NEVER) is None
    assert drop_reason("." * 500, NEVER) is None


def test_a_share_at_the_limit_is_kept() -> None:
    assert drop_reason("abc.", CorpusConfig(max_symbol_share=0.25)) is None
    assert drop_reason("abc..", CorpusConfig(max_symbol_share=0.25)) == "symbols"


def test_symbols_are_found_in_the_middle_of_a_long_document() -> None:
    letters = "Some letters and a few words more of them. " * 500
    assert drop_reason(letters + "#" * len(letters) + letters, CorpusConfig()) == "symbols"
    assert drop_reason(letters + "#" * 100 + letters, CorpusConfig()) is None


@pytest.mark.parametrize("language", ["en", "ru", "hi", "th", "zh-Hans", "ja", "ko", "ar", "km"])
def test_documents_of_the_web_are_kept(shared_data: Path, language: str) -> None:
    with lzma.open(shared_data / "cc100-sample" / f"{language}.txt.xz") as stream:
        documents = stream.read(1 << 22).decode(errors="ignore").split("\n\n")
    texts = [text for document in documents if (text := clean(document))]
    dropped = [text for text in texts if drop_reason(text, CorpusConfig())]
    assert len(dropped) <= 0.02 * len(texts)
