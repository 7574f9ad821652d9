"""The training sample: quotas share the budget as promised, sentences lose nothing, and only a prefix is read."""

from __future__ import annotations

import random
import shutil
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import flip_bit, write_corpus
from tokenizing import committed, conf

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.storage import Folder
from tokenizer.documents import read_texts, shards_by_language, text_bytes
from tokenizer.sample import MAX_SENTENCE_BYTES, LanguageSample, quotas, sentences, shares

SIZES = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 10**13), min_size=1, max_size=30)


@settings(deadline=None)
@given(SIZES, st.floats(0, 1), st.integers(1, 10**13))
def test_quotas_use_up_the_budget_and_no_more(sizes: dict[str, int], alpha: float, budget: int) -> None:
    found = quotas(sizes, alpha, budget)
    assert all(0 <= found[name] <= sizes[name] for name in sizes)
    within = min(budget, sum(sizes.values()))
    assert within - len(sizes) <= sum(found.values()) <= within


@settings(deadline=None)
@given(SIZES, st.floats(0, 1), st.integers(10**6, 10**13))
def test_languages_that_do_not_run_out_share_by_the_power_law(sizes: dict[str, int], alpha: float, budget: int) -> None:
    found = quotas(sizes, alpha, budget)
    levels = {name: found[name] / sizes[name] ** alpha for name in sizes}
    open_ended = [levels[name] for name in sizes if found[name] < sizes[name] and found[name] > 1000]
    exhausted = [levels[name] for name in sizes if found[name] == sizes[name]]
    if open_ended:
        assert max(open_ended) <= min(open_ended) * 1.003
        assert all(level <= min(open_ended) * 1.003 for level in exhausted)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, {"big": 240, "mid": 240, "small": 4}),
        (0.5, {"big": 400, "mid": 80, "small": 4}),  # as 100 : 20 : 2, but "small" has 4 instead of 8
        (1.0, {"big": 465, "mid": 18, "small": 0}),
    ],
)
def test_small_languages_pass_on_what_they_cannot_fill(alpha: float, expected: dict[str, int]) -> None:
    assert quotas({"big": 10_000, "mid": 400, "small": 4}, alpha, 484) == pytest.approx(expected, abs=1)


def test_shares_are_parts_of_one() -> None:
    assert shares({"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}


@settings(deadline=None)
@given(st.text(st.sampled_from("a é字🎈 \n"), max_size=40), st.integers(1, 900))
def test_sentences_are_whole_lines_or_fitting_pieces_of_them(text: str, repeats: int) -> None:
    found = list(sentences((text * repeats).encode()))
    assert all(len(sentence) <= MAX_SENTENCE_BYTES for sentence in found)
    assert "".join(sentence.decode() for sentence in found) == (text * repeats).replace("\n", "")


def test_long_lines_are_cut_between_words() -> None:
    words = [f"word{number}" for number in range(3000)]
    found = [sentence.decode() for sentence in sentences(" ".join(words).encode())]
    assert len(found) > 1
    assert [word for sentence in found for word in sentence.split()] == words
    assert min(map(len, found[:-1])) > MAX_SENTENCE_BYTES - 20


def test_a_smaller_quota_takes_a_prefix() -> None:
    rng = random.Random(1)
    texts = [b"\n".join(b"x" * rng.randrange(1, 300) for _ in range(5)) for _ in range(200)]
    total = sum(len(text) - 4 for text in texts)
    everything = list(LanguageSample().take(texts, total))
    for quota in (1, 5_000, total // 2):
        sample = LanguageSample()
        taken = list(sample.take(texts, quota))
        assert taken == everything[: len(taken)]
        assert quota <= sample.text_bytes < quota + 300
        assert (sample.sentences, sample.text_bytes) == (len(taken), sum(map(len, taken)))
        assert b"\n".join(texts[: sample.documents]).startswith(b"\n".join(taken))
    assert everything == [line for text in texts for line in text.split(b"\n")]


DOCUMENTS = [f"document {number} " + "ab " * (number % 7) for number in range(60)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """60 documents in about five shards."""
    root = tmp_path_factory.mktemp("sample")
    inputs = write_corpus(root / "in", {"xx": DOCUMENTS})
    return committed(conf(root / "work", inputs / "*", "corpus.shard_mb=0.0003"), "corpus")


def test_reading_can_start_at_any_document(corpus: Artifact) -> None:
    shards = shards_by_language(corpus)["xx"]
    everything = list(chain.from_iterable(read_texts(corpus.folder, shards)))
    assert sorted(everything) == sorted(text.strip().encode() for text in DOCUMENTS)
    for first in (0, 1, shards[0].rows, shards[0].rows + 1, 59, 60):
        assert list(chain.from_iterable(read_texts(corpus.folder, shards, first))) == everything[first:]


def test_only_the_shards_that_are_needed_are_read(corpus: Artifact, tmp_path: Path) -> None:
    shards = shards_by_language(corpus)["xx"]
    shutil.copytree(corpus.folder.url, tmp_path / "copy")
    flip_bit(tmp_path / "copy" / shards[-1].path)
    texts = chain.from_iterable(read_texts(Folder(str(tmp_path / "copy")), shards))
    quota = text_bytes(shards[:2])
    assert len(shards) > 3
    assert sum(map(len, LanguageSample().take(texts, quota))) >= quota
    with pytest.raises(PipelineError, match="not the ones that were committed"):
        list(texts)
