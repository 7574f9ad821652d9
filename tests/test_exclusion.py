"""Documents that hold evaluation sentences: which files are read how, and what counts as holding one."""

from __future__ import annotations

import bz2
import gzip
import lzma
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.exclusion import EvaluationFiles, Exclusion, letters_of, load_exclusion
from pipeline.text import clean

SENTENCE = "The committee will meet again on Tuesday."
OTHER = "Das Komitee trifft sich am Dienstag wieder."


def load(*paths: Path) -> Exclusion:
    return load_exclusion(EvaluationFiles(tuple(map(str, paths))))


def letters_by_definition(text: str) -> str:
    """Casefolded letters, marks and digits; beyond the basic plane all but the pictographs."""
    return "".join(
        char
        for char in text.casefold()
        if (unicodedata.category(char)[0] in "LMN" if char < "\U00010000" else not "\U0001f000" <= char <= "\U0001faff")
    )


@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("İßSs.,–“。 १ि🙂𠀀"))))
def test_letters_are_what_they_say(text: str) -> None:
    assert letters_of(text).decode() == letters_by_definition(text)


WORDS = st.lists(st.sampled_from(["a", "B", "ab", "ß", "é", "字", ".", " ", "\n", "’", "🙂"]), max_size=60).map("".join)


@given(st.lists(WORDS, max_size=6), WORDS, st.data())
def test_a_document_is_excluded_if_and_only_if_it_contains_a_sentence(
    sentences: list[str], text: str, data: st.DataObject
) -> None:
    if sentences and data.draw(st.booleans()):
        text += data.draw(st.sampled_from(sentences)) + data.draw(WORDS)
    text = clean(text)
    wanted = [letters_by_definition(clean(sentence)) for sentence in sentences]
    telling = [letters for letters in wanted if len(letters) + letters.count("字") >= 20]
    exclusion = Exclusion(set(sentences))
    assert exclusion.holds_sentence(text) == any(letters in letters_by_definition(text) for letters in telling)
    assert exclusion.sentences == len(set(telling))
    assert exclusion.ignored == len(set(wanted) - set(telling) - {""})


@pytest.mark.parametrize(
    ("text", "held"),
    [
        pytest.param(SENTENCE, True, id="itself"),
        pytest.param(f"Before.\n{SENTENCE}\nAfter.", True, id="among others"),
        pytest.param("… THE COMMITTEE\nwill — meet again, on «Tuesday» …", True, id="case, spaces and punctuation"),
        pytest.param("The committee will meet again on Wednesday.", False, id="another day"),
        pytest.param("The committee will meet on Tuesday again.", False, id="another order"),
        pytest.param(SENTENCE[:-3], False, id="cut"),
        pytest.param("", False, id="empty"),
    ],
)
def test_case(text: str, held: bool) -> None:
    assert Exclusion({SENTENCE, OTHER}).holds_sentence(clean(text)) == held


def test_sentences_with_one_beginning_are_told_apart() -> None:
    beginning = "All of these sentences begin with the very same words, "
    exclusion = Exclusion({beginning + "one.", beginning + "two.", "one more sentence that ends like this"})
    assert exclusion.holds_sentence(beginning + "two!")
    assert not exclusion.holds_sentence(beginning + "three!")
    assert exclusion.holds_sentence("All of these sentences begin with the very " + beginning + "one")


def test_short_sentences_are_ignored_and_counted() -> None:
    exclusion = Exclusion(
        {"Yes, I do.", "He did not say anything at all.", "这句话说得够长了吧朋友", "太短了", "", "???"}
    )
    assert (exclusion.sentences, exclusion.ignored) == (2, 2)
    assert not exclusion.holds_sentence("Yes, I do.")


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("tsv", f"label\tpremise\thypothesis\n1\t{SENTENCE}\t{OTHER}\n"),
        ("jsonl", f'{{"id": 1, "pair": ["{SENTENCE}", {{"other": "{OTHER}"}}]}}\n\n'),
        ("txt", f"{SENTENCE}\r\n{OTHER}"),
    ],
)
def test_every_kind_of_file_and_compression(tmp_path: Path, kind: str, content: str, ending: str) -> None:
    path = tmp_path / f"evaluation.v1.{kind}{ending}"
    path.write_bytes(COMPRESSIONS[ending](content.encode()))
    exclusion = load(path)
    assert exclusion.sentences == 2
    assert exclusion.holds_sentence(SENTENCE)
    assert exclusion.holds_sentence(OTHER)


def test_files_are_read_once_and_together(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(SENTENCE)
    second.write_text(OTHER)
    exclusion = load(first, second)
    first.unlink()
    assert load(first, second) is exclusion
    assert exclusion.sentences == 2


def test_the_options_of_the_files_are_carried_and_not_shown() -> None:
    files = EvaluationFiles(("s3://bucket/a.txt",), {"s3": {"secret": "very-secret-value"}})
    assert "secret" not in repr(files)
    assert pickle.loads(pickle.dumps(files)).options == files.options


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", SENTENCE.encode(), "must be named .tsv, .jsonl or .txt"),
        ("a.txt.xz", SENTENCE.encode(), "not_xz"),
        ("a.txt.xz", lzma.compress(SENTENCE.encode())[:-20], "truncated_xz"),
        ("a.txt", SENTENCE.encode() + b"\xff", "invalid_utf8"),
        ("a.jsonl", f'{{"text": "{SENTENCE}"}}\n{{"text": '.encode(), "line 2 is no JSON"),
        ("a.txt", b"Yes.\nNo.\n", "no sentence of 20 letters"),
        ("missing.txt", None, "cannot be read: No such file"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        load(path)
    assert str(error.value).startswith(f"corpus.exclude: {path} ")


def test_a_password_in_a_url_is_not_shown() -> None:
    with pytest.raises(UserError) as error:
        load_exclusion(EvaluationFiles(("https://user:password@host.invalid/a.csv?token=1",)))
    assert "password" not in str(error.value)
    assert "token" not in str(error.value)


def test_xnli_is_found_where_it_is(shared_data: Path) -> None:
    exclusion = load(shared_data / "xnli" / "xnli.dev.tsv.xz")
    assert exclusion.sentences > 40_000
    with lzma.open(shared_data / "xnli" / "xnli.dev.tsv.xz", "rt", encoding="utf-8") as stream:
        rows = [line.split("\t") for line in stream][1::500]
    long = [premise for _, _, premise, *_ in rows if len(letters_of(clean(premise)).decode()) >= 20]
    assert len(long) > 50
    assert all(
        exclusion.holds_sentence(clean(f"Erstens. «{premise.replace(' ', '  – ')}» zweitens")) for premise in long
    )
    with lzma.open(shared_data / "cc100-sample" / "sw.txt.xz") as stream:
        documents = stream.read(1 << 20).decode(errors="ignore").split("\n\n")
    assert not any(exclusion.holds_sentence(clean(text)) for text in documents)
