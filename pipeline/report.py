"""Writes `<work_dir>/report.html`: one self-contained page over everything that exists for a config.

Each stage becomes a `Section` of sentences, figures and tables made from its manifest's statistics. Nothing of hosts,
paths or options enters the page: the same work directory gives the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.artifact import Artifact
from pipeline.config import Config, PretrainConfig
from pipeline.figures import (
    by_size,
    corpus_figure,
    passes_in_training,
    ranked_reasons,
    reasons,
    seen_figure,
    seen_table,
    shares_aimed_at,
    tokens_figure,
    vocab_figure,
    vocab_tables,
    words,
    xnli_figure,
)
from pipeline.manifest import Part
from pipeline.page import Page, Section, Table, about, count, setting_rows, share, size
from pipeline.stage import read_manifest
from pipeline.stages import STAGES
from pipeline.status import StageStatus, duration, stage_statuses
from pipeline.storage import Folder
from pipeline.trainingfigures import (
    BY_LANGUAGE,
    METRICS,
    TOKENS_SEEN,
    improvement,
    incidents,
    languages_figure,
    languages_table,
    phases_table,
    training_figure,
)
from pipeline.traininglog import TrainingLog, training_log

REPORT_FILE = "report.html"
MOST_INPUTS = 200


@dataclass(frozen=True)
class Source:
    """What a section is made from: the config, the stage's status and directory, and the run's committed output."""

    config: Config
    status: StageStatus
    folder: Folder
    committed: Mapping[str, Artifact]

    @property
    def artifact(self) -> Artifact | None:
        """The committed output of the stage, None before."""
        return self.committed.get(self.status.row.stage)

    @property
    def stats(self) -> dict[str, Any]:
        """The statistics of the committed stage, none before."""
        return self.artifact.manifest.stats if self.artifact else {}

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of the committed stage, none before."""
        return self.artifact.manifest.parts if self.artifact else {}


def write_report(config: Config) -> str:
    """Write the page and return where it is.

    Raises:
        PipelineError: a manifest or a file that the report reads is damaged.
    """
    work_dir = Folder(config.work_dir, config.storage_options)
    work_dir.write(REPORT_FILE, render(config).encode())
    return f"{config.work_dir.rstrip('/')}/{REPORT_FILE}"


def render(config: Config) -> str:
    """The page as text."""
    sources = _sources(config)
    page = Page(
        title=f"{config.export.model_name}: run report",
        heading=config.export.model_name,
        introduction=_introduction(config.pretrain),
        facts=_facts(sources),
        overview=_stage_table(sources.values()),
        sections=[_section(source) for source in sources.values()],
        settings=_settings_table(sources.values()),
    )
    return page.render()


def _sources(config: Config) -> dict[str, Source]:
    committed: dict[str, Artifact] = {}
    sources = {}
    for status in stage_statuses(config):
        row = status.row
        folder = Folder(config.work_dir, config.storage_options) / row.stage / str(row.fingerprint)
        if row.state == "done" and (manifest := read_manifest(folder)):
            committed[row.stage] = Artifact(folder, manifest)
        sources[row.stage] = Source(config, status, folder, committed)
    return sources


def _section(source: Source) -> Section:
    row = source.status.row
    heading, build = _SECTIONS[row.stage]
    if source.artifact:
        return build(source)
    begun = row.state == "partial"
    missing = f"Begun and not finished: {row.parts_done:,} parts so far." if begun else "Not run yet."
    if begun and row.stage == "pretrain":
        live = _pretrain(source)
        return Section(heading, live.sentences, live.figures, live.tables, missing)
    return Section(heading, missing=missing)


# ----------------------------------------------------------------------------------------------------------- the header


def _introduction(pretrain: PretrainConfig) -> str:
    model, length = pretrain.model, f"{count(pretrain.steps)} steps of {count(pretrain.global_batch)} rows"
    if pretrain.objective == "mlm":
        return (
            f"Masked language modelling: one network of width {model.hidden_size}, {model.num_hidden_layers} layers "
            f"deep, {length}."
        )
    return (
        f"Replaced-token detection with {pretrain.embedding_sharing.upper()} embedding sharing: generator and "
        f"discriminator of width {model.hidden_size}, {model.generator_num_hidden_layers} and "
        f"{model.num_hidden_layers} layers deep, {length}."
    )


def _facts(sources: dict[str, Source]) -> list[tuple[str, str]]:
    """The run in a few figures: (value, what it is)."""
    facts: list[tuple[str, str]] = []
    if corpus := sources["corpus"].stats:
        totals = corpus["totals"]
        facts.append((count(len(corpus["languages"])), "languages"))
        facts += [(about(totals["kept"]), "documents"), (size(totals["text_bytes"]), "of text")]
    if vocab := sources["vocab"].stats:
        facts.append((count(vocab["pieces"]), "pieces"))
    if tokens := sources["tokens"].stats:
        facts.append((about(_total(tokens, "train", "tokens")), "training tokens"))
    if sources["pretrain"].artifact:
        facts.append((count(sources["pretrain"].config.pretrain.steps), "training steps"))
    if xnli := sources["xnli"].stats:
        facts.append((share(xnli["average"]["accuracy"], 1), "XNLI accuracy"))
    return facts


def _stage_table(sources: Iterable[Source]) -> Table:
    headings = ["Stage", "Fingerprint", "State", "Time logged", "Peak memory", "Parts", "Size"]
    return Table("Stages of this run", headings, [_stage_row(source) for source in sources], texts=3)


def _stage_row(source: Source) -> list[str]:
    row, logs = source.status.row, source.status.logs
    state = Markup('<span class="state {0}">{0}</span>').format(row.state)
    cells = [row.stage, row.fingerprint or "–", state, "–", "–", "–", "–"]
    if logs:
        cells[3] = duration(sum(log["seconds"] for log in logs))
        cells[4] = size(round(max(log["peak_memory_mb"] for log in logs) * 1e6))
    if row.state != "missing":
        cells[5] = count(row.parts_done)
    if source.artifact:
        cells[6] = size(sum(part.bytes for part in source.parts.values()))
    return cells


def _settings_table(sources: Iterable[Source]) -> Table:
    """Every setting that a fingerprint is made of, and the tool versions of what is committed."""
    rows = []
    for source in sources:
        name = source.status.row.stage
        rows += setting_rows(name, STAGES[name].section(source.config))
        if source.artifact:
            toolchain = source.artifact.manifest.identity.toolchain
            rows += [[f"{name}: {tool}", version] for tool, version in sorted(toolchain.items())]
    return Table("Settings and tool versions that decide the bytes", ["Key", "Value"], rows, texts=2)


# --------------------------------------------------------------------------------------------------------- the sections


def _corpus(source: Source) -> Section:
    languages, totals = source.stats["languages"], source.stats["totals"]
    ranked = ranked_reasons(languages.values())
    headings = ["Language", "Documents", "Kept", *map(str.capitalize, ranked), "Text", "Characters"]

    def row(name: str, counts: dict[str, Any]) -> list[str]:
        found = reasons(counts)
        outcomes = [count(counts["documents_in"]), count(counts["kept"]), *(count(found[reason]) for reason in ranked)]
        return [name, *outcomes, size(counts["text_bytes"]), count(counts["chars"])]

    order = by_size({name: counts["text_bytes"] for name, counts in languages.items()})
    table = Table("Documents by language", headings, [row(name, languages[name]) for name in order], row("all", totals))
    sentence = (
        f"{count(totals['kept'])} of {count(totals['documents_in'])} documents were kept, "
        f"{count(sum(totals['dropped'].values()))} dropped and {count(sum(totals['rejected'].values()))} rejected."
    )
    rejects = _inputs_with_rejects(source.stats["inputs"])
    return Section("Corpus", [sentence], [corpus_figure(languages)], [table, *rejects])


def _inputs_with_rejects(inputs: dict[str, dict[str, Any]]) -> list[Table]:
    guilty = {name: counts for name, counts in inputs.items() if sum(counts["rejected"].values())}
    order = by_size({name: sum(counts["rejected"].values()) for name, counts in guilty.items()})
    rows = [
        [
            name,
            ", ".join(f"{words(reason)} {count(n)}" for reason, n in sorted(guilty[name]["rejected"].items())),
            count(sum(guilty[name]["rejected"].values())),
            count(guilty[name]["documents_in"]),
        ]
        for name in order[:MOST_INPUTS]
    ]
    more = f" (the first {MOST_INPUTS} of {count(len(order))})" if len(order) > MOST_INPUTS else ""
    headings = ["File", "Reasons", "Rejected", "Documents"]
    return [Table(f"Input files with rejected documents{more}", headings, rows, texts=2)] if rows else []


def _vocab(source: Source) -> Section:
    stats = source.stats
    sentences = [f"{count(stats['pieces'])} pieces; the mask token has id {count(stats['mask_id'])}."]
    if origin := stats.get("origin"):
        sentences.append(f"Taken from {origin['file']}, sha256 {origin['sha256'][:16]}…, not trained on this corpus.")
    return Section("Vocabulary", sentences, [vocab_figure(stats["languages"], stats["sampling"])], vocab_tables(stats))


def _tokens(source: Source) -> Section:
    languages = source.stats["languages"]
    tokens, passes = _training_tokens(source)
    rows = [
        [
            name,
            *(count(languages[name][split][what]) for split, what in _SPLIT_COUNTS),
            share(languages[name]["fill"]),
            f"{passes[name]:,.4g}" if name in passes else "–",
        ]
        for name in by_size(tokens)
    ]
    sums = [count(_total(source.stats, split, what)) for split, what in _SPLIT_COUNTS]
    headings = ["Language", "Training rows", "Tokens", "Held-out rows", "Tokens", "Filled", "Passes"]
    sentence = f"{sums[0]} training rows of {source.stats['max_seq_len']} tokens, {sums[2]} rows held out."
    table = Table("Rows and tokens by language", headings, rows, ["all", *sums, "", ""])
    return Section("Tokens", [sentence], [tokens_figure(languages, passes)], [table])


def _training_tokens(source: Source) -> tuple[dict[str, int], dict[str, float]]:
    """Training tokens of each language, and how often training passes over them; of the committed stage tokens."""
    languages, pretrain = source.committed["tokens"].manifest.stats["languages"], source.config.pretrain
    tokens = {name: counts["train"]["tokens"] for name, counts in languages.items()}
    rows = {name: counts["train"]["rows"] for name, counts in languages.items()}
    return tokens, passes_in_training(tokens, rows, pretrain.alpha, pretrain.steps * pretrain.global_batch)


_SPLIT_COUNTS = [(split, what) for split in ("train", "validation") for what in ("rows", "tokens")]


def _total(stats: dict[str, Any], split: str, what: str) -> int:
    return sum(int(counts[split][what]) for counts in stats["languages"].values())


def _pretrain(source: Source) -> Section:
    objective = source.config.pretrain.objective
    log = training_log(source.folder, source.artifact, METRICS, BY_LANGUAGE)
    order, aimed, seen = _languages_in_training(source, log)
    reached = f"The log reaches step {count(log.last_step)} of {count(source.config.pretrain.steps)}."
    figures = [
        training_figure(log, objective),
        languages_figure(log, order),
        seen_figure(seen, aimed) if seen else None,
    ]
    tables = [phases_table(log, objective), languages_table(log, order), seen_table(seen, aimed) if seen else None]
    return Section(
        "Pretraining",
        [reached, *improvement(log), *incidents(log)],
        [figure for figure in figures if figure],
        [table for table in tables if table],
    )


def _languages_in_training(source: Source, log: TrainingLog) -> tuple[list[str], dict[str, float], dict[str, int]]:
    """The languages in order of their tokens, the shares aimed at, and the tokens of each that training has seen."""
    seen = {name: int(values[-1]) for name, (_, values) in log.by_language(TOKENS_SEEN).items()}
    if "tokens" not in source.committed:
        return by_size(seen), {}, seen
    tokens, passes = _training_tokens(source)
    return by_size(tokens), shares_aimed_at(tokens, passes), seen


def _export(source: Source) -> Section:
    parts, parameters = source.parts, source.stats["parameters"]
    rows = [
        [path, part.sha256[:16], count(parameters[path]) if path in parameters else "", size(part.bytes)]
        for path, part in sorted(parts.items())
    ]
    headings = ["File", "sha256 begins with", "Parameters", "Size"]
    sentence = f"Step {count(source.stats['step'])} in {source.stats['dtype']}."
    return Section("Export", [sentence], [], [Table("Published files", headings, rows, texts=2)])


def _xnli(source: Source) -> Section:
    stats = source.stats
    languages, average, training = stats["languages"], stats["average"]["accuracy"], stats["training"]

    def row(name: str, scores: dict[str, Any]) -> list[str]:
        low, high = scores["interval_95"]
        return [name, share(scores["accuracy"], 1), f"{share(low, 1)} to {share(high, 1)}", count(scores["pairs"])]

    order = by_size({name: scores["accuracy"] for name, scores in languages.items()})
    rows = [row(name, languages[name]) for name in order]
    total = ["average", share(average, 1), "", count(sum(scores["pairs"] for scores in languages.values()))]
    table = Table("XNLI by language", ["Language", "Accuracy", "95 % interval", "Pairs"], rows, total)
    sentences = [f"{_MODES[stats['mode']]}: {count(training['pairs'])} pairs, {count(training['steps'])} steps."]
    if seen := stats["seen_in_training"]:
        sentences.append(f"{count(seen)} of the scored pairs were also trained on.")
    figure = xnli_figure(languages, average, stats["chance"])
    return Section("XNLI", sentences, [figure], [table], beside=True)


_MODES = {
    "zero_shot": "Zero-shot: fine-tuned on English pairs alone",
    "translate_train_all": "Translate-train-all: fine-tuned on the pairs of every language",
}

_SECTIONS: dict[str, tuple[str, Callable[[Source], Section]]] = {
    "corpus": ("Corpus", _corpus),
    "vocab": ("Vocabulary", _vocab),
    "tokens": ("Tokens", _tokens),
    "pretrain": ("Pretraining", _pretrain),
    "export": ("Export", _export),
    "xnli": ("XNLI", _xnli),
}
