"""Repeated paragraphs: what stays is exactly what a dictionary of all paragraphs lets stay, and all is counted."""

from __future__ import annotations

import itertools
import lzma
import pickle
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from cleaned import clean_files, make_shards, rows_of, run_phases, texts_of, with_small_buckets
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chunks import CorpusJob
from pipeline.errors import PipelineError
from pipeline.repeats import PHASES
from pipeline.text import content_hash

Files = Mapping[str, Sequence[str]]


def expected(files: Files, min_chars: int = 1) -> tuple[list[tuple[str, int, str]], int]:
    """Source, offset and text of every document that stays, and the number of removed paragraphs."""
    seen: set[str] = set()
    found, removed = [], 0
    for name in sorted(files):
        offset = 0
        for text in files[name]:
            kept = []
            for paragraph in text.split("\n"):
                removed += paragraph in seen
                if paragraph not in seen:
                    kept.append(paragraph)
                seen.add(paragraph)
            if kept and len("\n".join(kept)) >= min_chars:
                found.append((name, offset, "\n".join(kept)))
            offset += len(text.encode()) + 2
    return sorted(found), removed


def distinct(job: CorpusJob, language: str = "en") -> list[tuple[str, int, str]]:
    rows = rows_of(job, "distinct", language)
    assert all(row["id"] == content_hash(row["text"]).hex() for row in rows)
    return sorted((row["source"], row["offset"], row["text"]) for row in rows)


PARAGRAPHS = st.lists(st.sampled_from(["a", "b b", "c", "Ωmega", "ก", "e e e"]), min_size=1, max_size=4)
DOCUMENTS = st.lists(PARAGRAPHS.map("\n".join), max_size=6)


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries({"en.txt": DOCUMENTS, "en.more.txt": DOCUMENTS, "en.txt.txt": DOCUMENTS}),
    st.sampled_from([25, 60, 10_000]),
    st.sampled_from([2, 5, 1000]),
)
def test_what_stays_is_what_a_dictionary_lets_stay(files: Files, chunk_bytes: int, rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = clean_files(Path(folder), files, chunk_bytes, dedup_paragraphs=True)
        run_phases(job, with_small_buckets(PHASES, rows), ["en"])
        stay, removed = expected(files)
        assert distinct(job) == stay
        assert sum(part.stats["paragraphs_removed"] for part in job.work_parts("distinct", "en")) == removed


@pytest.mark.parametrize(("language", "chunk_bytes"), [("zh-Hans", 1_000_000), ("th", 6_000_000), ("sw", 300_000)])
def test_real_text_has_no_false_positive_and_no_false_negative(
    tmp_path: Path, shared_data: Path, language: str, chunk_bytes: int
) -> None:
    content = lzma.decompress((shared_data / "cc100-sample" / f"{language}.txt.xz").read_bytes()).decode()
    # what cleaning changes is none of this test's business
    texts = rows_of(clean_files(tmp_path / "a", {"en.txt": content.split("\n\n")}), "chunks", "en")
    files = {"en.txt": [row["text"] for row in sorted(texts, key=lambda row: row["offset"])]}
    job = clean_files(tmp_path / "b", files, chunk_bytes, dedup_paragraphs=True)
    run_phases(job, with_small_buckets(PHASES, 10_000), ["en"])
    stay, removed = expected(files)
    assert removed
    assert distinct(job) == stay


def test_chunks_and_buckets_do_not_show_in_the_shards(tmp_path: Path) -> None:
    files = {
        "en.txt": [f"Head of all.\nBody {n % 7} of it.\nEnd {n % 11}." for n in range(60)],
        "en.b.txt": [f"Body {n} of it.\nNews {n}." for n in range(30)],
    }
    shards = []
    for number, (chunk_bytes, rows) in enumerate(itertools.product([150, 900, 10_000], [9, 1000])):
        job = clean_files(tmp_path / str(number), files, chunk_bytes, dedup_paragraphs=True)
        run_phases(job, with_small_buckets(PHASES, rows), ["en"])
        shards.append([(part.path, part.sha256, part.stats) for part in make_shards(job, "en", 2)])
    assert all(each == shards[0] for each in shards)
    assert sorted(texts_of(job, make_shards(job, "en", 2))) == sorted(text for *_, text in expected(files)[0])


def test_every_document_and_removed_byte_is_counted(tmp_path: Path) -> None:
    files = {"en.txt": ["One is here.\nTwo.", "Two.", "One is here.\nThree.", "x", "", "One is here.\nFour is longer."]}
    job = clean_files(tmp_path, files, dedup_paragraphs=True, min_chars=4)
    run_phases(job, PHASES, ["en"])
    (part,) = job.work_parts("distinct", "en")
    (chunk,) = job.work_parts("chunks", "en")
    assert part.stats["documents_in"] == chunk.stats["documents_in"] == 5
    assert part.stats["dropped"] == {"too_short": 1, "repeated_paragraphs": 1}
    assert part.stats["kept"] == part.rows == 3
    assert part.stats["paragraphs_removed"] == 3
    assert part.stats["paragraph_bytes_removed"] == len("Two." + "One is here." * 2)
    assert part.stats["text_bytes"] == len("One is here.\nTwo.") + len("Three.") + len("Four is longer.")
    assert part.stats["source"] == "en.txt"


def test_a_document_that_falls_below_min_chars_is_dropped(tmp_path: Path) -> None:
    files = {"en.txt": ["A long first line.\nshort", "A long first line.\ntiny"]}
    job = clean_files(tmp_path, files, dedup_paragraphs=True, min_chars=5)
    run_phases(job, PHASES, ["en"])
    assert distinct(job) == expected(files, min_chars=5)[0] == [("en.txt", 0, "A long first line.\nshort")]


def test_documents_that_become_equal_are_duplicates(tmp_path: Path) -> None:
    files = {"en.txt": ["Head.", "Foot.", "Head.\nSame body.", "Foot.\nOther.", "Other.\nLast."]}
    job = clean_files(tmp_path, files, dedup_paragraphs=True)
    run_phases(job, PHASES, ["en"])
    shards = make_shards(job, "en")
    assert sorted(texts_of(job, shards)) == ["Foot.", "Head.", "Last.", "Other.", "Same body."]
    assert shards[0].stats["dropped"] == {}


def test_a_line_that_is_everywhere_costs_one_row_a_chunk(tmp_path: Path) -> None:
    pages = [f"Menu.\nBody {n} of it.\nMore of {n}.\nMenu." if n % 5 else "Menu.\nTail." for n in range(400)]
    files = {"en.txt": pages[:300], "en.b.txt": pages[300:]}
    lines = Counter("\n".join(pages).split("\n"))
    assert lines["Menu."] > 0.3 * lines.total()
    job = clean_files(tmp_path, files, 1500, dedup_paragraphs=True)
    run_phases(job, with_small_buckets(PHASES, 50), ["en"])
    chunks = len(job.work_parts("chunks", "en"))
    rows = Counter(row["key"] for row in rows_of(job, "paragraphs", "en"))
    assert 10 < chunks < 30
    assert rows.most_common(2)[0][1] == chunks
    assert rows.total() <= len(lines) - 2 + 2 * chunks
    stay, removed = expected(files)
    assert distinct(job) == stay
    assert sum(part.stats["paragraphs_removed"] for part in job.work_parts("distinct", "en")) == removed


def test_languages_do_not_see_each_other(tmp_path: Path) -> None:
    job = clean_files(tmp_path, {"en.txt": ["Same.\nEnglish."], "de.txt": ["Same.\nGerman."]}, dedup_paragraphs=True)
    run_phases(job, PHASES, ["de", "en"])
    assert distinct(job, "de") == [("de.txt", 0, "Same.\nGerman.")]
    assert distinct(job, "en") == [("en.txt", 0, "Same.\nEnglish.")]


def test_a_step_makes_nothing_twice_and_what_is_missing_again(tmp_path: Path) -> None:
    files = {"en.txt": [f"Text {n % 5}.\nMore {n}." for n in range(20)]}
    job = clean_files(tmp_path, files, 100, dedup_paragraphs=True)
    planned = []
    for phase in PHASES:
        tasks = phase.tasks(job, ["en"])
        planned.append((phase, tasks))
        for task in tasks:
            phase.step(job, task)
    made = {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in job.folder.files("_work")}
    for phase, tasks in planned:
        assert phase.tasks(job, ["en"]) == []
        for task in tasks:
            phase.step(job, task)
    assert {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in job.folder.files("_work")} == made
    before = job.parts.done("_work")
    victim = planned[2][1][1].path
    job.parts.forget(victim)
    assert [task.path for task in PHASES[2].tasks(job, ["en"])] == [victim]
    run_phases(job, PHASES, ["en"])
    assert job.parts.done("_work") == before
    job.parts.forget(planned[0][1][1].path)  # as a kill after its chunk's own repeats leaves it
    run_phases(job, PHASES, ["en"])
    assert job.parts.done("_work") == before


def test_a_task_names_its_documents_and_carries_no_record(tmp_path: Path) -> None:
    job = clean_files(tmp_path, {"en.a-source-with-a-long-name.txt": ["Text."]}, dedup_paragraphs=True)
    for phase in PHASES:
        tasks = phase.tasks(job, ["en"])
        assert [len(pickle.dumps(task)) < 500 for task in tasks] == [True]
        run_phases(job, [phase], ["en"])


@pytest.mark.parametrize(("kind", "steps_before"), [("chunks", 0), ("chunks", 2), ("own_repeats", 2)])
def test_a_part_that_has_gone_is_named(tmp_path: Path, kind: str, steps_before: int) -> None:
    job = clean_files(tmp_path, {"en.txt": ["Text.\nText."]}, dedup_paragraphs=True)
    run_phases(job, PHASES[:steps_before], ["en"])
    phase = PHASES[steps_before]
    (task,) = phase.tasks(job, ["en"])
    (victim,) = job.parts.done(job.work_folder(kind, "en"))
    job.folder.remove(victim)
    with pytest.raises(PipelineError, match=f"{victim}: .* delete its stage's directory"):
        phase.step(job, task)
