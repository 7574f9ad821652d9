"""The report: every number is the manifest's, hostile text stays text, and the page needs nothing but itself."""

from __future__ import annotations

import getpass
import hashlib
import math
import shutil
import socket
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import example_run
import numpy as np
import pytest
from example_run import commit, commit_all, corpus_stats, directory, jsonl, language_codes, log_lines, make_config
from html_page import Page, assert_drawings_have_names, assert_self_contained, svgs

from model.order import TrainingOrder
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.figures import corpus_figure, passes_in_training, seen_figure, tokens_figure, vocab_figure, xnli_figure
from pipeline.page import Figure
from pipeline.plots import bucket_band, linear, logarithmic, running_mean, short
from pipeline.report import render, write_report
from pipeline.storage import Folder

CODES = language_codes(5)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    found = make_config(tmp_path_factory.mktemp("run"))
    commit_all(found, CODES)
    return found


@pytest.fixture(scope="module")
def page(config: Config) -> str:
    return Path(write_report(config)).read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- numbers


def test_the_stage_table_says_what_ran(config: Config, page: str) -> None:
    rows = Page(page).table("Stages of this run")
    assert list(rows)[1:] == ["corpus", "vocab", "tokens", "pretrain", "export", "xnli"]
    fingerprint = directory(config, "corpus").url.rsplit("/", 1)[-1]
    assert rows["corpus"] == [fingerprint, "done", "12.6 min", "1234500000", "5", "20"]


def test_every_number_of_the_corpus_is_the_manifests(page: str) -> None:
    stats = corpus_stats(CODES)
    table = Page(page).table("Documents by language")
    headings = ["Documents", "Kept", "Dropped: duplicate", "Dropped: too short", "Rejected: invalid utf8", "Text"]
    assert table.pop("Language") == [*headings, "Characters"]
    assert list(table) == [*CODES, "all"]
    for name, counts in {**stats["languages"], "all": stats["totals"]}.items():
        wanted = [counts["documents_in"], counts["kept"], *counts["dropped"].values(), *counts["rejected"].values()]
        assert [int(cell.replace(",", "")) for cell in table[name]] == [*wanted, counts["text_bytes"], counts["chars"]]


def test_input_files_with_rejects_are_named_worst_first(page: str) -> None:
    table = Page(page).table("Input files with rejected documents")
    inputs = corpus_stats(CODES)["inputs"]
    guilty = [name for name, counts in inputs.items() if counts["rejected"]["invalid_utf8"]]
    assert list(table)[1:] == guilty
    assert table["en.txt.xz"] == ["invalid utf8 450", "450", "90,000"]


def test_every_number_of_the_vocabulary_is_the_manifests(page: str) -> None:
    stats = example_run.vocab_stats(CODES)
    table = Page(page).table("Vocabulary by language")
    for name in CODES:
        counts, shares = stats["languages"][name], stats["sampling"][name]
        assert table[name] == [
            f"{100 * shares['share_before']:.4f} %",
            f"{100 * shares['share_after']:.4f} %",
            str(counts["sample_bytes"]),
            f"{counts['fertility']:.3f}",
            f"a {counts['unit']}",
            f"{100 * counts['unknown_rate']:.4f} %",
            f"{counts['bytes_per_token']:.3f}",
        ]


def test_every_number_of_the_tokens_is_the_manifests(page: str) -> None:
    stats = example_run.tokens_stats(CODES)["languages"]
    table = Page(page).table("Rows and tokens by language")
    splits = [(split, what) for split in ("train", "validation") for what in ("rows", "tokens")]
    for name in CODES:
        *counts, fill, _ = table[name]
        assert [int(cell.replace(",", "")) for cell in counts] == [stats[name][split][what] for split, what in splits]
        assert fill == f"{100 * stats[name]['fill']:.2f} %"
    sums = [sum(counts[split][what] for counts in stats.values()) for split, what in splits]
    assert [int(cell.replace(",", "")) for cell in table["all"][:4]] == sums


def test_the_last_losses_and_the_speed_are_the_logs(page: str) -> None:
    losses, metrics = log_lines(200)
    text = Page(page).text
    assert f"loss {losses[-1]['generator_loss']:#.4g}" in text
    assert f"held-out {losses[-1]['validation_discriminator_loss']:#.4g}" in text
    assert f"F1 {100 * losses[-1]['replaced_f1']:.2f} %" in text
    assert f"speed {metrics[-1]['tokens_per_second']:,.0f}" in text
    assert f"generator {losses[-1]['generator_embedding_cosine']:#.4g}" in text
    assert f"discriminator {losses[-1]['discriminator_embedding_cosine']:#.4g}" in text
    assert "The log reaches step 200 of 200." in text


def test_held_out_measures_of_every_language_are_the_logs(page: str) -> None:
    losses, _ = log_lines(200, codes=CODES)
    first, last = (losses[step - 1]["validation_by_language"] for step in (20, 200))
    table = Page(page).table("Held-out rows by language")
    assert list(table) == ["Language", *CODES]
    for name in CODES:
        before, after = first[name], last[name]
        assert table[name] == [
            f"{before['generator_loss']:#.4g}",
            f"{after['generator_loss']:#.4g}",
            f"{after['generator_loss'] - before['generator_loss']:+.3f}",
            f"{100 * before['replaced_f1']:.2f} %",
            f"{100 * after['replaced_f1']:.2f} %",
            f"{100 * (after['replaced_f1'] - before['replaced_f1']):+.2f}",
        ]
    assert "The loss on held-out rows fell in 5 of 5 languages." in Page(page).text


def test_only_the_languages_with_the_most_tokens_are_drawn(tmp_path: Path) -> None:
    codes = language_codes(12)
    config = make_config(tmp_path)
    commit_all(config, codes)
    text = render(config)
    (chart,) = [svg for svg in svgs(text) if svg.get("aria-label") == "Guessing the masked tokens, by language"]
    assert sum("line" in str(path.get("class")) for path in chart.iter("path")) == 5
    assert sum("dashed" in str(path.get("class")) for path in chart.iter("path")) == 5
    assert "The 10 languages with the most tokens" in Page(text).text
    assert len(Page(text).table("Held-out rows by language")) == 1 + 12


def test_tokens_seen_stand_beside_the_shares_aimed_at(page: str) -> None:
    losses, _ = log_lines(200, codes=CODES)
    seen = losses[-1]["tokens_by_language"]
    trained = {name: counts["train"] for name, counts in example_run.tokens_stats(CODES)["languages"].items()}
    drawn = {name: counts["tokens"] ** 0.3 * counts["tokens"] / counts["rows"] for name, counts in trained.items()}
    table = Page(page).table("Tokens seen by language")
    for name in CODES:
        assert table[name] == [
            f"{seen[name]:,}",
            f"{100 * seen[name] / sum(seen.values()):.4f} %",
            f"{100 * drawn[name] / sum(drawn.values()):.4f} %",
        ]
    assert table["all"][0] == f"{sum(seen.values()):,}"


def test_time_memory_and_incidents_of_training_are_told(page: str) -> None:
    table = Page(page).table("Where the training time goes")
    assert table["discriminator"][1] == "40.00 %"
    assert table["the rest"][1] == "10.00 %"
    assert table["all"][0] == "4.2 min"
    text = Page(page).text
    assert "Steps skipped because their gradient was not finite: 3." in text
    assert "Returns to an earlier checkpoint after the loss had jumped: 1." in text
    assert "at most 71.2 GB of memory" in text
    assert "share 41.25 %" in text


def test_a_run_that_logged_less_gives_a_page_without_the_rest(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    example_run.commit_upstream(config, CODES)
    example_run.commit_pretrain(config, *log_lines(200))
    page = Page(render(config))
    tables = {"Where the training time goes", "Held-out rows by language", "Tokens seen by language"}
    assert not tables & set(page.tables)
    for word in ("skipped", "memory in use", "Utilisation", "language by language"):
        assert word not in page.text
    assert f"loss {log_lines(200)[0][-1]['generator_loss']:#.4g}" in page.text


def test_a_masked_language_model_is_not_called_a_generator(tmp_path: Path) -> None:
    config = make_config(tmp_path, pretrain={"objective": "mlm", "steps": 200, "global_batch": 64})
    commit_all(config, CODES)
    losses, _ = log_lines(200, "mlm")
    page = Page(render(config))
    assert "Masked language modelling: one network of width 768, 12 layers deep, 200 steps of 64 rows." in page.text
    assert f"loss {losses[-1]['generator_loss']:#.4g}" in page.text
    assert f"model {losses[-1]['generator_embedding_cosine']:#.4g}" in page.text
    drawn = page.text.split("Pretraining")[-1].split("Settings")[0].lower()
    assert "generator" not in drawn and "discriminator" not in drawn


def test_xnli_shows_scores_intervals_and_average(page: str) -> None:
    results = example_run.xnli_results()
    table = Page(page).table("XNLI by language")
    assert list(table) == ["Language", "en", "de", "sw", "average"]
    assert table["en"] == ["81.2 %", "79.1 % to 83.4 %", "1,501"]
    assert table["average"][0] == f"{100 * results['average']['accuracy']:.1f} %"
    text = Page(page).text
    assert "fine-tuned on English pairs alone: 9,001 pairs, 283 steps" in text
    assert "17 of the scored pairs were also trained on." in text
    assert "chance, 33.3 %" in text


def test_exported_files_are_listed_with_digest_parameters_and_size(page: str) -> None:
    rows = Page(page).table("Published files")
    assert rows["model.safetensors"] == [hashlib.sha256(b"weights").hexdigest()[:16], "278,218,752", "7"]


def test_settings_and_tool_versions_are_listed(config: Config, page: str) -> None:
    rows = Page(page).table("Settings and tool versions that decide the bytes")
    assert rows["pretrain.steps"] == ["200"]
    assert rows["pretrain.model.hidden_size"] == [str(config.pretrain.model.hidden_size)]
    assert "corpus: pyarrow" in rows


def test_passes_are_those_of_the_real_training_order() -> None:
    tokens, rows, drawn = {"en": 90_000, "de": 20_000, "sw": 900}, {"en": 200, "de": 45, "sw": 3}, 6_000
    order = TrainingOrder(list(rows.values()), [n**0.3 for n in tokens.values()], seed=7)
    counted = np.bincount(order.samples(np.arange(drawn)).language, minlength=3)
    passes = passes_in_training(tokens, rows, 0.3, drawn)
    assert [passes[name] * rows[name] for name in rows] == pytest.approx(counted.tolist(), abs=2)


# -------------------------------------------------------------------------------------------------------------- safety


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    config = make_config(tmp_path, export={"model_name": f"</title>{evil}"})
    stats = corpus_stats(CODES)
    stats["inputs"] = {
        f"{evil}&amp;.txt": {"documents_in": 9, "kept": 1, "dropped": {}, "rejected": {'"><img src=x onerror=y>': 8}},
        "bad\x1b[31m.txt": {"documents_in": 2, "kept": 1, "dropped": {}, "rejected": {"</svg>": 1}},
    }
    stats["languages"][f"</text>{evil}"] = {**stats["languages"]["en"], "rejected": {"</title><b>": 3}}
    commit(config, "corpus", stats, {})
    text = Path(write_report(config)).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    rows = page.table("Input files with rejected documents")
    assert rows[f"{evil}&amp;.txt"][0] == '"><img src=x onerror=y> 8'
    assert "bad\N{REPLACEMENT CHARACTER}[31m.txt" in rows
    assert f"</title>{evil}" in page.text
    assert svgs(text)


def test_the_page_fetches_nothing(page: str) -> None:
    assert_self_contained(page)


def test_the_page_knows_no_place_time_or_person(config: Config, page: str, tmp_path: Path) -> None:
    for word in (
        config.work_dir,
        str(Path(config.work_dir).parent),
        socket.gethostname(),
        str(time.localtime().tm_year),
    ):
        assert word not in page
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in page
    shutil.copytree(config.work_dir, tmp_path / "moved")
    moved = config.model_copy(update={"work_dir": str(tmp_path / "moved")})
    assert render(moved) == page


def test_credentials_of_an_object_store_stay_out(tmp_path: Path, s3_options: dict[str, dict[str, Any]]) -> None:
    config = make_config(tmp_path, work_dir="s3://bucket/report", storage_options=s3_options)
    commit(config, "corpus", corpus_stats(CODES), {})
    where = write_report(config)
    assert where == "s3://bucket/report/report.html"
    text = Folder("s3://bucket/report", s3_options).read("report.html").decode()
    assert Page(text).table("Documents by language")["en"][0] == "90,000"
    for secret in s3_options["s3"].values():
        assert secret not in text


# ------------------------------------------------------------------------------------------------ what is not there yet


def test_an_empty_work_directory_gives_a_page_of_missing_stages(tmp_path: Path) -> None:
    page = Page(Path(write_report(make_config(tmp_path))).read_text(encoding="utf-8"))
    rows = page.table("Stages of this run")
    assert {name: cells[1] for name, cells in rows.items() if name != "Stage"} == dict.fromkeys(
        ["corpus", "vocab", "tokens", "pretrain", "export", "xnli"], "missing"
    )
    assert page.text.count("Not run yet.") == 6


def test_a_run_in_training_shows_its_curves_so_far(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    commit(config, "corpus", corpus_stats(CODES), {})
    commit(config, "vocab", example_run.vocab_stats(CODES), {})
    commit(config, "tokens", example_run.tokens_stats(CODES), {})
    _, metrics = log_lines(200, codes=CODES)
    metrics[30]["discriminator_loss"], metrics[31]["generator_loss"] = math.nan, math.inf
    with example_run.open_run(example_run.STAGES["pretrain"], config) as run:
        assert run is not None
        half = b'{"step": 121, "validation_by_language": {"en": {"generator_loss": 2.5}'
        run.folder.write("metrics.jsonl", jsonl(metrics[:120]) + half)
    page = Page(render(config))
    assert "Begun and not finished" in page.text
    assert "The log reaches step 120 of 200." in page.text
    assert "2 logged values are not finite numbers" in page.text
    assert f"loss {metrics[119]['generator_loss']:#.4g}" in page.text
    assert page.table("Tokens seen by language")["en"][0] == "120,000"
    assert page.text.count("Not run yet.") == 2


def test_damaged_losses_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    commit_all(config, CODES)
    losses = Path(directory(config, "pretrain").path("losses.jsonl"))
    losses.write_bytes(losses.read_bytes().replace(b"generator", b"Generator", 1))
    with pytest.raises(PipelineError, match=r"losses\.jsonl"):
        render(config)


# ------------------------------------------------------------------------------------------------------------- drawings


def test_every_drawing_is_xml_with_a_name(page: str) -> None:
    assert_drawings_have_names(page)
    charts = [svg for svg in svgs(page) if svg.get("class") == "chart"]
    assert len(charts) == 3 + 3 + 3 + 10 + 3 + 2 + 1  # corpus, vocabulary, tokens; training (thrice); XNLI


def figures(codes: list[str]) -> list[Figure]:
    tokens = example_run.tokens_stats(codes)["languages"]
    vocab = example_run.vocab_stats(codes)
    return [
        corpus_figure(corpus_stats(codes)["languages"]),
        vocab_figure(vocab["languages"], vocab["sampling"]),
        tokens_figure(tokens, {code: 3.0 * index for index, code in enumerate(codes)}),
        seen_figure({name: counts["train"]["tokens"] for name, counts in tokens.items()}, dict.fromkeys(codes, 0.01)),
        xnli_figure({code: {"accuracy": 0.7, "interval_95": [0.6, 0.8]} for code in codes}, 0.7, 1 / 3),
    ]


@pytest.mark.parametrize("count", [1, 5, 40, 41, 107, 300])
def test_nothing_leaves_its_panel_and_ticks_keep_clear(count: int) -> None:
    panels = [panel.svg for figure in figures(language_codes(count)) for panel in figure.panels]
    for chart in svgs("".join(panels)):
        _, _, width, height = (float(number) for number in str(chart.get("viewBox")).split())
        for shape in chart.iter():
            x, y = (float(shape.get(name, shape.get(f"c{name}", 0))) for name in "xy")
            assert 0 <= x <= width and 0 <= y <= height
            assert x + float(shape.get("width", 0)) <= width
        assert_apart([text for text in chart.iter("text") if str(text.get("class")).startswith("tick")])


def assert_apart(labels: list[ElementTree.Element]) -> None:
    """Labels at one height keep clear of one another, with 6 units a character and centred or ending at their x."""
    lines: dict[str | None, list[tuple[float, float, str]]] = {}
    for label in labels:
        size = 6.0 * len(str(label.text))
        left = float(label.get("x", 0)) - (size if "last" in str(label.get("class")) else size / 2)
        lines.setdefault(label.get("y"), []).append((left, left + size, str(label.text)))
    for line in lines.values():
        for first, second in pairwise(sorted(line)):
            assert first[1] + 4 <= second[0], f"{first[2]} runs into {second[2]}"


def test_a_full_report_of_107_languages_is_small_and_quick(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=5000)
    commit_all(config, language_codes(107))
    started = time.perf_counter()
    path = Path(write_report(config))
    assert time.perf_counter() - started < 2.0
    assert path.stat().st_size < 2_000_000
    table = Page(path.read_text(encoding="utf-8")).table("Documents by language")
    assert set(language_codes(107)) <= set(table)


def test_a_long_curve_keeps_its_spikes_and_its_mean() -> None:
    steps = np.arange(100_000, dtype=np.float64)
    values = np.sin(steps / 9000)
    values[54_321] = 40.0
    middles, lows, highs = bucket_band(steps, values)
    assert len(middles) == 300
    assert highs.max() == 40.0 and lows.min() == values.min()
    smooth = running_mean(values)
    assert smooth[[0, -1]] == pytest.approx(values[[0, -1]])
    assert smooth[54_321] == pytest.approx(values[53_321:55_322].mean())


def test_ticks_are_round_numbers_inside_the_axis() -> None:
    axis = linear("loss", "nats", [1.93, 11.7], zero=True)
    assert axis.ticks(6) == [0, 5, 10] and axis.low == 0 and axis.high == 12
    axis = logarithmic("tokens", "", [37, 5_200_000])
    assert [short(tick) for tick in axis.ticks(6)] == ["100", "1k", "10k", "100k", "1M", "10M"][: len(axis.ticks(6))]
    assert 0 < axis.at(37) < 0.15 and 0.9 < axis.at(5_200_000) <= 1
    assert axis.at(0) == 0
    assert short(0.0005) == "5e-4" and short(1_500_000) == "1.5M"
