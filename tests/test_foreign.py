"""Vocabularies made elsewhere: taken as transformers reads them, refused with a reason, measured beside others."""

from __future__ import annotations

import io
import json
import lzma
import shutil
import unicodedata
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from html_page import Page
from support import tree
from tokenizing import DEMO, committed, conf, copy_stages

from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.report import render
from tokenizer import pieces, wire
from tokenizer.foreign import adopted

SPECIAL = {
    **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    **{"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
}
LANGUAGES = ("en", "de", "th", "ar", "hi")


def lines() -> list[str]:
    texts = [lzma.decompress((DEMO / f"{name}.txt.xz").read_bytes()).decode() for name in LANGUAGES]
    return [line[:400] for text in texts for line in text.split("\n")[:300] if line]


def spm(**options: Any) -> bytes:
    """A model as others train it: with NFKC, symbols of their own, and scores as they come."""
    model = io.BytesIO()
    settings = {"vocab_size": 3000, "user_defined_symbols": ["<extra_id_0>"], **SPECIAL, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_writer=model, minloglevel=2, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return spm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Path:
    """A work directory with the packaged text's corpus, and tokenizers of others beside it."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "other.model").write_bytes(model)
    committed(config(folder / "work"), "corpus")
    return folder


@pytest.fixture(scope="module")
def vocab(folder: Path) -> Artifact:
    return committed(config(folder / "work", f"vocab.from={folder}/other.model"), "vocab")


def config(work: Path, *overrides: str) -> Config:
    return conf(work, f"{DEMO}/*.txt.xz", "vocab.size=3000", "vocab.sample_mb=0.4", *overrides)


# Taken


def test_ids_in_transformers_are_those_of_the_published_model(vocab: Artifact) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(vocab.folder.url)
    processor = sentencepiece.SentencePieceProcessor(model_file=vocab.folder.path("spm.model"))
    texts = [unicodedata.normalize("NFC", " ".join(line.split())) for line in lines()] + [
        "ＡＢＣ ﬁne <extra_id_0> x<extra_id_0>"
    ]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == processor.encode(texts)
    assert len(tokenizer) == len(processor) + 1 == 3001


def test_pieces_keep_their_ids_and_scores(vocab: Artifact, model: bytes) -> None:
    given, taken = (pieces.scored_pieces(pieces.load(data)) for data in (model, vocab.folder.read("spm.model")))
    assert [piece for piece, _ in given] == [piece for piece, _ in taken]
    assert max(abs(old - new) for (_, old), (_, new) in zip(given, taken, strict=True)) <= 1 / 512


def test_the_report_says_where_it_is_from_and_no_more(folder: Path, vocab: Artifact) -> None:
    report = json.loads(vocab.folder.read("vocab_report.json"))
    assert report["origin"]["file"] == "other.model"
    assert len(report["origin"]["sha256"]) == 64
    assert all(set(shares) == {"share_before"} for shares in report["sampling"].values())
    assert report["languages"]["en"]["fertility"] > 1
    for name in tree(Path(vocab.folder.url)):
        assert str(folder).encode() not in vocab.folder.read(name)
    page = Page(render(config(folder / "work", f"vocab.from={folder}/other.model")))
    assert "Taken from other.model, sha256" in page.text


def test_another_size_is_said_to_be_unused(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = copy_stages(folder / "work", tmp_path / "work", "corpus")
    committed(config(work, f"vocab.from={folder}/other.model", "vocab.size=5000"), "vocab")
    assert "other.model has 3000 pieces; vocab.size 5000 is not used" in caplog.text


# Refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "bpe"}, "it is a BPE model and only unigram models are read"),
        ({"byte_fallback": True}, "it falls back to bytes"),
        ({"add_dummy_prefix": False}, "it begins a text without a space"),
        ({"treat_whitespace_as_suffix": True}, "it marks spaces behind words"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "its normaliser nmt_nfkc_cf changes text more"),
        ({"user_defined_symbols": ["[MASK]"]}, r"has \[MASK\] as a piece"),
        (
            {"pad_piece": "<pad>", "bos_id": -1, "eos_id": 1, "unk_id": 2, "eos_piece": "</s>", "unk_piece": "<unk>"},
            r"begins with the pieces <pad> </s> <unk> .*, and a DeBERTa vocabulary with \[PAD\] \[CLS\]",
        ),
    ],
)
def test_what_transformers_reads_otherwise_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"vocab.from: x.model:? {reason}"):
        adopted(spm(**options), "x.model")


@pytest.mark.parametrize("data", [b"", b"no model at all", b"\x0a\xff\xff\xff\xff\x0f", b"{}"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.model is not a SentencePiece model"):
        adopted(data, "x.model")


def test_a_truncated_model_is_refused(model: bytes) -> None:
    for size in (len(model) // 3, len(model) - 7):
        with pytest.raises(UserError, match=r"x\.model"):
            adopted(model[:size], "x.model")


def test_several_files_are_refused(folder: Path) -> None:
    shutil.copy(folder / "other.model", folder / "other2.model")
    with pytest.raises(UserError, match=r"vocab\.from: 2 files match; name one"):
        committed(config(folder / "work", f"vocab.from={folder}/other*.model"), "vocab")


def test_replacing_a_field_keeps_the_others(model: bytes) -> None:
    assert wire.replaced(model, {}) == model
    changed = wire.replaced(model, {99: b"new", 98: 1_000_000})
    assert wire.submessage(changed, 99) == b"new"
    assert wire.integer(changed, 98, 0) == 1_000_000
    assert wire.replaced(changed, {99: None, 98: None}) == model


# Compared


def test_others_are_measured_on_the_same_text(folder: Path, vocab: Artifact, tmp_path: Path) -> None:
    work = copy_stages(folder / "work", tmp_path / "work", "corpus")
    shutil.copy(vocab.folder.path("tokenizer.json"), tmp_path / "same.json")
    chosen = config(
        work, f"vocab.from={folder}/other.model", f"vocab.compare=['{tmp_path}/same.json','{folder}/other.model']"
    )
    report = json.loads(committed(chosen, "vocab").folder.read("vocab_report.json"))
    measures = ("measured_bytes", "unit", "fertility", "unknown_rate", "bytes_per_token")
    own = {language: {key: found[key] for key in measures} for language, found in report["languages"].items()}
    assert report["compared"]["same.json"] == own
    assert set(report["compared"]["other.model"]) == set(own)
    assert report["languages"]["ar"]["script"] == "Arabic"
    assert sum(report["scripts"].values()) == report["pieces"] - 4
    table = Page(render(chosen)).table("Tokenizers side by side")
    assert table["Language"][1:4] == ["Pieces: this run", "Pieces: other.model", "Pieces: same.json"]
    assert table["en"][1] == table["en"][3] == f"{own['en']['fertility']:.3f}"
    scripts = Page(render(chosen)).table("Pieces by script")
    assert "ar" in scripts["Arabic"][0].split()


def test_two_files_of_one_name_keep_their_folders(folder: Path, tmp_path: Path) -> None:
    work = copy_stages(folder / "work", tmp_path / "work", "corpus")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "other.model", tmp_path / name / "spm.model")
    chosen = config(work, f"vocab.compare=['{tmp_path}/*/spm.model']")
    assert list(committed(chosen, "vocab").manifest.stats["compared"]) == ["a/spm.model", "b/spm.model"]


def test_a_bad_file_to_compare_with_is_named(folder: Path, tmp_path: Path) -> None:
    work = copy_stages(folder / "work", tmp_path / "work", "corpus")
    for number, data in enumerate((b"nothing", b"{}", b'{"model": {"type": "Unigram"}}')):
        (tmp_path / f"bad{number}.json").write_bytes(data)
        with pytest.raises(UserError, match=rf"vocab.compare: bad{number}\.json is neither"):
            committed(config(work, f"vocab.compare=['{tmp_path}/bad{number}.json']"), "vocab")


def test_every_language_is_compared(folder: Path, vocab: Artifact) -> None:
    assert set(vocab.manifest.stats["languages"]) == {path.name.split(".")[0] for path in DEMO.glob("*.txt.xz")}
    assert list(chain.from_iterable(vocab.manifest.stats["compared"].values())) == []
