"""The corpus stage's inputs and options end to end: every format the same text, every reason counted."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import tree, write_corpus

from pipeline import configfile, corpus
from pipeline.chunks import CorpusJob, Source, Unit, clean_unit
from pipeline.config import Config, CorpusConfig
from pipeline.errors import PipelineError
from pipeline.execute import run_stages
from pipeline.shards import open_shard
from pipeline.sources import Format
from pipeline.stage import identities, open_artifact
from pipeline.storage import Folder
from pipeline.streams import Follower, split

DEMO = Path(configfile.__file__).parent / "demo" / "corpus"


def conf(work: Path, inputs: str, *overrides: str) -> Config:
    return configfile.load("demo", [f"work_dir={work}", f"corpus.inputs=['{inputs}']", *overrides])


def run(config: Config) -> tuple[Path, dict[str, Any]]:
    """Run the stage; returns its directory and its counts, which must balance."""
    run_stages(config, ["corpus"])
    artifact = open_artifact(config, identities(config, "corpus")["corpus"], "a test")
    stats = artifact.manifest.stats
    for name, counts in stats["inputs"].items():
        gone = sum(counts["dropped"].values()) + sum(counts["rejected"].values())
        assert counts["documents_in"] == counts["kept"] + gone, name
    return Path(artifact.folder.url), stats


def texts(root: Path, language: str) -> list[str]:
    shards = sorted((root / language).glob("data-*.arrow"))
    return [text for shard in shards for text in open_shard(str(shard))["text"].to_pylist()]


def swahili() -> list[str]:
    content = lzma.decompress((DEMO / "sw.txt.xz").read_bytes()).decode()
    return [document for document in content.split("\n\n") if document.strip()]


def wet(document: str) -> bytes:
    body = document.encode()
    return b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%b\r\n\r\n" % (len(body), body)


def jsonl(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"content": text}).encode() + b"\n" for text in documents)


def parquet(documents: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"content": documents}), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def several_blocks(documents: list[str]) -> bytes:
    data = "\n\n".join(documents).encode()
    return b"".join(lzma.compress(data[start : start + 5000]) for start in range(0, len(data), 5000))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("sw.txt", lambda documents: "\n\n".join(documents).encode()),
        ("sw.blocks.txt.xz", several_blocks),
        ("sw.jsonl", jsonl),
        ("sw.jsonl.gz", lambda documents: gzip.compress(jsonl(documents))),
        ("sw.parquet", parquet),
        ("sw.warc.wet.gz", lambda documents: b"".join(gzip.compress(wet(document)) for document in documents)),
    ],
)
@pytest.mark.parametrize("overrides", [["corpus.chunk_mb=0.01", "corpus.workers=2"], ["corpus.workers=1"]])
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str, write: Any, overrides: list[str]) -> None:
    documents = swahili()
    (tmp_path / name).write_bytes(write(documents))
    root, stats = run(conf(tmp_path / "w", str(tmp_path / name), "corpus.text_key=content", *overrides))
    expected = run(conf(tmp_path / "packaged", str(DEMO / "sw.txt.xz")))[0]
    assert texts(root, "sw") == texts(expected, "sw")
    assert stats["totals"]["documents_in"] == len(documents)


def test_repeated_paragraphs_go_whatever_the_chunks(tmp_path: Path) -> None:
    menu = "Home, news and contact"
    documents = [f"{menu}\nText number {n}, as only this document has it." for n in range(40)]
    inputs = write_corpus(tmp_path / "in", {"en": [*documents, menu]})
    trees = []
    for chunk_mb in ("1", "0.0005"):
        config = conf(tmp_path / chunk_mb, f"{inputs}/*", "corpus.dedup_paragraphs=true", f"corpus.chunk_mb={chunk_mb}")
        root, stats = run(config)
        assert stats["totals"]["dropped"] == {"repeated_paragraphs": 1}
        trees.append(tree(root))
    assert trees[0] == trees[1]
    assert sorted(texts(root, "en")) == sorted([documents[0], *(text.partition("\n")[2] for text in documents[1:])])


def test_near_duplicates_go_and_are_counted(tmp_path: Path) -> None:
    dice = random.Random(0)
    words = [f"word{n}" for n in range(500)]
    originals = [" ".join(dice.choices(words, k=200)) for _ in range(20)]
    copies = [f"{text} and some words more" for text in originals]
    inputs = write_corpus(tmp_path / "in", {"en": originals + copies})
    trees = []
    for chunk_mb in ("1", "0.002"):
        config = conf(tmp_path / chunk_mb, f"{inputs}/*", "corpus.near_duplicates=0.8", f"corpus.chunk_mb={chunk_mb}")
        root, stats = run(config)
        assert stats["totals"]["dropped"] == {"near_duplicate": 20}
        trees.append(tree(root))
    assert trees[0] == trees[1]
    assert len({text.removesuffix(" and some words more") for text in texts(root, "en")}) == 20


def test_a_text_of_two_languages_stays_in_the_larger_one(tmp_path: Path) -> None:
    english = [f"Sentence number {n} of an English file." for n in range(30)]
    inputs = write_corpus(tmp_path / "in", {"en": english, "sw": [*english[:5], "Maneno ya Kiswahili tu."]})
    root, stats = run(conf(tmp_path / "drop", f"{inputs}/*", "corpus.copies_across_languages=drop"))
    assert stats["languages"]["sw"]["dropped"] == {"copy": 5}
    assert texts(root, "sw") == ["Maneno ya Kiswahili tu."]
    assert len(texts(root, "en")) == 30
    assert run(conf(tmp_path / "keep", f"{inputs}/*"))[1]["languages"]["sw"]["kept"] == 6


def test_documents_with_evaluation_sentences_go_and_are_counted(tmp_path: Path) -> None:
    sentence = "The committee had not yet decided upon the date."
    inputs = write_corpus(tmp_path / "in", {"en": [f"Before. {sentence.upper()} After.", "Nothing of the sort here."]})
    evaluation = tmp_path / "dev.tsv"
    evaluation.write_text(f"premise\thypothesis\n{sentence}\tYes.\n")
    root, stats = run(conf(tmp_path / "w", f"{inputs}/*", f"corpus.exclude=['{evaluation}']"))
    assert stats["totals"]["dropped"] == {"excluded": 1}
    assert texts(root, "en") == ["Nothing of the sort here."]


def test_other_evaluation_files_are_another_fingerprint(tmp_path: Path) -> None:
    inputs, evaluation = write_corpus(tmp_path / "in", {"en": ["Text."]}), tmp_path / "dev.tsv"
    found = []
    for sentence in ("A sentence that is long enough to tell.", "Another one, of which the same holds."):
        evaluation.write_text(sentence)
        config = conf(tmp_path / "w", f"{inputs}/*", f"corpus.exclude=['{evaluation}']")
        found.append(identities(config, "corpus")["corpus"].fingerprint)
    assert found[0] != found[1]


def test_documents_in_a_foreign_language_go_where_that_is_asked_for(tmp_path: Path) -> None:
    english = "This is a rather long sentence in plain English, which nobody would ever take for Swahili or Zulu."
    inputs = write_corpus(tmp_path / "in", {"sw": [swahili()[0], english], "zu": [english]})
    _, stats = run(conf(tmp_path / "w", f"{inputs}/*", "corpus.language_id.enabled=true"))
    assert stats["languages"]["sw"]["dropped"] == {"other_language": 1}
    assert stats["languages"]["zu"]["kept"] == 1  # the model does not know Zulu, so it has no say


def test_a_follower_cleans_what_another_worker_is_still_decompressing(tmp_path: Path) -> None:
    source = Source("sw.txt.xz", "sw", Format("text", "xz"), str(DEMO / "sw.txt.xz"))
    job = CorpusJob(Folder(str(tmp_path)), 10_000, CorpusConfig())
    follower = threading.Thread(target=lambda: list(split(job, (source,), Follower(0))))
    follower.start()
    left: list[Unit] = list(split(job, (source,), source))
    follower.join()
    runs = job.parts.get(job.end_path(source)).rows  # type: ignore[union-attr]
    assert runs > 3
    assert len(job.parts.done(job.work("chunks", source))) == runs
    assert not job.parts.done(job.work("raw", source))
    assert len(left) <= runs


def test_a_stream_whose_chunk_was_damaged_is_cut_up_again(tmp_path: Path) -> None:
    source = Source("sw.txt.xz", "sw", Format("text", "xz"), str(DEMO / "sw.txt.xz"))
    job = CorpusJob(Folder(str(tmp_path)), 10_000, CorpusConfig())
    for unit in list(split(job, (source,), source)):
        clean_unit(job, unit)
    chunks = job.parts.done(job.work("chunks", source))
    damaged = sorted(chunks)[1]
    (tmp_path / damaged).write_bytes(b"torn")
    units = list(split(job, (source,), source))
    assert [job.chunk_path(unit) for unit in units] == [damaged]
    clean_unit(job, units[0])
    assert job.parts.done(job.work("chunks", source)) == chunks


def test_a_chunk_that_is_lost_fails_the_stage_instead_of_shrinking_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = corpus.clean_unit

    def lose_one(job: CorpusJob, unit: Unit) -> list[Any]:
        return [] if unit.number == 1 else clean(job, unit)

    monkeypatch.setattr(corpus, "clean_unit", lose_one)
    config = conf(tmp_path / "w", str(DEMO / "sw.txt.xz"), "corpus.chunk_mb=0.01", "corpus.workers=1")
    with pytest.raises(PipelineError, match=r"sw\.txt\.xz: not all of its chunks are there"):
        run_stages(config, ["corpus"])
    monkeypatch.undo()
    assert texts(run(config)[0], "sw") == texts(run(conf(tmp_path / "quiet", str(DEMO / "sw.txt.xz")))[0], "sw")


def test_two_workers_on_an_object_store_share_a_stream(
    tmp_path: Path, s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["work_dir=s3://bucket/shared", f"storage_options={json.dumps(s3_options)}"]
    keys = ["corpus.chunk_mb=0.02", "corpus.workers=3", *options]
    config = configfile.load("demo", [f"corpus.inputs=['{DEMO}/sw.txt.xz', '{DEMO}/en.txt.xz']", *keys])
    run_stages(config, ["corpus"])
    stats = open_artifact(config, identities(config, "corpus")["corpus"], "a test").manifest.stats
    local = f"corpus.inputs=['{DEMO}/sw.txt.xz', '{DEMO}/en.txt.xz']"
    assert stats == run(configfile.load("demo", [f"work_dir={tmp_path}/local", local]))[1]
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # raw runs are read once and not kept
