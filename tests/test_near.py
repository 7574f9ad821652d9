"""Near-duplicates: shingles against strings, the S-curve, and what is dropped against a comparison of all pairs."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cleaned import clean_files, make_shards, rows_of, run_phases, texts_of, with_small_buckets
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chunks import CorpusJob
from pipeline.near import PHASES, components
from pipeline.repeats import PHASES as PARAGRAPH_PHASES
from pipeline.shingles import PERMUTATIONS, band_hashes, band_shape, jaccard, shingle_hashes
from pipeline.text import content_hash

THRESHOLDS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.999]


def key(text: str) -> int:
    return int(content_hash(text).hex()[:16], 16)


def shingles(text: str) -> list[tuple[str, ...]]:
    """The shingles of a text whose only unspaced characters are Han, by the definition."""
    words: list[str] = []
    for run in text.split():
        for is_han, characters in itertools.groupby(run, lambda char: "\u3400" <= char <= "\u9fff"):
            piece = "".join(characters)
            words += piece if is_han else [piece]
    width = 10 if 2 * sum("\u3400" <= word[0] <= "\u9fff" for word in words) > len(words) else 5
    return [tuple(words[first : first + width]) for first in range(len(words) - width + 1)]


def similarity(first: str, second: str) -> float:
    a, b = set(shingles(first)), set(shingles(second))
    return len(a & b) / len(a | b)


def of_words(dice: random.Random, words: int) -> str:
    return " ".join(str(dice.randrange(10**6)) for _ in range(words))


def variant(dice: random.Random, text: str, changes: int) -> str:
    """The text with some of its words replaced."""
    words = text.split(" ")
    for place in dice.sample(range(len(words)), changes):
        words[place] = f"new{dice.randrange(10**6)}"
    return " ".join(words)


def families(number: int, seed: int = 0) -> list[str]:
    """Texts of their own and, of some, variants that resemble them more and less."""
    dice = random.Random(seed)
    texts = [of_words(dice, dice.randrange(60, 200)) for _ in range(number)]
    for text in texts[: number // 2]:
        texts += [variant(dice, text, changes) for changes in (1, 1, 2, 4, 12)]
    dice.shuffle(texts)
    return texts


def dropped(job: CorpusJob, language: str = "en") -> list[int]:
    return [row["key"] for row in rows_of(job, "drops", language)]


def to_drop(texts: Sequence[str], threshold: float) -> set[int]:
    """Keys of all texts but the lowest of each connected component, by comparing every pair."""
    found = {key(text): set(shingles(text)) for text in texts}
    lowest = {each: each for each in found}

    def root(each: int) -> int:
        while lowest[each] != each:
            each = lowest[each]
        return each

    for (a, first), (b, second) in itertools.combinations(found.items(), 2):
        if first and second and len(first & second) >= threshold * len(first | second):
            low, high = sorted((root(a), root(b)))
            lowest[high] = low
    return {each for each in found if lowest[each] != each}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "ab", "é", "天", "地玄", "b黄", "𝒳"]), max_size=25), max_size=6))
def test_two_shingles_have_the_same_hash_if_they_are_the_same_words(lists: list[list[str]]) -> None:
    texts = [" ".join(words) for words in lists]
    hashes, numbers = shingle_hashes(texts)
    strings = [shingle for text in texts for shingle in shingles(text)]
    assert numbers.tolist() == [len(shingles(text)) for text in texts]
    assert len(set(zip(hashes.tolist(), strings, strict=True))) == len(set(hashes.tolist())) == len(set(strings))


def test_texts_hashed_together_have_the_hashes_they_have_alone() -> None:
    dice = random.Random(0)
    texts = [of_words(dice, dice.randrange(20_000)) for _ in range(20)] + ["", "天地玄黄宇宙洪荒日月盈昃", "x" * 9000]
    together, _ = shingle_hashes(texts)
    assert np.array_equal(together, np.concatenate([shingle_hashes([text])[0] for text in texts]))


def test_a_word_begins_neither_before_its_text_nor_at_a_line_end() -> None:
    assert np.array_equal(shingle_hashes(["a b c\nd e"])[0], shingle_hashes(["a b c d e"])[0])
    assert shingle_hashes(["one two three", "four five six"])[1].tolist() == [0, 0]


def test_jaccard_is_that_of_the_sets_of_shingles() -> None:
    dice = random.Random(3)
    for changes in (0, 1, 5, 40):
        first = of_words(dice, 80)
        second = variant(dice, first, changes)
        hashes = [np.unique(shingle_hashes([text])[0]) for text in (first, second)]
        assert jaccard(*hashes) == pytest.approx(similarity(first, second))


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_s_curve_finds_what_is_at_the_threshold(threshold: float) -> None:
    bands, rows = band_shape(threshold)
    assert bands * rows <= PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= 0.95
    steeper = PERMUTATIONS // (rows + 1)
    assert 1 - (1 - threshold ** (rows + 1)) ** steeper < 0.95


def test_signatures_meet_as_often_as_the_s_curve_says() -> None:
    dice = random.Random(1)
    bands, rows = band_shape(0.8)
    for changes in (2, 5, 9):
        pairs = [(text, variant(dice, text, changes)) for text in (of_words(dice, 200) for _ in range(400))]
        first, second = (band_hashes([pair[side] for pair in pairs], 0.8)[0] for side in (0, 1))
        met = np.mean(np.any(first == second, axis=1))
        predicted = np.mean([1 - (1 - similarity(*pair) ** rows) ** bands for pair in pairs])
        assert met == pytest.approx(predicted, abs=0.06)


def test_hashes_do_not_depend_on_the_process() -> None:
    code = (
        "from pipeline.shingles import band_hashes;"
        "print(band_hashes(['one two three four five six', '天地玄黄宇宙洪荒日月盈昃'], 0.8)[0].tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "3"))
    }
    assert len(outputs) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_components_have_their_lowest_document(edges: list[tuple[int, int]]) -> None:
    ends = np.array(edges, np.uint64).reshape(-1, 2)
    documents, lowest = components(ends[:, 0], ends[:, 1])
    connected = {each: {each} for edge in edges for each in edge}
    for low, high in edges:
        both = connected[low] | connected[high]
        for each in both:
            connected[each] = both
    assert dict(zip(documents.tolist(), lowest.tolist(), strict=True)) == {
        each: min(all_of_it) for each, all_of_it in connected.items()
    }


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_what_is_dropped_is_what_a_comparison_of_all_pairs_drops(tmp_path: Path, threshold: float) -> None:
    texts = families(60)
    job = clean_files(tmp_path, {"en.txt": texts}, 30_000, near_duplicates=threshold)
    run_phases(job, PHASES, ["en"])
    found, true = set(dropped(job)), to_drop(texts, threshold)
    assert len(true) >= 40
    assert found <= true
    assert len(found) >= 0.97 * len(true)
    (shard,) = make_shards(job, "en")
    assert shard.stats["dropped"] == {"en.txt": {"near_duplicate": len(found)}}
    assert {key(text) for text in texts_of(job, [shard])} == {key(text) for text in texts} - found


def test_chunks_and_buckets_do_not_show(tmp_path: Path) -> None:
    texts = families(30, seed=5)
    files = {"en.txt": texts[:100], "en.b.txt": texts[50:]}
    found = []
    for number, (chunk_bytes, rows) in enumerate([(9_000, 30), (9_000, 10**6), (10**6, 200)]):
        job = clean_files(tmp_path / str(number), files, chunk_bytes, near_duplicates=0.7)
        run_phases(job, with_small_buckets(PHASES, rows), ["en"])
        found.append((dropped(job), [part.sha256 for part in make_shards(job, "en", 2)]))
    assert len(found[0][0]) > 40
    assert found[0] == found[1] == found[2]


def test_scripts_without_spaces_are_compared_by_characters(tmp_path: Path) -> None:
    dice = random.Random(0)
    letters = [chr(code) for code in range(0x0E01, 0x0E2F)]
    base = ["".join(dice.choices(letters, k=300)) for _ in range(20)]
    near = [f"{text[:150]}ก{text[150:]}" for text in base[:10]]
    job = clean_files(tmp_path, {"th.txt": base + near}, near_duplicates=0.8)
    run_phases(job, PHASES, ["th"])
    assert dropped(job, "th") == sorted(max(key(a), key(b)) for a, b in zip(base, near, strict=False))


def test_a_large_group_costs_few_comparisons_a_document(tmp_path: Path) -> None:
    dice = random.Random(0)
    base = of_words(dice, 300)
    texts = [variant(dice, base, 1) for _ in range(250)]
    job = clean_files(tmp_path, {"en.txt": texts}, near_duplicates=0.8)
    run_phases(job, PHASES, ["en"])
    assert len(dropped(job)) == 249
    assert 249 <= sum(part.stats["compared"] for part in job.work_parts("edges", "en")) < 5 * 249


def test_those_that_only_share_a_bad_pivot_are_compared_with_each_other(tmp_path: Path) -> None:
    """Two kinds of text share half of their words: kind by kind they are near, across kinds they are not."""
    dice = random.Random(0)
    shared = of_words(dice, 120)
    kinds = [f"{shared} {of_words(dice, 60)}" for _ in range(5)]
    texts = [variant(dice, kind, 1) for kind in kinds for _ in range(8)]
    job = clean_files(tmp_path, {"en.txt": texts}, near_duplicates=0.8)
    run_phases(job, PHASES, ["en"])
    assert set(dropped(job)) == to_drop(texts, 0.8)
    assert len(dropped(job)) == 35


def test_equal_documents_are_duplicates_and_no_near_duplicates(tmp_path: Path) -> None:
    dice = random.Random(0)
    base = of_words(dice, 100)
    near = variant(dice, base, 1)
    low, high = sorted((base, near), key=key)
    files = {"en.txt": [high, low, *[high] * 20], "en.b.txt": [low, high]}
    job = clean_files(tmp_path, files, near_duplicates=0.8)
    run_phases(job, PHASES, ["en"])
    rows = [(row["key"], row["document"]) for row in rows_of(job, "bands", "en")]
    assert len(rows) == 2 * len(set(rows)) == 2 * 2 * band_shape(0.8)[0]  # in each of two chunks once
    (shard,) = make_shards(job, "en")
    assert texts_of(job, [shard]) == [low]
    counts = shard.stats["dropped"]
    assert sum(each.get("duplicate", 0) for each in counts.values()) == 22
    assert sum(each.get("near_duplicate", 0) for each in counts.values()) == 1


def test_near_duplicates_are_sought_among_what_paragraphs_leave(tmp_path: Path) -> None:
    dice = random.Random(0)
    head, first, second = (of_words(dice, 80) for _ in range(3))
    job = clean_files(
        tmp_path,
        {"en.txt": [f"{head}\n{first}", f"{head}\n{second}", f"{variant(dice, second, 1)}"]},
        near_duplicates=0.8,
        dedup_paragraphs=True,
    )
    run_phases(job, [*PARAGRAPH_PHASES, *PHASES], ["en"])
    (shard,) = make_shards(job, "en")
    assert shard.rows == 2 and shard.stats["dropped"] == {"en.txt": {"near_duplicate": 1}}


def test_texts_without_a_shingle_and_languages_without_a_pair_stay(tmp_path: Path) -> None:
    job = clean_files(
        tmp_path, {"en.txt": ["One two.", "One two!", "x"], "de.txt": ["a b c d e f g"]}, near_duplicates=0.5
    )
    run_phases(job, PHASES, ["de", "en"])
    assert dropped(job, "en") == dropped(job, "de") == []
    assert make_shards(job, "en")[0].rows == 3
