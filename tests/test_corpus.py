"""The corpus stage: same bytes whatever happens, everything counted, readable by `datasets`, bad inputs survived."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import zstandard
from support import kill_at_work, mdeberta, start, tree, write_corpus

from pipeline import configfile
from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.execute import run_stages
from pipeline.shards import open_shard
from pipeline.stage import identities, open_artifact, stage_folder

DEMO = Path(configfile.__file__).parent / "demo" / "corpus"


def conf(work: Path, inputs: Path | str, *overrides: str) -> Config:
    return configfile.load("demo", [f"work_dir={work}", f"corpus.inputs=['{inputs}']", *overrides])


def run(config: Config) -> tuple[Path, dict[str, Any]]:
    """Run the stage; returns its directory and its counts."""
    run_stages(config, ["corpus"])
    artifact = artifact_of(config)
    return Path(artifact.folder.url), artifact.manifest.stats


def artifact_of(config: Config) -> Artifact:
    return open_artifact(config, identities(config, "corpus")["corpus"], "a test")


def texts(root: Path, language: str) -> list[str]:
    shards = sorted((root / language).glob("data-*.arrow"))
    return [text for shard in shards for text in open_shard(str(shard))["text"].to_pylist()]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the packaged text's shards from one quiet run in this process."""
    return tree(run(conf(tmp_path_factory.mktemp("quiet"), f"{DEMO}/*.txt.xz"))[0])


@pytest.mark.parametrize(
    "overrides", [["corpus.workers=2"], ["corpus.chunk_mb=0.05"], ["corpus.chunk_mb=0.3", "corpus.workers=2"]]
)
def test_workers_and_chunk_size_do_not_show(tmp_path: Path, undisturbed: dict[str, str], overrides: list[str]) -> None:
    assert tree(run(conf(tmp_path, f"{DEMO}/*.txt.xz", *overrides))[0]) == undisturbed


def test_plain_files_in_ranges_give_the_same_texts_as_compressed_ones(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    for path in DEMO.glob("*.txt.xz"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / path.name.removesuffix(".xz")).write_bytes(lzma.decompress(path.read_bytes()))
    plain = run(conf(tmp_path / "plain", f"{tmp_path}/in/*.txt", "corpus.chunk_mb=0.02"))[0]
    packed = run(conf(tmp_path / "packed", f"{DEMO}/*.txt.xz"))[0]
    for language in ("en", "th", "ar"):
        assert texts(plain, language) == texts(packed, language)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_and_resume_gives_the_same_bytes(tmp_path: Path, undisturbed: dict[str, str], seed: int) -> None:
    arguments = ["run", "-c", "demo", "corpus", "--set", f"work_dir={tmp_path}", "--set", "corpus.chunk_mb=0.2"]
    arguments += ["--set", f"corpus.workers={1 + seed % 2}"]
    kill_at_work(3, 3.0, random.Random(seed), tmp_path / "corpus", *arguments)
    mdeberta(*arguments)
    (directory,) = (tmp_path / "corpus").iterdir()
    assert tree(directory) == undisturbed


@pytest.mark.slow
def test_twice_at_once_gives_the_same_bytes(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    arguments = ["run", "-c", "demo", "corpus", "--set", f"work_dir={tmp_path}"]
    both = [start(*arguments) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("another run is working here" in errors for _, errors in outputs) == 1
    (directory,) = (tmp_path / "corpus").iterdir()
    assert tree(directory) == undisturbed


def test_datasets_reads_the_shards_in_all_its_ways(tmp_path: Path) -> None:
    root, stats = run(conf(tmp_path / "w", f"{DEMO}/en.txt.xz", "corpus.shard_mb=0.4"))
    shards = sorted(str(path) for path in (root / "en").glob("*.arrow"))
    kept = stats["languages"]["en"]["kept"]
    assert len(shards) > 2
    assert len(datasets.load_from_disk(str(root / "en"))) == kept
    assert sum(len(datasets.Dataset.from_file(shard)) for shard in shards) == kept
    loaded = datasets.load_dataset("arrow", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == kept
    assert loaded.column_names == ["id", "text", "source", "offset"]


def test_rows_are_in_hash_order_over_the_shards(tmp_path: Path) -> None:
    root, _ = run(conf(tmp_path, f"{DEMO}/en.txt.xz", "corpus.shard_mb=0.4"))
    ids = [row for shard in sorted((root / "en").glob("*.arrow")) for row in open_shard(str(shard))["id"].to_pylist()]
    assert ids == sorted(set(ids))


def test_duplicates_go_across_files_chunks_and_shards(tmp_path: Path) -> None:
    documents = [f"Text number {n}, a document of its own." for n in range(300)]
    inputs = write_corpus(tmp_path / "in", {"en": documents * 2})
    (inputs / "en.more.txt").write_text("\n\n".join(reversed(documents)))
    write_corpus(inputs, {"de": documents[:5]})
    root, stats = run(conf(tmp_path / "w", f"{inputs}/*.txt", "corpus.chunk_mb=0.001", "corpus.shard_mb=0.005"))
    assert sorted(texts(root, "en")) == sorted(documents)
    assert stats["languages"]["en"]["dropped"] == {"duplicate": 600}
    assert stats["languages"]["de"]["kept"] == 5  # languages are deduplicated each for itself
    root, stats = run(conf(tmp_path / "w", f"{inputs}/*.txt", "corpus.dedup=none"))
    assert len(texts(root, "en")) == 900


def test_the_first_of_equal_documents_stays_whatever_the_chunks(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path / "in", {"en": ["One.", "Two.", "One.", "Three.", "One."]})
    for chunk_mb in ("1", "0.00001"):
        root, _ = run(conf(tmp_path / chunk_mb, f"{inputs}/*.txt", f"corpus.chunk_mb={chunk_mb}"))
        table = open_shard(str(root / "en" / "data-00000-of-00001.arrow"))
        assert dict(zip(table["text"].to_pylist(), table["offset"].to_pylist(), strict=True))["One."] == 0


@pytest.fixture
def bad_inputs(tmp_path: Path) -> Path:
    """Inputs of which several cannot be read, beside one good file a compression."""
    folder = write_corpus(tmp_path / "in", {"en": ["Good text.", "More good text."]})
    content = b"Guter Text.\n\nNoch einer.\n"
    for name, data in {
        "de.txt.xz": lzma.compress(content) + lzma.compress(b"\n\nEin dritter.\n"),
        "fr.txt.gz": gzip.compress(content, mtime=0),
        "es.txt.zst": zstandard.compress(content),
        "it.txt.bz2": bz2.compress(content),
        "nl.txt.xz": b"this is no xz file",
        "pl.txt.xz": lzma.compress(b"Ten tekst jest dobry.\n\n" * 20_000 + random.Random(0).randbytes(90_000))[:-2000],
        "pt.txt": "Ol\xe1, mundo.\n\nBom dia.\n\nAten\xe7\xe3o!\n".encode("latin-1"),
        "ro.txt": "Salut, lume.\n".encode("utf-16"),
        "sv.txt": b"",
        "tr.txt": b"\xef\xbb\xbfMerhaba.\r\n\r\nDunya.\r\n\r\n\xe2\x80\x8b\n\n\x00\x01\x02",
    }.items():
        (folder / name).write_bytes(data)
    return folder


def test_unreadable_inputs_are_rejected_by_name_and_the_run_goes_on(tmp_path: Path, bad_inputs: Path) -> None:
    root, stats = run(conf(tmp_path / "w", f"{bad_inputs}/*"))
    inputs = stats["inputs"]
    good = {"de.txt.xz": 3, "fr.txt.gz": 2, "es.txt.zst": 2, "it.txt.bz2": 2, "en.txt": 2}
    assert {name: inputs[name]["kept"] for name in good} == good
    assert inputs["nl.txt.xz"]["rejected"] == {"not_xz": 1}
    assert inputs["pl.txt.xz"]["rejected"].keys() & {"truncated_xz", "corrupt_xz"}
    assert inputs["pl.txt.xz"]["kept"] == 1 and inputs["pl.txt.xz"]["dropped"]["duplicate"] > 1000
    assert inputs["pt.txt"]["rejected"] == {"invalid_utf8": 2} and inputs["pt.txt"]["kept"] == 1
    assert inputs["ro.txt"]["rejected"] == {"utf16": 1}
    assert inputs["sv.txt"]["documents_in"] == 0
    assert inputs["tr.txt"]["dropped"] == {"empty": 1} and inputs["tr.txt"]["rejected"] == {"control_bytes": 1}
    for name, counts in inputs.items():
        out = counts["kept"] + sum(counts["dropped"].values()) + sum(counts["rejected"].values())
        assert counts["documents_in"] == out, name
    assert json.loads((root / "stats.json").read_bytes()) == stats
    assert texts(root, "tr") == ["Dunya.", "Merhaba."] or texts(root, "tr") == ["Merhaba.", "Dunya."]


def test_rejects_are_kept_with_place_reason_and_excerpt(tmp_path: Path, bad_inputs: Path) -> None:
    root, _ = run(conf(tmp_path / "w", f"{bad_inputs}/*"))
    rows = open_shard(str(root / "rejects" / "pt.arrow")).to_pylist()
    assert [(row["offset"], row["outcome"], row["reason"]) for row in rows] == [
        (0, "rejected", "invalid_utf8"), (23, "rejected", "invalid_utf8")
    ]  # fmt: skip
    assert rows[0]["excerpt"] == b"Ol\xe1, mundo."


@pytest.mark.parametrize("overrides", [["corpus.workers=2"], ["corpus.chunk_mb=0.02"]])
def test_rejects_do_not_depend_on_workers_or_chunks(tmp_path: Path, bad_inputs: Path, overrides: list[str]) -> None:
    quiet = tree(run(conf(tmp_path / "a", f"{bad_inputs}/*"))[0])
    assert tree(run(conf(tmp_path / "b", f"{bad_inputs}/*", *overrides))[0]) == quiet


def test_the_last_line_of_the_run_names_the_rejected_inputs(tmp_path: Path, bad_inputs: Path) -> None:
    arguments = [
        "run",
        "-c",
        "demo",
        "corpus",
        "--set",
        f"work_dir={tmp_path}/w",
        "--set",
        f"corpus.inputs=['{bad_inputs}/*']",
    ]
    for _ in range(2):  # also when nothing is left to do
        last = mdeberta(*arguments).stdout.strip().splitlines()[-1]
        assert "nl.txt.xz has rejected text (not_xz: 1 of 1 documents)" in last
        assert "pt.txt has rejected text (invalid_utf8: 2 of 3 documents)" in last


@pytest.mark.parametrize(
    ("name", "words"),
    [("../en.txt", None), ("EN!.txt", "must begin with a language code"), ("en.pdf", "must end with one of")],
)
def test_a_file_name_that_says_no_language_or_format_is_the_users_mistake(
    tmp_path: Path, name: str, words: str | None
) -> None:
    if words is None:
        with pytest.raises(UserError, match="nothing matches"):
            run(conf(tmp_path / "w", tmp_path / "in" / name))
        return
    (tmp_path / name).write_text("Text.")
    with pytest.raises(UserError, match=words):
        run(conf(tmp_path / "w", tmp_path / name))


@pytest.mark.parametrize("name", [b"en.\xff.txt", b"en.a\nb.txt"])
def test_a_file_name_that_cannot_be_printed_is_the_users_mistake(tmp_path: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("Text.")
    with pytest.raises(UserError, match="rename it"):
        run(conf(tmp_path / "w", f"{tmp_path}/*.txt"))


def test_the_same_file_twice_is_the_users_mistake_and_two_files_of_one_name_are_not(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", {"en": ["Same."]})
    write_corpus(tmp_path / "b", {"en": ["Same."]})
    with pytest.raises(UserError, match=r"en\.txt is given twice with the same content"):
        run(conf(tmp_path / "w", f"{tmp_path}/[ab]/en.txt"))
    write_corpus(tmp_path / "b", {"en": ["Different."]})
    root, _ = run(conf(tmp_path / "w", f"{tmp_path}/[ab]/en.txt"))
    assert sorted(texts(root, "en")) == ["Different.", "Same."]


def test_languages_can_be_selected_and_must_exist(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path / "in", {"en": ["Text."], "de": ["Text."], "no": ["Tekst."]})
    assert set(run(conf(tmp_path / "w", f"{inputs}/*", "corpus.languages=[no, en]"))[1]["languages"]) == {"en", "no"}
    with pytest.raises(UserError, match=r"no input file is called xx\.\*"):
        run(conf(tmp_path / "w", f"{inputs}/*", "corpus.languages=[xx]"))


def test_no_document_at_all_is_an_error(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path / "in", {"en": ["Text."]})
    with pytest.raises(UserError, match="not one document was kept"):
        run(conf(tmp_path / "w", f"{inputs}/*", "corpus.min_chars=100"))


def test_chunks_stay_when_they_are_asked_for(tmp_path: Path) -> None:
    inputs = write_corpus(tmp_path / "in", {"en": ["Text."]})
    root, _ = run(conf(tmp_path / "w", f"{inputs}/*", "corpus.keep_chunks=true"))
    assert list(root.glob("_work/**/*.arrow"))


def test_the_stage_works_on_s3_from_s3_and_tells_no_secret(
    tmp_path: Path, s3_options: dict[str, Any], undisturbed: dict[str, str], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import s3fs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = s3fs.S3FileSystem(**s3_options["s3"])
    fs.put([str(path) for path in sorted(DEMO.iterdir())], "bucket/in/")
    options = f"storage_options={json.dumps(s3_options)}"
    config = configfile.load(
        "demo", ["work_dir=s3://bucket/work", "corpus.inputs=['s3://bucket/in/*.txt.xz']", options]
    )
    run_stages(config, ["corpus"])
    artifact = artifact_of(config)
    assert {path: part.sha256 for path, part in artifact.manifest.parts.items()} == {
        path: digest for path, digest in undisturbed.items() if path not in ("MANIFEST.json", "STAGE.json")
    }
    assert open_shard(artifact.fetch("en/data-00000-of-00002.arrow")).num_rows > 0
    stored = b"".join(fs.cat_file(path) for path in fs.find("bucket/work"))
    secret = s3_options["s3"]["secret"]
    assert secret.encode() not in stored
    assert secret not in "".join(capfd.readouterr())


def test_the_stage_works_in_memory(undisturbed: dict[str, str]) -> None:
    config = conf(Path("memory:/work"), f"{DEMO}/*.txt.xz", "work_dir=memory://work", "corpus.workers=1")
    run_stages(config, ["corpus"])
    folder = stage_folder(config, identities(config, "corpus")["corpus"])
    assert folder.digest("en/data-00000-of-00002.arrow").sha256 == undisturbed["en/data-00000-of-00002.arrow"]


def test_the_real_sample_is_counted_completely(tmp_path: Path, shared_data: Path) -> None:
    names = ["yo", "so", "lg", "ff"]
    pattern = ", ".join(f"'{shared_data}/cc100-sample/{name}.txt.xz'" for name in names)
    config = configfile.load("demo", [f"work_dir={tmp_path}", f"corpus.inputs=[{pattern}]"])
    _, stats = run(config)
    assert {name: counts["documents_in"] for name, counts in stats["languages"].items()} == {
        "yo": 12, "so": 6, "lg": 67, "ff": 17
    }  # fmt: skip


def test_a_shard_is_a_plain_arrow_stream(tmp_path: Path) -> None:
    root, _ = run(conf(tmp_path, f"{DEMO}/yo.txt.xz"))
    with pa.ipc.open_stream(str(root / "yo" / "data-00000-of-00001.arrow")) as reader:
        assert reader.read_all().num_rows > 0
