"""The xnli stage: every language scored and counted, the loop reproducible, and a kill -9 that changes no byte."""

from __future__ import annotations

import csv
import json
import lzma
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import yaml
from safetensors.torch import load_file, save_file
from support import mdeberta, start, tree

from model.finetune import Plan, grouped_batches, load_classifier
from model.nli_data import LABELS
from model.xnli import wilson_interval
from pipeline.config import Config, XnliConfig
from pipeline.errors import PipelineError, UserError
from pipeline.execute import run_stages
from pipeline.stage import identities, stage_folder

ENTAILED = [("A dog runs in the park.", "An animal is outside."), ("Two men are playing chess.", "People play a game.")]
SMALL = {"epochs": 2, "batch_size": 8, "max_seq_len": 64, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def sample(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real XNLI dev pairs, 12 for each of 15 languages, and 160 real training pairs of two languages."""
    folder = tmp_path_factory.mktemp("xnli")
    rows = lzma.decompress((shared_data / "xnli" / "xnli.dev.tsv.xz").read_bytes()).decode().split("\n")[:-1]
    kept, seen = rows[:1], Counter[str]()
    for row in rows[1:]:
        language = row.split("\t")[0]
        seen[language] += 1
        kept += [row] if seen[language] <= 12 else []
    kept.append(
        kept[-1]
        .replace("\tneutral\t", "\t-\t")
        .replace("\tcontradiction\t", "\t-\t")
        .replace("\tentailment\t", "\t-\t")
    )
    (folder / "xnli.tsv.xz").write_bytes(lzma.compress(("\n".join(kept) + "\n").encode()))
    for name, count in (("snli-en-20k", 120), ("indonli-id-12k", 40)):
        source = lzma.decompress((shared_data / "xnli" / "train" / f"{name}.tsv.xz").read_bytes())
        (folder / f"{name}.tsv").write_bytes(b"".join(source.splitlines(keepends=True)[:count]))
    return folder


def settings(work: Path, sample: Path, **xnli: Any) -> Config:
    """A config whose checkpoint is exported already."""
    files = {"data": [str(sample / "xnli.tsv.xz")], "train": [str(sample / "*-*.tsv")]}
    config = tiny_model.config(work, xnli={**files, **SMALL, **xnli})
    tiny_model.commit_pretrained(config)
    run_stages(config, ["export"])
    return config


def folder_of(config: Config, stage: str = "xnli") -> Path:
    return Path(stage_folder(config, identities(config, stage)[stage]).path())


def results(config: Config) -> dict[str, Any]:
    run_stages(config, ["xnli"])
    found: dict[str, Any] = json.loads((folder_of(config) / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def scored(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = settings(tmp_path_factory.mktemp("scored"), sample)
    run_stages(config, ["xnli"])
    return config


def test_every_language_is_scored_and_adds_up(scored: Config) -> None:
    found = results(scored)
    assert len(found["languages"]) == found["average"]["languages"] == 15
    for language, result in found["languages"].items():
        lines = (folder_of(scored) / "predictions" / f"{language}.tsv").read_text().splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        right = sum(row["gold"] == row["predicted"] for row in rows)
        assert len(rows) == result["pairs"] == 12
        assert result["correct"] == right and result["accuracy"] == round(right / 12, 6)
        assert result["interval_95"] == [round(bound, 6) for bound in wilson_interval(right, 12)]
        assert result["predicted"] == {name: [row["predicted"] for row in rows].count(name) for name in LABELS}
        for row in rows:
            shares = [float(row[name]) for name in LABELS]
            assert abs(sum(shares) - 1) < 1e-3 and row["predicted"] == LABELS[int(np.argmax(shares))]
    mean = np.mean([result["accuracy"] for result in found["languages"].values()])
    assert found["average"]["accuracy"] == pytest.approx(mean, abs=1e-6)
    table = (folder_of(scored) / "results.md").read_text()
    assert all(f"| {language} | 12 |" in table for language in found["languages"])


def test_results_tell_what_they_rest_on(scored: Config) -> None:
    found = results(scored)
    assert found["mode"] == "zero_shot" and found["settings"]["seed"] == 42
    assert found["training"]["pairs"] == sum(found["training"]["labels"].values()) == 120
    assert found["training"]["steps"] == 30
    assert found["training"]["files"] == [
        {"name": "indonli-id-12k.tsv", "languages": {"id": 40}, "unlabelled": 0},
        {"name": "snli-en-20k.tsv", "languages": {"en": 120}, "unlabelled": 0},
    ]
    assert [(file["name"], file["unlabelled"]) for file in found["evaluation"]["files"]] == [("xnli.tsv.xz", 1)]
    assert found["evaluation"]["pairs"] == 180
    assert found["model"]["export"] == folder_of(scored, "export").name


def test_translate_train_all_uses_every_language_and_limits_hold(sample: Path, tmp_path: Path) -> None:
    limits = {"max_train_pairs": 150, "max_eval_pairs": 5, "epochs": 0.5, "precision": "bf16"}
    found = results(settings(tmp_path, sample, mode="translate_train_all", **limits))
    assert found["training"]["pairs"] == 150
    assert found["training"]["steps"] == 10
    assert {result["pairs"] for result in found["languages"].values()} == {5}


def test_learns_what_can_be_learnt(tmp_path: Path) -> None:
    """Labels that show in single words are learnt, and pairs that were trained on are reported."""
    words = {"entailment": "house", "neutral": "The", "contradiction": "Das"}
    rows = [f"The {word} is {i}.\t{word} {word}\t{label}\n" for i in range(40) for label, word in words.items()]
    (tmp_path / "train.tsv").write_text("".join(rows))
    (tmp_path / "test.tsv").write_text("".join(row.replace(" is ", " was ") for row in rows[:60]) + "".join(rows[:9]))
    files = {"data": [str(tmp_path / "test.tsv")], "train": [str(tmp_path / "train.tsv")]}
    found = results(settings(tmp_path / "work", tmp_path, **files, epochs=8, learning_rate=3e-3))
    assert found["languages"]["en"]["accuracy"] > 0.9
    assert found["languages"]["en"]["seen_in_training"] == found["seen_in_training"] == 9


def test_zero_shot_without_english_pairs_is_refused(sample: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, sample, train=[str(sample / "indonli*.tsv")])
    with pytest.raises(UserError, match=r"xnli.train holds no labelled English pair.*languages there: id"):
        run_stages(config, ["xnli"])


def test_export_that_misses_weights_is_refused(scored: Config, tmp_path: Path) -> None:
    export = folder_of(scored, "export")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((export / name).read_bytes())
    load_classifier(str(tmp_path), seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["embeddings.word_embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=r"word_embeddings.weight"):
        load_classifier(str(tmp_path), seed=1)


# ----------------------------------------------------------------------------------------------------------- resumption


def run_until(ready: Path, pattern: str, *arguments: str) -> None:
    """Start the command and `kill -9` its process group as soon as a file that matches the pattern is there."""
    process = start(*arguments)
    while not list(ready.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_kill_at_any_moment_changes_no_byte(sample: Path, tmp_path: Path) -> None:
    uninterrupted, killed = (settings(tmp_path / name, sample) for name in ("whole", "killed"))
    for config in (uninterrupted, killed):
        tree_of_config = json.loads(config.model_dump_json())
        Path(config.work_dir).with_suffix(".yaml").write_text(yaml.safe_dump(tree_of_config))
    command = ["run", "-c", f"{killed.work_dir}.yaml", "xnli"]
    folder = folder_of(killed)
    run_until(folder, "_parts/_work/checkpoint-*.json", *command)
    assert not (folder / "predictions").exists()
    run_until(folder, "_parts/predictions/d*.json", *command)
    assert not (folder / "results.json").exists()
    first = (folder / "predictions" / "ar.tsv").stat().st_mtime_ns
    mdeberta(*command)
    assert (folder / "predictions" / "ar.tsv").stat().st_mtime_ns == first
    mdeberta("run", "-c", f"{uninterrupted.work_dir}.yaml", "xnli")
    assert tree(folder) == tree(folder_of(uninterrupted))
    assert not (folder / "_work").exists()


# ---------------------------------------------------------------------------------------------------------------- parts


def test_batches_hold_every_row_once_and_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 5003)
    batches = grouped_batches(lengths, 32, seed=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(5003))
    assert {len(batch) for batch in batches} <= {32, 5003 % 32}
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum()
    again = grouped_batches(lengths, 32, seed=3)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert any(
        (a != b).any() for a, b in zip(batches, grouped_batches(lengths, 32, seed=4), strict=True) if len(a) == len(b)
    )


def test_plan_starts_anywhere_and_ends_where_it_should() -> None:
    plan = Plan(XnliConfig(epochs=2.5, batch_size=4, warmup_fraction=0.2, learning_rate=1.0), np.arange(1, 22))
    whole = list(plan.batches(0))
    assert plan.steps == len(whole) == 15 and [step for step, _ in whole] == list(range(15))
    for start_step in (1, 6, 7, 14, 15):
        rest = list(plan.batches(start_step))
        assert [(step, rows.tolist()) for step, rows in rest] == [(s, r.tolist()) for s, r in whole[start_step:]]
    rates = [plan.learning_rate(step) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"), [(5, 10, 0.2366, 0.7634), (0, 20, 0.0, 0.1611), (9, 9, 0.7008, 1)]
)
def test_wilson_interval_known_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)
