"""Trains the paper's ablation, and writes `<work_dir>/ablation.html` and a table that compare its arms.

An arm is the config with another objective or embedding sharing: all of them see the same rows, seeds and steps, and
the stages before `pretrain` are one copy, because nothing that those stages read differs. Arms are trained one after
the other through the stage contract, so the same command goes on where an earlier one was killed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline import configfile
from pipeline.artifact import Artifact
from pipeline.config import Config, PretrainConfig
from pipeline.errors import UserError
from pipeline.execute import run_stages
from pipeline.page import Page, Section, Table, count, measured, setting_rows, share
from pipeline.stage import identities, read_manifest, stage_folder
from pipeline.stages import STAGES
from pipeline.storage import Folder, redact
from pipeline.trainingfigures import ARM_COLOURS, COMPARED, ablation_figures, time_unit
from pipeline.traininglog import TIME, TrainingLog, training_log

ABLATION_FILE = "ablation.html"
ARMS = tuple(ARM_COLOURS)
STAGES_OF_AN_ARM = ["corpus", "vocab", "tokens", "pretrain"]
PAPER = (
    "Average cosines that are reported of the DeBERTaV3 paper, to compare the pattern and not the values: ES 0.02, its "
    "one table; NES 0.45 in E_G and 0.02 in E_D; GDES 0.45 in E_G and 0.29 in E_D."
)
_MEANING = {
    "mlm": "masked language modelling",
    "es": "replaced-token detection, embeddings shared",
    "nes": "replaced-token detection, embeddings separate",
    "gdes": "replaced-token detection, embeddings shared with disentangled gradients",
}
_DIFFERING = {"pretrain.objective", "pretrain.embedding_sharing", "pretrain.updates"}
_NONE = "–"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One arm: its name, its config, and the overrides that make it from the user's config."""

    name: str
    config: Config
    changes: tuple[str, ...]


def make_arms(config: str, overrides: Sequence[str], names: str) -> list[Arm]:
    """The arms that a comma-separated list names, in the order in which they are trained.

    Raises:
        UserError: a name is no arm, or the config does not work under one of them.
    """
    wanted = {name.strip() for name in names.split(",")}
    if unknown := sorted(wanted - set(ARMS)):
        raise UserError(f"--arms: no arm is called {unknown[0]!r}; the arms are {', '.join(ARMS)}")
    own = configfile.load(config, list(overrides)).pretrain
    changes = {name: _changes(name, own) for name in ARMS if name in wanted}
    return [Arm(name, _config_of(name, config, [*overrides, *extra]), extra) for name, extra in changes.items()]


def _config_of(name: str, config: str, overrides: list[str]) -> Config:
    try:
        return configfile.load(config, overrides)
    except UserError as error:
        raise UserError(f"arm {name}: {error}; change it, or choose other arms with --arms") from None


def _changes(name: str, own: PretrainConfig) -> tuple[str, ...]:
    """What makes the arm of a config, and no more: an arm that was trained by `mdeberta run` is not trained again."""
    if name == "mlm":
        return ("pretrain.objective=mlm",)
    joint = ("pretrain.updates=joint",) if name == "es" and own.updates == "decoupled" else ()
    return ("pretrain.objective=rtd", f"pretrain.embedding_sharing={name}", *joint)


def ablate(arms: Sequence[Arm], source: tuple[str, ...]) -> list[str]:
    """Train what is missing of every arm, and rewrite the page after each.

    Args:
        source: the user's `-c` and `--set` arguments, to which those of an arm are added.

    Returns:
        What the user should see: the table, how to read it, notes on the stages, where the page is.
    """
    for arm in arms:
        STAGES["pretrain"].check(arm.config)
    where, notes = write_page(arms), []
    for arm in arms:
        _log.info("ablate: arm %s", arm.name)
        extra = (word for change in arm.changes for word in ("--set", change))
        notes += run_stages(arm.config, STAGES_OF_AN_ARM, source=(*source, *extra))
        write_page(arms)
    shown = _table(arms, _logs(arms)).lines()
    return [*shown, "", *remarks(arms), *dict.fromkeys(notes), f"ablation: {redact(where)}"]


def write_page(arms: Sequence[Arm]) -> str:
    """Write the page over what exists of the arms and return where it is.

    Raises:
        PipelineError: a log is damaged.
    """
    config = arms[0].config
    Folder(config.work_dir, config.storage_options).write(ABLATION_FILE, render(arms).encode())
    return f"{config.work_dir.rstrip('/')}/{ABLATION_FILE}"


def render(arms: Sequence[Arm]) -> str:
    """The page as text."""
    config, logs = arms[0].config, _logs(arms)
    pretrain = config.pretrain
    settings = [row for row in setting_rows("pretrain", pretrain) if row[0] not in _DIFFERING]
    compared = ", ".join(f"{arm.name} ({_MEANING[arm.name]})" for arm in arms)
    page = Page(
        title=f"{config.export.model_name}: ablation",
        heading=f"{config.export.model_name}: ablation",
        introduction=(
            f"The same rows in the same order under {compared}; width {pretrain.model.hidden_size}, "
            f"{pretrain.model.num_hidden_layers} layers, {pretrain.model.generator_num_hidden_layers} in a generator, "
            f"{count(pretrain.steps)} steps of {count(pretrain.global_batch)} rows."
        ),
        sections=[
            Section("Results", remarks(arms), tables=[_table(arms, logs)]),
            Section("Curves", figures=ablation_figures(logs)),
        ],
        settings=Table("Settings that all arms have in common", ["Key", "Value"], settings, texts=2),
    )
    return page.render()


def remarks(arms: Sequence[Arm]) -> list[str]:
    """How to read the table, a sentence each."""
    pretrain = arms[0].config.pretrain
    found = ["Losses and F1 are the last ones logged; a cosine is the mean over all pairs of different pieces."]
    if any(arm.name == "mlm" for arm in arms):
        model = pretrain.model
        spans = f" that masks up to {pretrain.max_ngram} neighbouring words together" if pretrain.max_ngram > 1 else ""
        found.append(
            f"What stands for mlm in the generator's columns is one network as deep as a discriminator "
            f"({model.num_hidden_layers} layers, a generator has {model.generator_num_hidden_layers}){spans}: it is no "
            "generator, and its loss does not compare step for step with theirs."
        )
    return [*found, PAPER]


def _table(arms: Sequence[Arm], logs: Mapping[str, TrainingLog]) -> Table:
    """An arm a row: how far it is, the last value of each measure, in training and on held-out rows."""
    unit, per_unit = time_unit(logs)
    headings = ["Arm", "Steps", f"Training {unit}", "Generator loss", "held-out", "Discriminator loss", "held-out"]
    headings += ["Replaced F1", "held-out", "Cosine E_G", "Cosine E_D"]
    return Table("The arms at their last step", headings, [_row(arm, logs[arm.name], per_unit) for arm in arms])


def _row(arm: Arm, log: TrainingLog, per_unit: float) -> list[str]:
    steps, seconds = arm.config.pretrain.steps, log.elapsed[1]
    reached = count(log.last_step) if log.last_step in (0, steps) else f"{count(log.last_step)} of {count(steps)}"
    time = f"{seconds[-1] / per_unit:,.2f}" if seconds.size else _NONE
    return [arm.name, reached, time, *(_last(log, key, write) for key, write in _COLUMNS)]


def _last(log: TrainingLog, key: str, write: Callable[[float], str]) -> str:
    _, values = log.column(key)
    return write(float(values[-1])) if values.size else _NONE


def _cosine(value: float) -> str:
    return f"{value:.3f}"


_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("generator_loss", measured),
    ("validation_generator_loss", measured),
    ("discriminator_loss", measured),
    ("validation_discriminator_loss", measured),
    ("replaced_f1", share),
    ("validation_replaced_f1", share),
    ("generator_embedding_cosine", _cosine),
    ("discriminator_embedding_cosine", _cosine),
)


def _logs(arms: Sequence[Arm]) -> dict[str, TrainingLog]:
    return {arm.name: _training_log(arm.config) for arm in arms}


def _training_log(config: Config) -> TrainingLog:
    folder = stage_folder(config, identities(config, "pretrain")["pretrain"])
    manifest = read_manifest(folder)
    return training_log(folder, Artifact(folder, manifest) if manifest else None, [*COMPARED, TIME])
