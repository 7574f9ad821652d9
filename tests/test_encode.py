"""The tokens stage: every document's pieces exactly once, the split by hash, the same bytes whatever happens."""

from __future__ import annotations

import dataclasses
import shutil
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support import kill_group_after, mdeberta, tree, write_corpus
from tokenizers import Tokenizer
from tokenizing import DEMO, committed, conf, copy_stages

from model.data import require_tokenizer
from model.token_shards import TokenShards
from pipeline.artifact import Artifact
from pipeline.beam import run_map
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.shards import open_shard, token_schema
from pipeline.stage import PartStore
from tokenizer import encode, pieces
from tokenizer.documents import shards_by_language

SETTINGS = [
    "corpus.languages=[en, th, zh-Hans, yo]",
    "corpus.shard_mb=0.2",
    "vocab.size=3000",
    "vocab.sample_mb=0.4",
    "tokens.max_seq_len=64",
    "tokens.validation_fraction=0.3",
]
LANGUAGES = ("en", "th", "yo", "zh-Hans")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with four languages of the packaged text up to their tokens."""
    work = tmp_path_factory.mktemp("tokens")
    committed(demo(work), "tokens")
    return work


def demo(work: Path, *overrides: str) -> Config:
    return conf(work, f"{DEMO}/*.txt.xz", *SETTINGS, *overrides)


def command(work: Path, *overrides: str) -> list[str]:
    """The same run as `demo`, from the command line."""
    settings = [f"work_dir={work}", f"corpus.inputs=['{DEMO}/*.txt.xz']", *SETTINGS, *overrides]
    return ["run", "-c", "demo", "tokens", *chain.from_iterable(("--set", setting) for setting in settings)]


def documents(corpus: Artifact, language: str) -> list[tuple[str, str]]:
    """Id and text of every document in hash order."""
    tables = [open_shard(corpus.fetch(part.path)) for part in shards_by_language(corpus)[language]]
    return [(row["id"], row["text"]) for table in tables for row in table.to_pylist()]


def segments(tokens: Artifact, language: str, split: str) -> list[list[int]]:
    """Every segment of a split as ids, by the lengths beside the rows; checks that the rest is padding."""
    found = []
    for part in tokens.select(f"{language}/{split}-"):
        for row in open_shard(tokens.fetch(part.path)).to_pylist():
            ids, place = row["input_ids"], 0
            for length in row["segment_lengths"]:
                found.append(ids[place : place + length])
                place += length
            assert not any(ids[place:])
    return found


def processor(config: Config) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=committed(config, "vocab").folder.read("spm.model"))


def ids_of(encoder: Any, text: str) -> list[int]:
    """A text's ids, word by word: SentencePiece's float32 sums along a long text are not exact."""
    return list(chain.from_iterable(encoder.encode(text.replace("\n", " ").split(" "))))


def encoded(encoder: Any, text: str) -> list[int]:
    """The ids of a text, word by word: sums of scores over a long text would not be exact."""
    return list(chain.from_iterable(encoder.encode(text.split())))


def is_held_out(content_hash: str, fraction: float) -> bool:
    return int(content_hash, 16) >= (1 - fraction) * 2**128


@pytest.mark.parametrize("language", LANGUAGES)
def test_documents_packing_keeps_every_document(work: Path, language: str) -> None:
    config = demo(work)
    encoder, texts = processor(config), documents(committed(config, "corpus"), language)
    for split in ("train", "validation"):
        chosen = [text for content_hash, text in texts if is_held_out(content_hash, 0.3) == (split == "validation")]
        rows = [ids_of(encoder, text) for text in chosen]
        expected = [[1, *row[start : start + 62], 2] for row in rows for start in range(0, len(row), 62)]
        assert sorted(segments(committed(config, "tokens"), language, split)) == sorted(expected)


def test_stream_packing_keeps_the_order_of_the_documents(work: Path) -> None:
    config = demo(work, "tokens.packing=stream", "tokens.validation_fraction=0")
    tokens, corpus, encoder = committed(config, "tokens"), committed(config, "corpus"), processor(config)
    for language in LANGUAGES:
        rows = segments(tokens, language, "train")
        expected = [ids_of(encoder, text) for _, text in documents(corpus, language)]
        assert list(chain.from_iterable(row[1:-1] for row in rows)) == list(chain.from_iterable(expected))
        assert not tokens.select(f"{language}/validation-")


def test_rows_and_counts_are_as_the_manifest_says(work: Path) -> None:
    config = demo(work)
    tokens, vocab, corpus = committed(config, "tokens"), committed(config, "vocab"), committed(config, "corpus")
    digest = vocab.manifest.parts["spm.model"].sha256
    assert tokens.manifest.stats["tokenizer_sha256"] == digest
    assert tokens.manifest.stats["max_seq_len"] == 64
    assert set(tokens.manifest.stats["languages"]) == set(LANGUAGES)
    for language, stats in tokens.manifest.stats["languages"].items():
        assert stats["documents"] == corpus.manifest.stats["languages"][language]["kept"]
        filled = padded = 0
        for split in ("train", "validation"):
            parts = tokens.select(f"{language}/{split}-")
            tables = [open_shard(tokens.fetch(part.path), token_schema(64, digest)) for part in parts]
            assert all(table.schema.metadata == {b"tokenizer_sha256": digest.encode()} for table in tables)
            assert [table.num_rows for table in tables] == [part.rows for part in parts]
            assert stats[split]["rows"] == sum(part.rows for part in parts)
            assert stats[split]["tokens"] == sum(part.stats["tokens"] for part in parts)
            lengths = [length for table in tables for row in table["segment_lengths"].to_pylist() for length in row]
            assert stats[split]["tokens"] == sum(lengths)
            filled, padded = filled + sum(lengths), padded + 64 * stats[split]["rows"]
        assert stats["train"]["documents"] + stats["validation"]["documents"] == stats["documents"]
        assert stats["fill"] == pytest.approx(filled / padded, abs=1e-6)
        assert stats["fill"] > 0.95


def test_rows_keep_the_number_of_their_corpus_shard(work: Path) -> None:
    config = demo(work)
    names = {part.path for part in committed(config, "tokens").select(suffix=".arrow")}
    shards = shards_by_language(committed(config, "corpus"))
    assert len(shards["en"]) > 4
    expected = {shard.path.replace("/data-", "/train-") for parts in shards.values() for shard in parts}
    assert {name for name in names if "/train-" in name} <= expected
    held_out = sorted(name for name in names if name.startswith("en/validation-"))
    count = len(shards["en"])
    assert held_out[-1] == f"en/validation-{count - 1:05d}-of-{count:05d}.arrow"
    assert 1 <= len(held_out) <= 0.3 * count + 1


def test_shard_size_does_not_change_the_split(work: Path, tmp_path: Path) -> None:
    coarse = demo(tmp_path, "corpus.shard_mb=5")
    corpus, tokens = committed(coarse, "corpus"), committed(coarse, "tokens")
    held_out = {h for h, _ in documents(committed(demo(work), "corpus"), "en") if is_held_out(h, 0.3)}
    assert tokens.manifest.stats["languages"]["en"]["validation"]["documents"] == len(held_out)
    assert {h for h, _ in documents(corpus, "en") if is_held_out(h, 0.3)} == held_out


@pytest.mark.parametrize(("fraction", "held_out"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.001, 1)])
def test_the_split_is_the_top_of_the_hash_range(fraction: float, held_out: int) -> None:
    import pyarrow as pa

    ids = pa.chunked_array([["0" * 32, "7" + "f" * 31], ["8" + "0" * 31, "f" * 32]])
    assert encode.first_held_out(ids, fraction) == 4 - held_out
    assert encode.first_held_out(pa.chunked_array([], pa.string()), fraction) == 0


def test_special_tokens_in_text_are_plain_text(tmp_path: Path) -> None:
    line = "[MASK] stands for word {}, [CLS] begins, [SEP] ends, [PAD] fills. C L E P D U N"
    texts = ["\n".join(line.format(number) for number in range(start, start + 10)) for start in range(0, 300, 10)]
    inputs = write_corpus(tmp_path / "in", {"en": texts})
    config = conf(tmp_path / "work", inputs / "*", "vocab.size=300", "tokens.validation_fraction=0")
    tokens, encoder = committed(config, "tokens"), processor(config)
    found = segments(tokens, "en", "train")
    inner = list(chain.from_iterable(segment[1:-1] for segment in found))
    assert min(inner) > 3
    assert max(inner) < len(encoder)
    assert any("[MASK] stands for word" in encoder.decode(segment[1:-1]) for segment in found)


def test_datasets_reads_the_rows(work: Path, tmp_path: Path) -> None:
    tokens = committed(demo(work), "tokens")
    part = tokens.select("th/train-")[0]
    rows = datasets.load_dataset("arrow", data_files=tokens.fetch(part.path), cache_dir=str(tmp_path))["train"]
    assert len(rows) == part.rows
    assert len(rows[0]["input_ids"]) == 64
    assert rows[0] == open_shard(tokens.fetch(part.path)).slice(0, 1).to_pylist()[0]


# Bytes


def test_workers_do_not_show(work: Path, tmp_path: Path) -> None:
    copy_stages(work, tmp_path, "corpus", "vocab")
    committed(demo(tmp_path, "tokens.workers=2"), "tokens")
    assert_same_tokens(tmp_path, work)


def test_killed_at_any_moment_the_bytes_are_the_same(work: Path, tmp_path: Path) -> None:
    copy_stages(work, tmp_path, "corpus", "vocab")
    killed = [kill_group_after(seconds, *command(tmp_path)) for seconds in (1.0, 1.6)]
    mdeberta(*command(tmp_path))
    assert killed[0]
    assert_same_tokens(tmp_path, work)


def assert_same_tokens(work: Path, expected: Path) -> None:
    """One directory of tokens is there, as in the other work directory."""
    (folder,) = (work / "tokens").iterdir()
    assert tree(folder) == tree(expected / "tokens" / folder.name)


class StoppedError(Exception):
    """Ends a run in the middle."""


def half_done(config: Config, monkeypatch: pytest.MonkeyPatch, parts: int) -> Path:
    """The stage's directory after so many parts were published and the next one was begun."""
    publish, left = PartStore.publish, [parts]

    def publish_some(store: PartStore, path: str) -> Any:
        if not left[0]:
            raise StoppedError
        left[0] -= 1
        return publish(store, path)

    with monkeypatch.context() as patch, pytest.raises(PipelineError):
        patch.setattr(PartStore, "publish", publish_some)
        committed(config, "tokens")
    (folder,) = (Path(config.work_dir) / "tokens").iterdir()
    return folder


@pytest.mark.parametrize("parts", [1, 7, 8, 9])
def test_finished_shards_are_not_encoded_again(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    folder = half_done(demo(copy_stages(work, tmp_path, "corpus", "vocab")), monkeypatch, parts)
    rows = {path: path.stat().st_ino for path in folder.glob("*/*.arrow")}
    assert len(rows) == parts
    committed(demo(tmp_path), "tokens")
    made_again = sum(path.stat().st_ino != inode for path, inode in rows.items())
    assert made_again <= 1  # the first split of the shard that was being worked on
    assert_same_tokens(tmp_path, work)


def test_a_lost_shard_is_an_error(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that forgets an element must not lead to a commit."""

    def run_some(label: str, steps: Any, elements: Any, *rest: Any, **options: Any) -> None:
        run_map(label, steps, elements[1:], *rest, **options)

    config = demo(copy_stages(work, tmp_path, "corpus", "vocab"))
    monkeypatch.setattr("tokenizer.encode.run_map", run_some)
    with pytest.raises(PipelineError, match=r"of the \d+ documents of en were encoded"):
        committed(config, "tokens")
    monkeypatch.undo()
    committed(config, "tokens")
    assert_same_tokens(tmp_path, work)


# Text to ids


WORDS = ["a", "the", "water", "Ẹ̀kọ́", "ใช้", "中文", "☃", "[CLS]", "\n", " ", "x" * 3000, "語" * 1500]
TEXT = st.lists(st.sampled_from(WORDS), max_size=900).map(" ".join)


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_texts_give_the_ids_of_their_words(work: Path, texts: list[str]) -> None:
    encoder = processor(demo(work))
    ids, offsets = pieces.encode(encoder, [[texts[0].encode()], [text.encode() for text in texts[1:]]])
    found = [ids[begin:end].tolist() for begin, end in pairwise(offsets)]
    assert found == [ids_of(encoder, text) for text in texts]


def test_long_documents_give_the_ids_of_transformers_too(work: Path) -> None:
    """In one line of 40,000 pieces, float32 sums along the whole of it would no longer be exact."""
    vocab = committed(demo(work), "vocab")
    line = " ".join(text.replace("\n", " ") for _, text in documents(committed(demo(work), "corpus"), "en"))
    ids, _ = pieces.encode(processor(demo(work)), [[line.encode()]])
    assert len(ids) > 40_000
    assert ids.tolist() == Tokenizer.from_file(vocab.fetch("tokenizer.json")).encode(line, add_special_tokens=False).ids


# Another tokenizer


def test_training_refuses_a_shard_of_another_tokenizer(work: Path, tmp_path: Path) -> None:
    """One that lies in the place of the right one, with a manifest that vouches for it."""
    other = committed(demo(copy_stages(work, tmp_path / "other", "corpus"), "vocab.size=2500"), "tokens")
    tokens = committed(demo(copy_stages(work, tmp_path / "mine", "corpus", "vocab", "tokens")), "tokens")
    path = tokens.select("th/train-")[0].path
    shutil.copy(other.fetch(path), Path(tokens.folder.path(path)))
    parts = {**tokens.manifest.parts, path: other.manifest.parts[path]}
    mixed = Artifact(tokens.folder, dataclasses.replace(tokens.manifest, parts=parts))
    theirs, own = (artifact.manifest.stats["tokenizer_sha256"][:12] for artifact in (other, tokens))
    rows = TokenShards(mixed, vocab_rows=3000).rows("th", "train")
    with pytest.raises(PipelineError, match=rf"{path}: encoded with tokenizer {theirs}, the stage says {own}; delete"):
        rows.row(0)
    assert rows.row(len(rows) - 1)[0].any()


def test_training_refuses_the_tokens_of_another_vocabulary(work: Path, tmp_path: Path) -> None:
    tokens = committed(demo(work), "tokens")
    require_tokenizer(tokens, committed(demo(work), "vocab"))
    other = committed(demo(copy_stages(work, tmp_path, "corpus"), "vocab.size=2500"), "vocab")
    theirs, own = (stage.manifest.parts["spm.model"].sha256[:12] for stage in (other, committed(demo(work), "vocab")))
    with pytest.raises(PipelineError, match=rf"encoded with tokenizer {own}, the vocabulary is {theirs}; delete"):
        require_tokenizer(tokens, other)
