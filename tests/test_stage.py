"""The stage contract, on the real corpus stage: identity, plan, commit, verify, refusal of altered bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import flip_bit, mdeberta, tree, write_corpus

from pipeline import configfile, stage
from pipeline.artifact import fetch
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.execute import run_stages
from pipeline.manifest import Identity
from pipeline.plan import plan, verify
from pipeline.stage import PartStore, identities, open_run, read_manifest, stage_folder
from pipeline.stages import STAGES
from pipeline.storage import Folder, open_url

TEXTS = {
    "en": [f"Document number {n} says something." for n in range(50)],
    "de": [f"Das ist Text {n}." for n in range(20)],
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    inputs = write_corpus(tmp_path / "in", TEXTS)
    return configfile.load("demo", [f"work_dir={tmp_path}/work", f"corpus.inputs=[{inputs}/*.txt]"])


def changed(config: Config, *overrides: str) -> Config:
    """The config with some keys set otherwise."""
    tree = config.model_dump(mode="json")
    for override in overrides:
        path, value = override.split("=")
        inner = tree
        for step in path.split(".")[:-1]:
            inner = inner[step]
        inner[path.split(".")[-1]] = json.loads(value)
    return Config.model_validate(tree)


def corpus_dir(config: Config) -> Path:
    return Path(stage_folder(config, identities(config, "corpus")["corpus"]).url)


def test_a_committed_stage_is_left_alone(config: Config) -> None:
    run_stages(config, ["corpus"])
    before = {path: path.stat().st_mtime_ns for path in corpus_dir(config).rglob("*")}
    run_stages(config, ["corpus"])
    assert {path: path.stat().st_mtime_ns for path in corpus_dir(config).rglob("*")} == before


def test_the_directory_holds_the_manifests_files_and_nothing_else(config: Config) -> None:
    run_stages(config, ["corpus"])
    manifest = read_manifest(Folder(str(corpus_dir(config))))
    assert manifest is not None
    assert set(tree(corpus_dir(config))) == {*manifest.parts, "MANIFEST.json", "STAGE.json"}
    assert not list(corpus_dir(config).glob("_*"))
    text = (corpus_dir(config) / "MANIFEST.json").read_text()
    assert str(config.work_dir) not in text and os.uname().nodename not in text


def test_a_moved_work_dir_is_still_committed(config: Config, tmp_path: Path) -> None:
    run_stages(config, ["corpus"])
    os.rename(config.work_dir, tmp_path / "moved")
    assert plan(changed(config, f'work_dir="{tmp_path}/moved"'))[0].state == "done"


def test_the_fingerprint_ignores_place_and_time_of_the_inputs(config: Config, tmp_path: Path) -> None:
    copy = write_corpus(tmp_path / "elsewhere", TEXTS)
    os.utime(copy / "en.txt", (1, 1))
    other = changed(config, f'corpus.inputs=["{copy}/*.txt"]', "corpus.workers=2", "corpus.chunk_mb=1")
    assert identities(other, "corpus") == identities(config, "corpus")
    (copy / "en.txt").write_text("Other text.\n")
    assert identities(other, "corpus") != identities(config, "corpus")


def test_plan_names_the_key_that_makes_a_stage_run_again(config: Config) -> None:
    run_stages(config, ["corpus"])
    rows = {row.stage: row for row in plan(changed(config, "corpus.min_chars=5"))}
    assert rows["corpus"].reason == "corpus.min_chars 1 -> 5"
    rows = {row.stage: row for row in plan(changed(config, "pretrain.steps=7"))}
    assert (rows["corpus"].state, rows["vocab"].reason) == ("done", "never run in this work_dir")


def test_a_change_of_pretrain_reaches_pretrain_export_and_xnli_only(config: Config) -> None:
    before, after = plan(config), plan(changed(config, "pretrain.steps=7"))
    moved = [old.stage for old, new in zip(before, after, strict=True) if old.fingerprint != new.fingerprint]
    assert moved == ["pretrain", "export", "xnli"]


def test_plan_says_what_hides_a_stage(config: Config) -> None:
    rows = {row.stage: row for row in plan(changed(config, "corpus.inputs=[]"))}
    assert "corpus.inputs is empty" in rows["corpus"].reason
    assert rows["tokens"].reason == "waits for corpus"


def test_a_flipped_bit_is_named_by_verify_and_refused_by_readers(config: Config) -> None:
    run_stages(config, ["corpus"])
    assert verify(config)[1] == []
    shard = corpus_dir(config) / "en" / "data-00000-of-00001.arrow"
    flip_bit(shard)
    assert [problem.split(": ")[0] for problem in verify(config)[1]] == [str(shard)]
    manifest = read_manifest(Folder(str(corpus_dir(config))))
    assert manifest is not None
    with pytest.raises(PipelineError, match=r"en/data-00000-of-00001\.arrow: its bytes are not the ones"):
        fetch(Folder(str(corpus_dir(config))), manifest.parts["en/data-00000-of-00001.arrow"])


@pytest.mark.parametrize("change", ["delete", "truncate", "add"])
def test_verify_names_missing_truncated_and_unexpected_files(config: Config, change: str) -> None:
    run_stages(config, ["corpus"])
    shard = corpus_dir(config) / "de" / "data-00000-of-00001.arrow"
    if change == "delete":
        shard.unlink()
    elif change == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard = shard.with_name("data-00007-of-00001.arrow")
        shard.write_bytes(b"stranger")
    problems = verify(config)[1]
    assert len(problems) == 1 and problems[0].startswith(f"{shard}: ")


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", '{"format": 1}', '{"identity": {}, "parts": [], "stats": {}}', "\xff", "[1e999]", '{"a": NaN}'],
)
def test_a_damaged_manifest_is_named(config: Config, damage: str) -> None:
    run_stages(config, ["corpus"])
    (corpus_dir(config) / "MANIFEST.json").write_text(damage)
    with pytest.raises(PipelineError, match=r"MANIFEST\.json.*run the stage again"):
        run_stages(config, ["corpus"])


def test_an_edited_manifest_no_longer_fits_its_fingerprint(config: Config) -> None:
    run_stages(config, ["corpus"])
    path = corpus_dir(config) / "MANIFEST.json"
    path.write_text(path.read_text().replace('"min_chars": 1', '"min_chars": 2'))
    with pytest.raises(PipelineError, match="does not belong to its identity"):
        run_stages(config, ["corpus"])


def test_a_missing_upstream_stage_is_the_users_mistake(config: Config) -> None:
    with pytest.raises(UserError, match=r"vocab needs corpus .* run `mdeberta run corpus`"):
        run_stages(config, ["vocab"])


def test_an_input_that_changes_during_the_run_is_refused(config: Config) -> None:
    with open_run(STAGES["corpus"], config) as run:
        Path(config.corpus.inputs[0].replace("*", "en")).write_text("Swapped while the stage was at work.\n")
        with pytest.raises(PipelineError, match="an input file changed"):
            run.commit({})


def test_a_change_that_keeps_name_size_and_time_is_noticed_too(config: Config) -> None:
    path = Path(config.corpus.inputs[0].replace("*", "en"))
    before, times = identities(config, "corpus"), path.stat()
    path.write_bytes(path.read_bytes().replace(b"says", b"sais"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identities(config, "corpus") != before


def test_an_input_is_read_once_a_process_while_it_stays(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(stage, "open_url", lambda url, options: (read.append(url), open_url(url, options))[1])
    for _ in range(3):
        identities(config, "export")
    assert sorted(Path(url).name for url in read if url.endswith(".txt")) == ["de.txt", "en.txt"]


def test_a_half_done_stage_refuses_other_upstream_bytes(config: Config) -> None:
    run_stages(config, ["corpus"])
    with open_run(STAGES["vocab"], config):
        pass
    path = corpus_dir(config) / "MANIFEST.json"
    path.write_text(path.read_text().replace('"notes": []', '"notes": ["x"]'))
    with pytest.raises(PipelineError, match="begun on other upstream bytes"), open_run(STAGES["vocab"], config):
        pass


def test_a_record_without_its_file_or_of_another_size_does_not_count(tmp_path: Path) -> None:
    store = PartStore(Folder(str(tmp_path)))
    for name in ("a", "b", "c"):
        store.publish_bytes(f"x/{name}", b"12345", rows=1)
    (tmp_path / "x" / "a").unlink()
    (tmp_path / "x" / "b").write_bytes(b"1234")
    assert list(store.done()) == ["x/c"]
    store.forget("x/c")
    assert store.done() == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5))
def test_identities_survive_json_and_ignore_key_order(keys: dict[str, object]) -> None:
    identity = Identity("corpus", 1, keys, {}, {}, {})
    again = Identity.from_json(identity.to_json(), "x")
    backwards = Identity("corpus", 1, dict(reversed(keys.items())), {}, {}, {})
    assert identity.fingerprint == again.fingerprint == backwards.fingerprint


def test_the_command_names_the_altered_file_and_fails(config: Config, tmp_path: Path) -> None:
    run_stages(config, ["corpus"])
    path = tmp_path / "conf.yaml"
    path.write_text(configfile.dump(config))
    assert "files are as they were committed" in mdeberta("verify", "-c", str(path)).stdout
    flip_bit(corpus_dir(config) / "en" / "data-00000-of-00001.arrow")
    assert "data-00000-of-00001.arrow: altered" in mdeberta("verify", "-c", str(path), expect=1).stdout
