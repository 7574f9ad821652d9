"""The ablation: arms differ in nothing but what is compared, the page holds the logs' numbers, kills cost little."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest
import yaml
from example_run import commit_pretrain, commit_upstream, directory, jsonl, language_codes, log_lines, make_config
from html_page import Page, assert_drawings_have_names, assert_self_contained, svgs
from support import mdeberta, start
from whole_run import small

from pipeline.ablation import ARMS, Arm, make_arms, render, write_page
from pipeline.stage import identities, open_run
from pipeline.stages import STAGES
from pipeline.trainingfigures import ARM_COLOURS

STEPS = 200
ALL = ",".join(ARMS)
RESULTS = "The arms at their last step"


def write_config(folder: Path, **pretrain: Any) -> str:
    """A config file whose inputs exist."""
    config = make_config(folder, pretrain={"steps": STEPS, "global_batch": 64, **pretrain})
    (folder / "conf.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return str(folder / "conf.yaml")


def lines_of(arm: str, steps: int = STEPS) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What an arm logs; the generators of nes and gdes are equal, as they are where updates are decoupled."""
    losses, metrics = log_lines(steps, "mlm" if arm == "mlm" else "rtd")
    factor = {"mlm": 0.8, "es": 1.1}.get(arm, 1.0)
    slower = {"nes": 1.3, "gdes": 0.9}.get(arm, 1.0)
    for line in (*losses, *metrics):
        for key in line.keys() - {"step"}:
            if "generator_loss" in key and not key.endswith("hex"):
                line[key] *= factor
            elif "discriminator" in key or "f1" in key:
                line[key] *= slower
    return losses, metrics


def commit_arms(arms: list[Arm]) -> None:
    commit_upstream(arms[0].config, language_codes(3))
    for arm in arms:
        commit_pretrain(arm.config, *lines_of(arm.name))


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list[Arm]:
    found = make_arms(write_config(tmp_path_factory.mktemp("run")), [], ALL)
    commit_arms(found)
    return found


@pytest.fixture(scope="module")
def page(arms: list[Arm]) -> str:
    return Path(write_page(arms)).read_text(encoding="utf-8")


def charts(page: str) -> dict[str, Element]:
    return {str(svg.get("aria-label")): svg for svg in svgs(page) if svg.get("class") == "chart"}


def styles(chart: Element) -> set[str]:
    return {str(path.get("class")) for path in chart.iter("path")}


# ---------------------------------------------------------------------------------------------------------------- arms


def test_arms_differ_in_objective_and_sharing_alone(arms: list[Arm]) -> None:
    assert [arm.name for arm in arms] == ["mlm", "es", "nes", "gdes"]
    found = [identities(arm.config, "pretrain") for arm in arms]
    for stage in ("corpus", "vocab", "tokens"):
        assert len({of_arm[stage].fingerprint for of_arm in found}) == 1
    assert len({of_arm["pretrain"].fingerprint for of_arm in found}) == 4
    varied = {"objective", "embedding_sharing", "updates"}
    assert len({arm.config.pretrain.model_copy(update=dict.fromkeys(varied)).model_dump_json() for arm in arms}) == 1
    assert [arm.config.pretrain.objective for arm in arms] == ["mlm", "rtd", "rtd", "rtd"]
    assert [arm.config.pretrain.embedding_sharing for arm in arms[1:]] == ["es", "nes", "gdes"]


@pytest.mark.parametrize(
    ("updates", "joint"), [(None, [True, False, False]), ("decoupled", [True, False, False]), ("joint", [True] * 3)]
)
def test_es_is_joint_and_the_others_as_the_config_says(tmp_path: Path, updates: str | None, joint: list[bool]) -> None:
    found = make_arms(write_config(tmp_path, updates=updates), [], "gdes, nes,es")
    assert [arm.config.pretrain.joint for arm in found] == joint


def test_what_was_trained_before_is_an_arm(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for name, override in (("mlm", "objective=mlm"), ("es", "embedding_sharing=es"), ("nes", "embedding_sharing=nes")):
        (own,) = make_arms(path, [f"pretrain.{override}"], name)
        (arm,) = make_arms(path, [], name)
        assert directory(arm.config, "pretrain") == directory(own.config, "pretrain")


def test_overrides_reach_every_arm(tmp_path: Path) -> None:
    found = make_arms(write_config(tmp_path), ["pretrain.steps=7", "pretrain.objective=mlm"], ALL)
    assert [arm.config.pretrain.steps for arm in found] == [7] * 4
    assert [arm.config.pretrain.objective for arm in found] == ["mlm", "rtd", "rtd", "rtd"]


# ----------------------------------------------------------------------------------------------------------------- page


def test_the_table_holds_the_numbers_of_the_logs(arms: list[Arm], page: str) -> None:
    rows = Page(page).table(RESULTS)
    assert list(rows) == ["Arm", "mlm", "es", "nes", "gdes"]
    for name in ARMS:
        last = lines_of(name)[0][-1]
        wanted = [f"{STEPS}", f"{STEPS * 1.25 / 60:.2f}"]
        wanted += [f"{last[f'{prefix}generator_loss']:#.4g}" for prefix in ("", "validation_")]
        if name == "mlm":
            wanted += ["–"] * 4 + [f"{last['generator_embedding_cosine']:.3f}", "–"]
        else:
            wanted += [f"{last[f'{prefix}discriminator_loss']:#.4g}" for prefix in ("", "validation_")]
            wanted += [f"{100 * last[f'{prefix}replaced_f1']:.2f} %" for prefix in ("", "validation_")]
            wanted += [f"{last[f'{network}_embedding_cosine']:.3f}" for network in ("generator", "discriminator")]
        assert rows[name] == wanted
    assert rows["Arm"][1] == "Training minutes"


def test_every_measure_has_a_chart_against_steps_and_losses_against_time(page: str) -> None:
    assert_drawings_have_names(page)
    found = charts(page)
    assert list(found) == [
        *(f"{what}, step" for what in ("Generator", "Discriminator", "Finding the replaced tokens")),
        *(f"{what}, minutes of training" for what in ("Generator", "Discriminator", "Finding the replaced tokens")),
        *(f"Embeddings {what}, step" for what in ("E_G of the generator", "E_D of the discriminator")),
    ]
    drawn = {
        title: {style.split()[0] for style in styles(chart)} & set(ARM_COLOURS.values())
        for title, chart in found.items()
    }
    assert drawn["Generator, step"] == set(ARM_COLOURS.values())
    assert drawn["Discriminator, step"] == set(ARM_COLOURS.values()) - {ARM_COLOURS["mlm"]}


def test_an_arm_does_not_hide_an_equal_one(page: str) -> None:
    assert {"blue line gaps", "blue dashed gaps"} <= styles(charts(page)["Generator, step"])
    assert not [style for style in styles(charts(page)["Discriminator, step"]) if "gaps" in style]


def test_the_papers_pattern_and_the_masked_language_model_are_explained(arms: list[Arm], page: str) -> None:
    text = Page(page).text
    assert "ES 0.02, its one table; NES 0.45 in E_G and 0.02 in E_D; GDES 0.45 in E_G and 0.29 in E_D" in text
    assert "(12 layers, a generator has 6) that masks up to 3 neighbouring words together: it is no generator" in text
    assert "What stands for mlm" not in render(arms[1:])


def test_the_page_is_safe_and_knows_no_place(arms: list[Arm], page: str, tmp_path: Path) -> None:
    assert_self_contained(page)
    for word in (arms[0].config.work_dir, socket.gethostname(), "conf.yaml"):
        assert word not in page
    shutil.copytree(arms[0].config.work_dir, tmp_path / "moved")
    moved = {"work_dir": str(tmp_path / "moved")}
    assert render([Arm(arm.name, arm.config.model_copy(update=moved), ()) for arm in arms]) == page
    evil = '</title><script>alert("x")</script>'
    export = arms[0].config.export.model_copy(update={"model_name": evil})
    hostile = render([Arm(arm.name, arm.config.model_copy(update={"export": export}), ()) for arm in arms])
    assert_self_contained(hostile)
    assert f"{evil}: ablation" in Page(hostile).text


def test_arms_that_are_not_finished_show_what_there_is(tmp_path: Path) -> None:
    arms = make_arms(write_config(tmp_path), [], ALL)
    assert Page(render(arms)).table(RESULTS)["gdes"] == ["0", *["–"] * 9]
    commit_arms(arms[:2])
    _, metrics = lines_of("nes")
    with open_run(STAGES["pretrain"], arms[2].config) as run:
        run.folder.write("metrics.jsonl", jsonl(metrics[:120]) + b'{"step": 121, "generator_lo')
    page = render(arms)
    rows = Page(page).table(RESULTS)
    assert rows["nes"][:3] == ["120 of 200", "2.50", f"{metrics[119]['generator_loss']:#.4g}"]
    assert rows["gdes"][0] == "0"
    assert [item for item in ("mlm", "es", "nes", "gdes") if f"</svg> {item}</li>" in page] == ["mlm", "es", "nes"]


def test_the_time_of_a_value_lies_between_the_logged_ones(tmp_path: Path) -> None:
    (arm,) = make_arms(write_config(tmp_path, log_every=10, validate_every=5), [], "nes")
    commit_upstream(arm.config, language_codes(3))
    lines = [{"step": step, "generator_loss": 2.0, "seconds": 300.0} for step in (10, 20)]
    lines += [{"step": step, "validation_generator_loss": 3.0} for step in (5, 15)]
    commit_pretrain(arm.config, *[sorted(lines, key=lambda line: line["step"])] * 2)
    chart = charts(render([arm]))["Generator, minutes of training"]
    (dashes,) = (path.get("d") for path in chart.iter("path") if path.get("class") == "amber dashed")
    left, right = 42.0, 350.0
    places = [float(point.split()[0]) for point in str(dashes)[1:].split("L")]
    assert places == pytest.approx([left + (right - left) * share for share in (0.25, 0.75)], abs=0.06)


# ---------------------------------------------------------------------------------------------------- the real command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The work directory of a whole ablation, and what it said."""
    work = tmp_path_factory.mktemp("ablation") / "work"
    return work, mdeberta("ablate", *small(work), "--arms", ALL).stdout


def in_training(work: Path) -> bool:
    """Whether an arm has a checkpoint and is not committed."""
    return bool(
        {path.parents[2].name for path in work.glob("pretrain/*/checkpoints/*/COMMITTED.json")} - set(losses(work))
    )


def losses(work: Path) -> dict[str, bytes]:
    """Directory name -> committed log of every trained arm."""
    return {path.parent.name: path.read_bytes() for path in sorted(work.glob("pretrain/*/losses.jsonl"))}


@pytest.mark.slow
def test_the_command_trains_every_arm_on_one_copy_of_the_rows(finished: tuple[Path, str]) -> None:
    work, said = finished
    assert {name: len(list((work / name).iterdir())) for name in STAGES if (work / name).exists()} == {
        "corpus": 1,
        "vocab": 1,
        "tokens": 1,
        "pretrain": len(ARMS),
    }
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    table = Page((work / "ablation.html").read_text(encoding="utf-8")).table(RESULTS)
    for name in ARMS:
        assert rows[name] == [name, *" ".join(table[name]).split()]
        assert rows[name][1] == "24" and float(rows[name][2]) > 0
    assert rows["mlm"].count("–") == 5
    assert rows["es"][-1] == rows["es"][-2]  # the one table
    assert "–" not in rows["es"] + rows["nes"] + rows["gdes"]
    assert rows["nes"][3:5] == rows["gdes"][3:5]  # their generators learn alike
    assert rows["nes"][-1] != rows["gdes"][-1]
    assert said.endswith(f"ablation: {work}/ablation.html\n")


@pytest.mark.slow
def test_a_killed_ablation_goes_on(finished: tuple[Path, str], tmp_path: Path) -> None:
    whole, _ = finished
    for stage in ("corpus", "vocab", "tokens"):
        shutil.copytree(whole / stage, tmp_path / stage)
    command = ["ablate", *small(tmp_path), "--arms", "nes,gdes"]
    process = start(*command)
    end = time.monotonic() + 200
    while not (len(losses(tmp_path)) == 1 and in_training(tmp_path)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(losses(tmp_path)) == 1
    done = mdeberta(*command)
    assert done.stderr.count("pretrain: committed already, nothing to do") == 1
    assert "pretrain: continuing after step" in done.stderr
    resumed = losses(tmp_path)
    assert len(resumed) == 2 and resumed.items() <= losses(whole).items()
