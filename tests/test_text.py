"""Decoding, cleaning, the length filter and the content hash of one document."""

from __future__ import annotations

import lzma
import pickle
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.text import Rejected, clean, content_hash, decode, keep, shows_mojibake

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "cc100-sample"

# Line ends, spaces, invisible characters, marks of several classes, characters that compose, decompose into two marks
# or may not be composed again, Hangul, unassigned, private use, a surrogate, emoji.
TRICKY = (
    "ab \t\n\r\v\f\x00\x1c\x1f\x7f\x85\xa0\xad\u2028\u2029\u3000\u200b\u200c\u200d\u200e\u2060\ufeff\u202e\u034f"
    "e\u0301\u0327\u0344\u0308\u0958\u093c\u0915\u1100\u1161\u11a8\uac00\ufb2c\u05c1\U0001d15f\U0001d165\U0001d16d"
    "\u0378\ufffe\ue000\ud800\U0010ffff\U000e0041\U0001f468\ufe0f\u180e\u0600\u1fef\u2126"
)
ANY_TEXT = st.text(st.one_of(st.sampled_from(TRICKY), st.characters(exclude_categories=())))
MARKS = st.text(st.sampled_from("\u0301\u0327\u0344\u0315\u0f73\U0001d165\U0001d16d\U0001e8d0\u200b"), max_size=80)

INVISIBLE_BUT_KEPT = set("\u200c\u200d\u180e\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2") | {
    chr(code) for code in (0x110BD, 0x110CD, *range(0x13430, 0x13440))
}


def clean_by_definition(text: str) -> str:
    """What `clean` promises, one step after the other, for text without long runs of marks."""
    text = re.sub("\r\n|[\n\r\v\f\x85\u2028\u2029]", "\n", text)
    text = "".join(" " if unicodedata.category(char) == "Zs" or char == "\t" else char for char in text)
    text = "".join(
        char
        for char in text
        if char == "\n" or unicodedata.category(char)[0] != "C" or char in INVISIBLE_BUT_KEPT
    )  # fmt: skip
    lines = [" ".join(filter(None, line.split(" "))) for line in unicodedata.normalize("NFC", text).split("\n")]
    return "\n".join(filter(None, lines))


@given(ANY_TEXT)
@example("a\u200b\u0301")
@example("\r\n \r\n")
def test_clean_does_what_it_promises(text: str) -> None:
    assert clean(text) == clean_by_definition(text)


@given(st.lists(st.one_of(ANY_TEXT, MARKS)).map("".join))
def test_clean_text_is_clean(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not re.search("[\t\r]|  | \n|\n |\n\n", once)
    assert once == once.strip()
    once.encode()


@given(st.sampled_from(["a", "\u1100", "\u05e9", "", "\U0001f468"]), MARKS, st.sampled_from(["b", "\u1161", "", "\n"]))
def test_a_run_of_marks_has_thirty_at_most(before: str, marks: str, after: str) -> None:
    run = 0
    for char in clean(before + marks + after):
        run = run + 1 if unicodedata.combining(char) else 0
        assert run <= 30


def test_the_thirty_first_mark_is_cut_wherever_it_stands() -> None:
    for before in range(20):
        assert clean("e" * before + "x" + "\u0327" * 31 + "e" * 20) == "e" * before + "x" + "\u0327" * 30 + "e" * 20


def test_a_million_unsorted_marks_take_no_quadratic_time() -> None:
    bomb = "a" + "\u0301\u0327" * 500_000  # ten minutes in unicodedata.normalize
    assert unicodedata.normalize("NFD", clean(bomb)) == "a" + "\u0327" * 15 + "\u0301" * 15


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("one\r\ntwo\rthree\n\nfour", "one\ntwo\nthree\nfour", id="every line end"),
        pytest.param("a\u2028b\u2029c\x85d\ve\ff", "a\nb\nc\nd\ne\nf", id="pseudo-newlines are line ends"),
        pytest.param("a\x1cb\x1db\x1ec\x1fd", "abbcd", id="str.splitlines' other line ends are control characters"),
        pytest.param(" a \t b\xa0\u3000c \n\t\n", "a b c", id="white space"),
        pytest.param("a\x00b\x07\x1b[31m", "ab[31m", id="NUL and terminal escapes"),
        pytest.param(" \u200b\n\u202e\u2066\ufeff\t\u3000", "", id="only white space, ZWSP and bidi controls"),
        pytest.param("\ufeffso\xadft\ufeff", "soft", id="BOM inside and soft hyphen"),
        pytest.param("a\ue000b\u0378c\U0010fffe\ud83dd", "abcd", id="private, unassigned, non-character, surrogate"),
        pytest.param("می\u200cخواهم क्\u200dष", "می\u200cخواهم क्\u200dष", id="ZWNJ and ZWJ are spelling"),
        pytest.param("👩\u200d👩\u200d👧 ❤\ufe0f", "👩\u200d👩\u200d👧 ❤\ufe0f", id="emoji sequences stay"),
        pytest.param("e\u0301 \u212b \u1100\u1161", "é Å 가", id="NFC"),
        pytest.param("ﬁ ① ｱ Ａ", "ﬁ ① ｱ Ａ", id="compatibility characters are not NFC's matter"),
        pytest.param("[MASK] <s> ▁ a\tb", "[MASK] <s> ▁ a b", id="special pieces are plain text, a tab is a space"),
        pytest.param("donâ€™t", "donâ€™t", id="mojibake stays unless asked for"),
        pytest.param("Привет hello 你好 سلام", "Привет hello 你好 سلام", id="mixed scripts stay"),
        pytest.param("\ufffd", "\ufffd", id="a replacement character is text"),
    ],
)
def test_clean_case(text: str, expected: str) -> None:
    assert clean(text) == expected


SENTENCES = {
    "cs": "Příliš žluťoučký kůň úpěl ďábelské ódy, a nikdo ho neslyšel.",
    "de": "Die Straße führt über die Brücke; dann heißt es: „Mach’s gut“.",
    "es": "¿Dónde está el niño? Mañana iremos «todos» a la montaña.",
    "fr": "L’été dernier, nous avons dîné à l’hôtel – c’était très réussi…",
    "hu": "Az őszi ködben eltűnt a vízügyi kutatóhajó, írták az újságok.",
    "pl": "Dziś wieczorem źle się czułem, więc wcześniej położyłem się spać.",
    "tr": "Çocuklar ağacın altında gülüşüyor, kuşlar da onlara eşlik ediyordu.",
    "vi": "Trời hôm nay đẹp quá, chúng tôi đi dạo quanh hồ với bạn bè.",
    "el": "Το πρωί ήπιαμε καφέ στην αυλή και μιλήσαμε για το ταξίδι.",
    "ru": "Сегодня утром шёл дождь, и мы остались дома пить чай.",
    "uk": "Їжак під’їхав до ґанку й тихо заснув на сонці.",
    "he": "בבוקר ירד גשם ולכן נשארנו בבית ושתינו תה.",
    "ar": "هطل المطر صباحا فبقينا في البيت نشرب الشاي.",
    "hi": "आज सुबह बारिश हुई, इसलिए हम घर पर चाय पीते रहे।",
    "th": "เช้านี้ฝนตก เราจึงอยู่บ้านดื่มชากัน",
    "ja": "今朝は雨が降ったので、家でお茶を飲んでいました。",
    "ko": "오늘 아침에 비가 와서 집에서 차를 마셨습니다.",
    "zh": "今天早上下雨，所以我们留在家里喝茶。",
}


def misread(text: str, encoding: str) -> str:
    """UTF-8 read in a single-byte encoding, as browsers do: a byte that it leaves undefined is a control character."""
    return "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode())


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("language", SENTENCES)
def test_a_misread_text_is_restored_in_every_alphabet(language: str, encoding: str) -> None:
    text = SENTENCES[language]
    broken = misread(text, encoding)
    assert shows_mojibake(broken.encode())
    assert clean(f"{text}\n{broken}\nplain", fix_mojibake=True) == f"{text}\n{text}\nplain"
    assert clean(misread(broken, encoding), fix_mojibake=True) == text


@pytest.mark.parametrize(
    ("language", "encoding"),
    [
        ("ru", "cp1251"),
        ("uk", "cp1251"),
        ("cs", "cp1250"),
        ("tr", "cp1254"),
        ("el", "cp1253"),
        ("ar", "mac_roman"),
        ("hu", "cp437"),
        ("ru", "cp437"),
    ],
)
def test_a_text_misread_in_another_code_page_is_restored(language: str, encoding: str) -> None:
    assert clean(misread(SENTENCES[language], encoding), fix_mojibake=True) == SENTENCES[language]


@pytest.mark.parametrize("language", SENTENCES)
def test_a_correct_text_is_no_mojibake(language: str) -> None:
    text = SENTENCES[language]
    assert not shows_mojibake(text.encode())
    assert not shows_mojibake(text.upper().encode())
    assert clean(text, fix_mojibake=True) == clean(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("donâ€™t", "don’t", id="one quote"),
        pytest.param("من كرامÃ©ر", "من كرامéر", id="inside another alphabet"),
        pytest.param("ï»¿word", "word", id="a byte order mark goes"),
        pytest.param("cafÃ©\u0301", "caf\u00e9\u0301", id="what is repaired is composed"),
        pytest.param("Ã\x00©", "é", id="a control character inside"),
        pytest.param("A\u0303©", "é", id="decomposed mojibake"),
        pytest.param("er aß“ und „saß”, GRÜß–", "er aß“ und „saß”, GRÜß–", id="a letter before a quotation mark"),
        pytest.param("À LA CARTE… NÃO É “SÓ” ISSO", "À LA CARTE… NÃO É “SÓ” ISSO", id="capitals with accents"),
        pytest.param(
            "“quoted” ‘text’ – ½ ﬁ &amp; ＡＢ", "“quoted” ‘text’ – ½ ﬁ &amp; ＡＢ", id="nothing else is fixed"
        ),
        pytest.param("c\x85d", "c\nd", id="NEL is a line end"),
        pytest.param("itвЂ™s a testвЂ”yes", "it’s a test—yes", id="quotes read as Cyrillic"),
        pytest.param("├── a\n│   └── é", "├── a\n│ └── é", id="a tree of frames"),
        pytest.param("20 °С, №·5, С°", "20 °С, №·5, С°", id="degrees in Cyrillic"),
    ],
)
def test_mojibake_case(text: str, expected: str) -> None:
    assert clean(text, fix_mojibake=True) == expected


MOJIBAKE = st.lists(
    st.one_of(
        st.sampled_from(list(SENTENCES.values())).map(lambda text: misread(text, "cp1252")),
        st.text("ÃÂâ€™ðŸ©\xa0\xad\x80‹ Рв°Ђ\x00\n\u0303aA"),
        ANY_TEXT,
    )
).map("".join)


@given(MOJIBAKE)
@example("â" + "â€‹" + "€‹")
def test_repaired_text_is_clean(text: str) -> None:
    try:
        once = clean(text, fix_mojibake=True)
    except Rejected as rejected:
        assert rejected.reason == "nested_mojibake"
        return
    assert clean(once, fix_mojibake=True) == once
    assert clean(once) == once


@pytest.mark.parametrize("bomb", ["Â" * 200_000 + "©", "â" * 100_000 + "€‹" * 100_000])
def test_endlessly_nested_mojibake_is_rejected_in_linear_time(bomb: str) -> None:
    with pytest.raises(Rejected, match="nested_mojibake"):
        clean(bomb, fix_mojibake=True)


def test_a_long_line_of_mojibake_takes_no_quadratic_time() -> None:
    assert clean("Ã©" * 200_000 + " ж", fix_mojibake=True) == "é" * 200_000 + " ж"


@pytest.mark.parametrize("language", ["de", "pt", "ru", "hi", "zh-Hans"])
def test_correct_documents_of_the_web_are_left_as_they_are(shared_data: Path, language: str) -> None:
    with lzma.open(shared_data / "cc100-sample" / f"{language}.txt.xz") as stream:
        text = stream.read(1 << 21).decode(errors="ignore")
    assert clean(text, fix_mojibake=True) == clean(text)


@pytest.mark.parametrize("language", ["en", "ru", "th", "zh-Hans", "hi", "fa", "vi", "ko", "my", "he"])
def test_clean_keeps_every_letter_of_real_text(language: str) -> None:
    path = SAMPLE / f"{language}.txt.xz"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    with lzma.open(path) as stream:
        text = decode(b"".join(stream.readlines(1 << 20)))
    cleaned = clean(text)
    assert clean(cleaned) == cleaned

    def letters(text: str) -> list[str]:
        return [char for char in text if unicodedata.category(char)[0] in "LNPSM"]

    assert letters(cleaned) == letters(unicodedata.normalize("NFC", re.sub("[\u200b\ufeff\xad\u2060]", "", text)))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"good \xff bad", "invalid_utf8", id="invalid byte in a line"),
        pytest.param("naïve".encode()[:3], "invalid_utf8", id="cut last character"),
        pytest.param(b"a\xc0\xafb", "invalid_utf8", id="overlong"),
        pytest.param(b"\xed\xa0\xbd\xed\xb8\x80", "invalid_utf8", id="CESU-8 surrogates"),
        pytest.param(b"\xf4\x90\x80\x80", "invalid_utf8", id="beyond U+10FFFF"),
        pytest.param("latin".encode("utf-16-le"), "control_bytes", id="UTF-16 without BOM"),
        pytest.param("Москва слезам не верит".encode("utf-16-be"), "control_bytes", id="Cyrillic UTF-16 without BOM"),
        pytest.param("ภาษาไทย".encode("utf-16-le"), "control_bytes", id="Thai UTF-16 without BOM"),
        pytest.param(b"\0" * 100, "control_bytes", id="zeros"),
    ],
)
def test_decode_rejects(raw: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as rejected:
        decode(raw)
    assert rejected.value.reason == reason


def test_decode_accepts() -> None:
    assert decode(b"") == ""
    assert decode("naïve 你好 🎉".encode()) == "naïve 你好 🎉"
    assert decode(b"\xef\xbb\xbfafter a BOM") == "after a BOM"
    assert clean(decode(b"one stray \0 among many letters")) == "one stray among many letters"


@given(st.binary())
def test_decode_gives_text_or_a_reason(raw: bytes) -> None:
    try:
        assert decode(raw).encode() == raw.removeprefix(b"\xef\xbb\xbf")
    except Rejected as rejected:
        assert rejected.reason in {"invalid_utf8", "control_bytes"}


def test_rejected_survives_pickling() -> None:
    rejected = pickle.loads(pickle.dumps(Rejected("invalid_utf8", "at byte 3")))
    assert (rejected.reason, rejected.detail, str(rejected)) == ("invalid_utf8", "at byte 3", "invalid_utf8: at byte 3")


def test_keep() -> None:
    verdicts = {text: keep(text, min_chars=2, max_chars=3) for text in ("", "你", "你好", "abc", "abcd")}
    assert verdicts == {"": "empty", "你": "too_short", "你好": None, "abc": None, "abcd": "too_long"}


def test_content_hash_is_canonical_xxh3_128() -> None:
    assert content_hash("").hex() == "99aa06d3014798d86001c324468d497f"
    assert content_hash(clean("one\r\n two ")) == content_hash(clean("\ufeffone\ntwo"))
    assert content_hash("one") != content_hash("two")
