"""The packaged demo data: small, well formed, balanced, and every file named with its licence in NOTICES.md."""

import csv
import lzma
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "pipeline" / "demo"
CORPUS = sorted((DEMO / "corpus").glob("*.txt.xz"))
LABELS = {"entailment", "neutral", "contradiction"}
XNLI_COLUMNS = ["language", "gold_label", "sentence1", "sentence2", "pairID", "genre"]
SCRIPTS = {
    "am": "ETHIOPIC", "ar": "ARABIC", "bg": "CYRILLIC", "de": "LATIN", "el": "GREEK", "en": "LATIN", "es": "LATIN",
    "fr": "LATIN", "he": "HEBREW", "hi": "DEVANAGARI", "id": "LATIN", "ja": "HIRAGANA", "ka": "GEORGIAN",
    "ko": "HANGUL", "pl": "LATIN", "ru": "CYRILLIC", "sw": "LATIN", "th": "THAI", "tr": "LATIN", "ur": "ARABIC",
    "vi": "LATIN", "yo": "LATIN", "zh-Hans": "CJK",
}  # fmt: skip
XNLI_LANGUAGES = {"ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh-Hans"}


def language(path: Path) -> str:
    return path.name.removesuffix(".txt.xz")


def read(path: Path) -> str:
    return lzma.decompress(path.read_bytes(), format=lzma.FORMAT_XZ).decode("utf-8")


def documents(path: Path) -> list[str]:
    return read(path).removesuffix("\n\n").split("\n\n")


def train_pairs() -> list[list[str]]:
    return [line.split("\t") for line in read(DEMO / "nli" / "train.tsv.xz").removesuffix("\n").split("\n")]


def xnli_pairs() -> list[dict[str, str]]:
    lines = read(DEMO / "nli" / "test.tsv.xz").removesuffix("\n").split("\n")
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True))


def notices_rows() -> dict[str, list[str]]:
    """Cells after the file name of every table row of NOTICES.md that starts with a file name."""
    rows = re.findall(r"^\| `([^`]+\.xz)` \|(.+)\|$", (DEMO / "NOTICES.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def normalised(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def test_total_size_is_under_3_mb() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 3_000_000


def test_corpus_covers_xnli_and_more() -> None:
    languages = {language(path) for path in CORPUS}
    assert languages == set(SCRIPTS)
    assert languages > XNLI_LANGUAGES


def test_corpus_is_skewed_with_english_on_top() -> None:
    sizes = {language(path): len(read(path).encode("utf-8")) for path in CORPUS}
    assert max(sizes, key=lambda name: sizes[name]) == "en"
    assert sizes["en"] > 20 * min(sizes.values())


@pytest.mark.parametrize("path", CORPUS, ids=language)
def test_corpus_file_has_cc100_layout(path: Path) -> None:
    text = read(path)
    assert text.endswith("\n\n")
    assert not text.startswith("\n")
    assert "\n\n\n" not in text
    assert not {char for char in text if unicodedata.category(char) == "Cc"} - {"\n"}
    assert "\ufffd" not in text
    assert all(line.strip() for document in documents(path) for line in document.split("\n"))


@pytest.mark.parametrize("path", CORPUS, ids=language)
def test_corpus_documents_are_distinct(path: Path) -> None:
    found = documents(path)
    assert len(set(found)) == len(found) >= 10


@pytest.mark.parametrize("path", CORPUS, ids=language)
def test_corpus_file_is_in_the_script_of_its_language(path: Path) -> None:
    letters = Counter(unicodedata.name(char, "?").split()[0] for char in read(path) if char.isalpha())
    assert letters.most_common(1)[0][0] == SCRIPTS[language(path)]


def test_nli_train_pairs_are_balanced() -> None:
    pairs = train_pairs()
    assert all(len(pair) == 3 and all(pair) for pair in pairs)
    assert Counter(label for _, _, label in pairs) == dict.fromkeys(LABELS, 1_000)


def test_nli_test_pairs_have_xnli_columns_and_are_balanced() -> None:
    pairs = xnli_pairs()
    assert all(list(pair) == XNLI_COLUMNS and all(pair.values()) for pair in pairs)
    assert Counter((pair["language"], pair["gold_label"]) for pair in pairs) == dict.fromkeys(
        [(name, label) for name in ("en", "id") for label in LABELS], 200
    )
    assert len({pair["pairID"] for pair in pairs}) == len(pairs)


def test_nli_train_and_test_share_no_premise() -> None:
    train = {normalised(premise) for premise, _, _ in train_pairs()}
    assert train.isdisjoint(normalised(pair["sentence1"]) for pair in xnli_pairs())


def test_notices_name_exactly_the_files_there_are() -> None:
    assert set(notices_rows()) == {path.relative_to(DEMO).as_posix() for path in DEMO.rglob("*.xz")}


@pytest.mark.parametrize("path", CORPUS, ids=language)
def test_notices_count_the_documents_and_bytes_of_each_file(path: Path) -> None:
    *counts, size = notices_rows()[f"corpus/{path.name}"][1:]
    assert sum(int(count or 0) for count in counts) == len(documents(path))
    assert int(size.replace(",", "")) == len(read(path).encode("utf-8"))
