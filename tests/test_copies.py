"""Copies across languages: each text stays in one language, the one with the most text, and the others count it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cleaned import clean_files, make_shards, run_phases, texts_of

from pipeline import copies
from pipeline.assemble import phases
from pipeline.chunks import CorpusJob
from pipeline.passes import ROWS_PER_BUCKET

LANGUAGES = ["de", "en", "fr"]
SHARED = [f"A text that several languages have, number {n}." for n in range(40)]
FILES = {
    "en.txt": [*SHARED, *(f"English text {n}, which is larger." for n in range(60)), SHARED[0]],
    "de.txt": [*SHARED[10:30], *(f"Deutscher Text {n}." for n in range(60))],
    "fr.txt": [*SHARED[20:], *(f"Deutscher Text {n}." for n in range(5)), "Un texte.", "Un texte."],
}


def counted(job: CorpusJob, language: str, shards: int = 1) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in make_shards(job, language, shards):
        for reason, number in part.stats["dropped"].get(f"{language}.txt", {}).items():
            counts[reason] = counts.get(reason, 0) + number
    return counts


@pytest.mark.parametrize(("chunk_bytes", "rows"), [(10**6, ROWS_PER_BUCKET), (300, 25)])
def test_a_text_stays_in_the_language_with_the_most_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, rows: int
) -> None:
    monkeypatch.setattr(copies, "ROWS_PER_BUCKET", rows)
    job = clean_files(tmp_path, FILES, chunk_bytes, copies_across_languages="drop")
    run_phases(job, phases(job.config), LANGUAGES)
    assert counted(job, "en", 2) == {"duplicate": 1}
    assert counted(job, "de", 2) == {"copy": 20}
    assert counted(job, "fr", 2) == {"copy": 25, "duplicate": 1}
    texts = {language: texts_of(job, make_shards(job, language, 2)) for language in LANGUAGES}
    assert set(texts["en"]) == set(FILES["en.txt"])
    assert set(texts["de"]) == {f"Deutscher Text {n}." for n in range(60)}
    assert texts["fr"] == ["Un texte."]


def test_of_equally_large_languages_the_first_by_name_keeps_the_text(tmp_path: Path) -> None:
    job = clean_files(tmp_path, {"fr.txt": ["Same."], "de.txt": ["Same."]}, copies_across_languages="drop")
    run_phases(job, phases(job.config), ["fr", "de"])
    assert counted(job, "de") == {} and counted(job, "fr") == {"copy": 1}
    assert make_shards(job, "fr")[0].rows == 0


def test_copies_are_sought_among_what_paragraphs_leave(tmp_path: Path) -> None:
    files = {"en.txt": ["Head of it.", "Head of it.\nBody of it."], "de.txt": ["Body of it.", "Kopf."]}
    job = clean_files(tmp_path, files, copies_across_languages="drop", dedup_paragraphs=True)
    run_phases(job, phases(job.config), ["de", "en"])
    assert counted(job, "en") == {} and counted(job, "de") == {"copy": 1}
    assert texts_of(job, make_shards(job, "de")) == ["Kopf."]


def test_all_passes_together_lose_no_document_uncounted(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(60))
    files = {
        "en.txt": [*SHARED, f"{long}.", f"{long}!", "Head.\nTail.", "Head.\nMore.", "Head.", SHARED[1]],
        "de.txt": [*SHARED[:10], f"{long}.", "Head."],
    }
    job = clean_files(tmp_path, files, 400, copies_across_languages="drop", dedup_paragraphs=True, near_duplicates=0.8)
    run_phases(job, phases(job.config), ["de", "en"])
    for language in ("de", "en"):
        parts = job.work_parts("distinct", language)
        documents_in = sum(part.stats["documents_in"] for part in parts)
        repeated = sum(part.stats["dropped"].get("repeated_paragraphs", 0) for part in parts)
        shards = make_shards(job, language, 3)
        dropped = sum(
            number for part in shards for counts in part.stats["dropped"].values() for number in counts.values()
        )
        assert documents_in == len(files[f"{language}.txt"])
        assert documents_in == repeated + dropped + sum(part.rows for part in shards)
    assert counted(job, "en", 3) == {"near_duplicate": 1}


def test_a_run_that_was_killed_between_two_languages_ends_with_the_same_lists(tmp_path: Path) -> None:
    job = clean_files(tmp_path, FILES, copies_across_languages="drop")
    run_phases(job, phases(job.config), LANGUAGES)
    before = job.parts.done("_work")
    marker = next(path for path in before if "/copies-" in path)
    job.parts.forget(marker, next(path for path in before if "/drops-" in path))
    run_phases(job, phases(job.config), LANGUAGES)
    assert job.parts.done("_work") == before
