"""Reading NLI files: every layout, label and language users have, and a sentence with the place of what is wrong."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from model.nli_data import NO_LABEL, EncodedPairs, Pair, encode, is_english, language_in_name, read_pairs
from pipeline.errors import UserError

HEADER = "language\tgold_label\tsentence1\tsentence2\tpairID\n"
PACK = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


def read(path: Path, content: str | bytes) -> list[Pair]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_pairs(str(path), {}))


@pytest.mark.parametrize("ending", PACK)
def test_both_layouts_in_every_compression(tmp_path: Path, ending: str) -> None:
    rows = 'sw\tneutral\tHe said "ja.\tYes"\t1\nzh-Hans\tcontradiction\t它在\t它不在\t2\n'
    pairs = read(tmp_path / f"xnli.dev.tsv{ending}", PACK[ending]((HEADER + rows).encode()))
    assert pairs[0] == Pair("sw", 'He said "ja.', 'Yes"', 1, f"xnli.dev.tsv{ending}", 2)
    assert (pairs[1].language, pairs[1].premise, pairs[1].label, pairs[1].line) == ("zh-Hans", "它在", 2, 3)
    plain = read(tmp_path / f"train.es.tsv{ending}", PACK[ending](b"uno\tdos\tentailment\ntres\tcuatro\t1\n"))
    assert [(p.language, p.premise, p.hypothesis, p.label, p.line) for p in plain] == [
        ("es", "uno", "dos", 0, 1),
        ("es", "tres", "cuatro", 1, 2),
    ]


def test_columns_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    translated = read(tmp_path / "multinli.train.ar.tsv", "premise\thypo\tlabel\na\tb\tcontradictory\n")
    assert translated == [Pair("ar", "a", "b", 2, "multinli.train.ar.tsv", 2)]
    shuffled = read(tmp_path / "x.tsv", "sentence2\tgenre\tgold_label\tlanguage\tsentence1\nh\tg\t0\tur\tp\n")
    assert shuffled == [Pair("ur", "p", "h", 0, "x.tsv", 2)]


def test_pairs_without_gold_label_are_told_apart(tmp_path: Path) -> None:
    pairs = read(tmp_path / "x.tsv", HEADER + "en\t-\ta\tb\t1\nen\tneutral\ta\tb\t2\n")
    assert [pair.label for pair in pairs] == [NO_LABEL, 1]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    text = "\ufeffa\u2028b\x85c\td\x0be\tneutral\r\n\nf\tg\th\tneutral"
    with pytest.raises(UserError, match=r"x.tsv, line 3: there is a tab too many \(4 of 3 columns\)"):
        read(tmp_path / "x.tsv", text)
    pairs = read(tmp_path / "x.tsv", text.replace("\th", ""))
    assert [(p.premise, p.hypothesis) for p in pairs] == [("a\u2028b\x85c", "d\x0be"), ("f", "g")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "language\tsentence1\tsentence2\nen\ta\tb\n", "x.tsv, line 1: column gold_label is missing"),
        ("x.tsv", HEADER + "en\tneutral\ta\n", r"x.tsv, line 2: column sentence2 is missing \(3 of 5 columns\)"),
        ("x.tsv", HEADER + "en\tmaybe\ta\tb\t1\n", "x.tsv, line 2, column gold_label: unknown label 'maybe'"),
        ("x.tsv", "a\tb\t-1\n", "x.tsv, line 1, column label: unknown label '-1'"),
        ("x.tsv", "a\tb\t3\n", "unknown label '3'"),
        ("x.tsv", "a,b,neutral\n", "x.tsv, line 1: column hypothesis is missing"),
        ("x.tsv", HEADER + "../en\tneutral\ta\tb\t1\n", "line 2, column language: '../en' is not a language code"),
        ("x.tsv", b"a\tb\tneutral\na\tb\xff\tneutral\n", "x.tsv, line 2: its byte 3 is not UTF-8"),
        ("x.tsv.xz", b"a\tb\tneutral\n", "x.tsv.xz, after line 0: cannot be read"),
        ("x.tsv.xz", gzip.compress(b"a\tb\tneutral\n", mtime=0), "the content is gz"),
        ("x.tsv.xz", lzma.compress(b"a\tb\tneutral\n" * 9)[:-30], "x.tsv.xz, after line [0-9]: cannot be read"),
        ("x.tsv", b"a" * 3_000_000, "cannot be read .line_too_long"),
        ("x.tsv.xz", lzma.compress(bytes(100_000_000), preset=0), "cannot be read"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("multinli.train.ar.tsv", "ar"),
        ("esxnli-es-2k.tsv.xz", "es"),
        ("snli-cad-en-10k.tsv.xz", "en"),
        ("train_zh_Hans.tsv", "zh"),
        ("train.tsv", "en"),
        ("multinli_1.0_train.txt", "en"),
    ],
)
def test_language_of_a_file_name(name: str, language: str) -> None:
    assert language_in_name(name) == language


def test_english_of_any_region_is_english() -> None:
    assert [code for code in ("en", "en-GB", "en_US", "eng", "es", "enm") if is_english(code)] == [
        "en",
        "en-GB",
        "en_US",
        "eng",
    ]


# ------------------------------------------------------------------------------------------------------------- encoding


def letters(premises: list[str], hypotheses: list[str], max_length: int, truncation: bool) -> dict[str, Any]:
    """A tokenizer of one id a letter."""
    texts = [f"{a}|{b}" for a, b in zip(premises, hypotheses, strict=True)]
    return {"input_ids": [[ord(c) for c in text[:max_length]] for text in texts]}


def encoded(words: list[str], seed: int = 1) -> EncodedPairs:
    pairs = [Pair("en", word, "x", i % 3, "f", i) for i, word in enumerate(words)]
    return encode(iter(pairs), letters, 10, seed)


def words(data: EncodedPairs) -> list[str]:
    return ["".join(map(chr, data.ids[data.starts[i] : data.starts[i + 1]])) for i in range(len(data))]


def test_encoded_pairs_keep_every_id() -> None:
    many = [f"word{i}" for i in range(2500)]
    data = encoded(many)
    assert words(data) == [f"{word}|x"[:10] for word in many]
    assert data.lengths.tolist() == [len(word) for word in words(data)]
    assert words(data.take(np.array([7, 3]))) == ["word7|x", "word3|x"]
    assert len(encoded([])) == 0


def test_shuffle_depends_on_content_and_seed_alone() -> None:
    forth, back = encoded(["a", "b", "c", "d", "e", "f"]), encoded(["f", "e", "d", "c", "b", "a"])
    assert words(forth.shuffled()) == words(back.shuffled())
    assert words(forth.shuffled(2)) == words(forth.shuffled())[:2]
    orders = {tuple(words(encoded(["a", "b", "c", "d", "e", "f"], seed).shuffled())) for seed in range(-10, 10)}
    assert len(orders) > 10


def test_real_xnli_dev(shared_data: Path) -> None:
    pairs = list(read_pairs(str(shared_data / "xnli" / "xnli.dev.tsv.xz"), {}))
    assert Counter(Counter(pair.language for pair in pairs).values()) == {2490: 15}
    assert Counter(pair.label for pair in pairs) == dict.fromkeys(range(3), 12450)


def test_real_training_files(shared_data: Path) -> None:
    files = sorted((shared_data / "xnli" / "train").glob("*.tsv.xz"))
    counts = Counter(pair.language for path in files for pair in read_pairs(str(path), {}))
    assert counts == {"en": 59_704, "es": 2_490, "id": 12_520}
