"""The vocab stage: ids as published and equal in transformers, the same bytes always, failures in plain words."""

from __future__ import annotations

import csv
import io
import json
import lzma
import os
import signal
import time
import unicodedata
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sentencepiece
from support import kill_group_after, mdeberta, start, tree, write_corpus
from tokenizing import DEMO, committed, conf, copy_stages

from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.stage import identities, stage_folder
from tokenizer import compared, fertility, pieces, wire
from tokenizer.documents import read_texts, shards_by_language
from tokenizer.sample import MAX_SENTENCE_BYTES
from tokenizer.scores import round_scores
from tokenizer.train import memory_needed, require_memory
from tokenizer.unigram import NORMALIZER_SPEC, TRAINER_SPEC, trainer_options

SAMPLE_MB = 0.8
SMALL = ["vocab.size=5000", f"vocab.sample_mb={SAMPLE_MB}"]
LONGER = ["vocab.sample_mb=8", "vocab.size=20000"]  # keeps the trainer busy for longer than any test waits
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the packaged text's corpus and a vocabulary of it."""
    work = tmp_path_factory.mktemp("vocab")
    committed(demo(work), "vocab")
    return work


@pytest.fixture(scope="module")
def vocab(work: Path) -> Artifact:
    return committed(demo(work), "vocab")


@pytest.fixture(scope="module")
def processor(vocab: Artifact) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=vocab.folder.path("spm.model"))


def demo(work: Path, *overrides: str) -> Config:
    return conf(work, f"{DEMO}/*.txt.xz", *SMALL, *overrides)


def command(work: Path, *overrides: str) -> list[str]:
    """The same run as `demo`, from the command line."""
    settings = [f"work_dir={work}", f"corpus.inputs=['{DEMO}/*.txt.xz']", *SMALL, *overrides]
    return ["run", "-c", "demo", "vocab", *chain.from_iterable(("--set", setting) for setting in settings)]


def demo_lines() -> list[str]:
    """Every line of the packaged text, cleaned as the corpus stage does for these files: NFC and single spaces."""
    texts = [lzma.decompress(path.read_bytes()).decode() for path in sorted(DEMO.glob("*.txt.xz"))]
    lines = [" ".join(unicodedata.normalize("NFC", line).split()) for text in texts for line in text.split("\n")]
    return [line for line in lines if line]


def from_pretrained(name: str) -> Callable[[str], Any]:
    import transformers

    return getattr(transformers, name).from_pretrained


# Ids


def test_the_special_ids_are_those_of_the_published_model(vocab: Artifact, processor: Any) -> None:
    assert [processor.id_to_piece(number) for number in range(4)] == SPECIAL
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert vocab.manifest.stats["pieces"] == vocab.manifest.stats["mask_id"] == len(processor) == 5000
    assert json.loads(vocab.folder.read("added_tokens.json")) == {"[MASK]": 5000}


@pytest.mark.parametrize("name", ["AutoTokenizer", "DebertaV2Tokenizer"])
def test_transformers_gives_the_same_ids(vocab: Artifact, processor: Any, name: str) -> None:
    tokenizer = from_pretrained(name)(vocab.folder.url)
    assert type(tokenizer).__name__ == "DebertaV2Tokenizer"
    assert (tokenizer.mask_token_id, len(tokenizer), tokenizer.model_max_length) == (5000, 5001, 512)
    ids = [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 2, 3]
    lines = demo_lines()[::5]
    assert tokenizer(lines, add_special_tokens=False)["input_ids"] == processor.encode(lines)


def test_transformers_gives_the_same_ids_for_whole_documents(vocab: Artifact, work: Path) -> None:
    """And for one as long as a book, where float32 sums would go wrong; ids as the tokens stage makes them."""
    corpus = committed(demo(work), "corpus")
    batches = (read_texts(corpus.folder, shards[:1]) for shards in shards_by_language(corpus).values())
    texts = list(chain.from_iterable(chain.from_iterable(batches)))[::4]
    texts.append(b"\n".join(texts))
    ids, offsets = pieces.encode(pieces.load(vocab.folder.read("spm.model")), [texts])
    tokenizer = from_pretrained("AutoTokenizer")(vocab.folder.url)
    expected = tokenizer([text.decode() for text in texts], add_special_tokens=False)["input_ids"]
    assert [row.tolist() for row in np.split(ids, offsets[1:-1])] == expected


def test_transformers_builds_pairs_and_finds_the_mask(vocab: Artifact, processor: Any) -> None:
    tokenizer = from_pretrained("AutoTokenizer")(vocab.folder.url)
    first, second = processor.encode(["a word", "another one"])
    pair = tokenizer("a word", "another one")
    assert pair["input_ids"] == [1, *first, 2, *second, 2]
    assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert tokenizer("a [MASK]")["input_ids"][-2] == 5000
    assert tokenizer.decode(tokenizer("a word")["input_ids"], skip_special_tokens=True) == "a word"


def test_transformers_gives_the_same_ids_on_all_of_xnli(vocab: Artifact, processor: Any, shared_data: Path) -> None:
    """Every dev sentence of the 15 languages, none left out."""
    path = shared_data / "xnli" / "xnli.dev.tsv.xz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = [unicodedata.normalize("NFC", row[column]) for row in rows for column in ("sentence1", "sentence2")]
    texts = [" ".join(text.split()) for text in texts]
    assert len({row["language"] for row in rows}) == 15
    assert len(texts) == 15 * 2490 * 2
    tokenizer = from_pretrained("AutoTokenizer")(vocab.folder.url)
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == processor.encode(texts)


def test_words_in_brackets_never_become_pieces(tmp_path: Path) -> None:
    text = "\n".join(f"The [MASK] and [CLS] of {number} [SEP]" for number in range(400))
    inputs = write_corpus(tmp_path / "in", {"en": [text]})
    vocab = committed(conf(tmp_path / "work", inputs / "*"), "vocab")
    lines = vocab.folder.read("spm.vocab").decode().splitlines()
    assert [line.split("\t")[0] for line in lines[:4]] == SPECIAL
    assert not [line for line in lines[4:] if "[" in line and len(line.split("\t")[0].removeprefix("▁")) > 1]


# Bytes


def test_the_same_config_gives_the_same_bytes_anywhere(work: Path, vocab: Artifact, tmp_path: Path) -> None:
    again = committed(demo(copy_stages(work, tmp_path / "elsewhere", "corpus")), "vocab")
    assert tree(Path(again.folder.url)) == tree(Path(vocab.folder.url))
    for path in again.manifest.parts:
        assert str(tmp_path).encode() not in again.folder.read(path)


def test_killed_at_any_moment_the_bytes_are_the_same(work: Path, vocab: Artifact, tmp_path: Path) -> None:
    copy_stages(work, tmp_path, "corpus")
    killed = [kill_group_after(seconds, *command(tmp_path)) for seconds in (1.0, 2.0)]
    mdeberta(*command(tmp_path))
    assert killed[0]
    assert tree(tmp_path) == tree(work)


def test_a_trained_model_is_not_trained_again(work: Path, vocab: Artifact, tmp_path: Path) -> None:
    """As after a kill between training and the last file."""
    copy_stages(work, tmp_path, "corpus")
    committed(demo(tmp_path), "corpus")
    folder = stage_folder(demo(tmp_path), identities(demo(tmp_path), "vocab")["vocab"])
    process = start(*command(tmp_path))
    while not folder.exists("_parts/spm.model.json"):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = os.stat(folder.path("spm.model")).st_ino
    mdeberta(*command(tmp_path))
    assert os.stat(folder.path("spm.model")).st_ino == before
    assert tree(tmp_path) == tree(work)


def test_the_model_reads_raw_text_and_names_no_file(vocab: Artifact) -> None:
    """As if SentencePiece had trained on the sentences: its own normaliser, no trace of how it got them."""
    model = vocab.folder.read("spm.model")
    trainer, normalizer = wire.submessage(model, TRAINER_SPEC), wire.submessage(model, NORMALIZER_SPEC)
    assert not {1, 2, 7, 54} & {field.number for field in wire.fields(trainer)}  # input, prefix, format, seeds file
    assert b"/dev/fd" not in model
    assert wire.submessage(normalizer, 1) == b"identity"
    assert [wire.integer(normalizer, number, 1) for number in (3, 4, 5)] == [1, 1, 1]


def test_held_out_text_takes_no_more_pieces_than_with_plain_training(work: Path, vocab: Artifact) -> None:
    """SentencePiece's own training on the same sentences, in languages of five scripts."""
    corpus = committed(demo(work), "corpus")
    documents = {name: list(chain.from_iterable(read_texts(corpus.folder, shards)))
                 for name, shards in shards_by_language(corpus).items()}  # fmt: skip
    taken = {name: counts["sample_documents"] for name, counts in vocab.manifest.stats["languages"].items()}
    lines = [line for name, texts in documents.items() for text in texts[: taken[name]] for line in text.split(b"\n")]
    plain = io.BytesIO()
    options = trainer_options(demo(work).vocab) | {"num_sub_iterations": 2, "seed_sentencepiece_size": 1_000_000}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=plain, **options)
    for name in ("en", "ru", "zh-Hans", "th", "ar"):
        texts = documents[name][taken[name] :]
        ours, theirs = (
            len(pieces.encode(pieces.load(model), [texts])[0])
            for model in (vocab.folder.read("spm.model"), plain.getvalue())
        )
        assert ours < 1.02 * theirs, name


def test_spm_vocab_is_what_the_trainer_itself_would_write(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(demo_lines()[:2000]), model_prefix=str(tmp_path / "spm"), vocab_size=3000, minloglevel=2
    )
    scored = pieces.scored_pieces(pieces.load((tmp_path / "spm.model").read_bytes()))
    assert pieces.vocab_lines(scored) == (tmp_path / "spm.vocab").read_bytes()


def test_rounding_changes_nothing_but_scores(tmp_path: Path, vocab: Artifact) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(demo_lines()[:2000]), model_prefix=str(tmp_path / "spm"), vocab_size=3000, minloglevel=2
    )
    trained = (tmp_path / "spm.model").read_bytes()
    before, after = (pieces.scored_pieces(pieces.load(model)) for model in (trained, round_scores(trained)))
    assert [piece for piece, _ in before] == [piece for piece, _ in after]
    assert max(abs(old - new) for (_, old), (_, new) in zip(before, after, strict=True)) <= 1 / 512
    published = pieces.scored_pieces(pieces.load(vocab.folder.read("spm.model")))
    assert all((score * 256).is_integer() for _, score in [*after, *published])
    assert len({score for _, score in after}) > 500


# Report


def test_the_report_measures_on_text_after_the_sample(work: Path, vocab: Artifact, processor: Any) -> None:
    report = json.loads(vocab.folder.read("vocab_report.json"))
    corpus = committed(demo(work), "corpus")
    shards = shards_by_language(corpus)
    assert set(report["languages"]) == set(report["sampling"]) == set(shards)
    for language in ("en", "th"):
        found = report["languages"][language]
        first = found["sample_documents"]
        held_out = list(chain.from_iterable(read_texts(corpus.folder, shards[language], first)))
        sizes = np.cumsum([len(text) for text in held_out])
        held_out = held_out[: int(np.searchsorted(sizes, fertility.MEASURED_BYTES)) + 1]
        words = [word for text in held_out for word in text.decode().split()]
        ids = processor.encode([text.decode().replace("\n", " ") for text in held_out])
        count = sum(map(len, ids))
        assert found["held_out"]
        assert found["unit"] == ("character" if language == "th" else "word")
        units = len("".join(words)) if language == "th" else len(words)
        assert found["fertility"] == pytest.approx(count / units, abs=1e-4)
        assert found["bytes_per_token"] == pytest.approx(sum(map(len, held_out)) / count, abs=1e-4)
        assert found["unknown_rate"] == pytest.approx(sum(row.count(3) for row in ids) / count, abs=1e-6)


def test_small_languages_gain_and_large_ones_lose(vocab: Artifact) -> None:
    stats = vocab.manifest.stats
    english, yoruba = stats["sampling"]["en"], stats["sampling"]["yo"]
    assert english["share_after"] < english["share_before"]
    assert yoruba["share_after"] > yoruba["share_before"]
    total = sum(language["sample_bytes"] for language in stats["languages"].values())
    assert 0 <= total - SAMPLE_MB * 1e6 < MAX_SENTENCE_BYTES * len(stats["languages"])


def test_a_language_without_text_beyond_the_sample_is_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = write_corpus(tmp_path / "in", {"en": ["\n".join(demo_lines()[:300])], "xx": ["one two", "three"]})
    config = conf(tmp_path / "work", inputs / "*", "vocab.size=250000")
    vocab = committed(config, "vocab")
    report = json.loads(vocab.folder.read("vocab_report.json"))
    assert not report["languages"]["en"]["held_out"]
    assert report["pieces"] < report["pieces_asked"] == 250_000
    assert f"250000 pieces asked, the sample supports {report['pieces']}" in caplog.text


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("plain English words", "word"),
        ("ข้อความภาษาไทยไม่มีวรรค", "character"),
        ("中文没有空格", "character"),
        ("日本語のテキスト", "character"),
        ("한국어는 띄어쓰기를 한다", "word"),
        ("हिन्दी के शब्द", "word"),
        ("ភាសាខ្មែរ", "character"),
    ],
)
def test_fertility_counts_words_only_where_spaces_mark_them(processor: Any, text: str, unit: str) -> None:
    assert fertility.measure(compared.with_sentencepiece(processor), [text.encode()])["unit"] == unit


# Failures


def test_a_vocabulary_smaller_than_the_alphabet_is_refused(work: Path, tmp_path: Path) -> None:
    copy_stages(work, tmp_path, "corpus")
    with pytest.raises(UserError, match=r"vocab.size 64 is too small: .* alone are \d{3,}; raise vocab.size"):
        committed(demo(tmp_path, "vocab.size=64"), "vocab")


def test_a_sample_that_does_not_fit_into_memory_is_refused_with_numbers() -> None:
    require_memory(10**9, memory_needed(10**9))
    with pytest.raises(UserError) as error:
        require_memory(10**9, 4 * 10**9)
    assert "1000 MB of text needs about 5.6 GB of memory and 4.0 GB is available" in str(error.value)
    fitting = int(str(error.value).split("lower vocab.sample_mb to ")[1].split()[0])
    require_memory(fitting * 10**6, 4 * 10**9)


def training_process(parent: psutil.Process) -> psutil.Process:
    """The child that trains, once it has grown beyond what its imports take."""
    while True:
        assert parent.is_running()
        for child in parent.children():
            if "spawn_main" in " ".join(child.cmdline()) and child.memory_info().rss > 110e6:
                return child
        time.sleep(0.02)


def test_a_killed_trainer_is_reported_with_numbers(work: Path, tmp_path: Path) -> None:
    process = start(*command(copy_stages(work, tmp_path, "corpus"), *LONGER))
    training_process(psutil.Process(process.pid)).kill()
    _, messages = process.communicate()
    assert process.returncode == 1
    assert "the training process was killed by signal 9" in messages
    assert "MB of text need about" in messages
    assert "lower vocab.sample_mb" in messages
    assert "Traceback" not in messages


def test_no_trainer_outlives_the_command(work: Path, tmp_path: Path) -> None:
    process = start(*command(copy_stages(work, tmp_path, "corpus"), *LONGER))
    trainer = training_process(psutil.Process(process.pid))
    process.kill()
    process.wait()  # `communicate` would wait for the trainer, which has the same standard error
    trainer.wait(timeout=2)
    process.communicate()
