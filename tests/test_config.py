"""The config: what is accepted, how mistakes are named, what enters a fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import configfile
from pipeline.config import Config, Section, fingerprint_slice
from pipeline.errors import UserError


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "conf.yaml"
    path.write_text(text)
    return configfile.load(str(path), list(overrides))


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", configfile.presets())
def test_every_preset_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = configfile.load(name)
    assert load(tmp_path, configfile.dump(config)) == config


def test_a_file_may_start_from_a_preset_and_override_some_keys(tmp_path: Path) -> None:
    config = load(tmp_path, "preset: demo\nwork_dir: x\npretrain: {steps: 3}", "pretrain.model.hidden_size=64")
    assert (config.work_dir, config.pretrain.steps, config.pretrain.model.hidden_size) == ("x", 3, 64)
    assert config.vocab == configfile.load("demo").vocab


def test_an_unknown_key_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    assert "corpus.shrd_mb, did you mean shard_mb?" in message(tmp_path, "work_dir: x\ncorpus: {shrd_mb: 3}")
    assert "pretrain.model.hiden_size, did you mean hidden_size?" in message(
        tmp_path, "work_dir: x", "pretrain.model.hiden_size=3"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("work_dir: x\nwork_dir: y", "'work_dir' is given twice"),
        ("work_dir: &a x\nexport: {model_name: *a}", "aliases"),
        ("[1, 2]", "expected `section: key: value`"),
        ("work_dir: x\npretrain: {steps: -1}", "pretrain.steps: Input should be greater than 0 (given: -1)"),
        ("work_dir: x\npretrain: {learning_rate: .nan}", "pretrain.learning_rate"),
        ("corpus: {shard_mb: 3}", "work_dir is required"),
        ("work_dir: x\npretrain: {embedding_sharing: es, updates: decoupled}", "es needs updates joint"),
        (
            "work_dir: x\npretrain: {global_batch: 10, micro_batch: 4}",
            "global_batch 10 is not a multiple of micro_batch 4",
        ),
        ("work_dir: x\ntokens: {max_seq_len: 1024}", "max_position_embeddings 512 is less than"),
        ("work_dir: 'x", "not valid YAML"),
        ("preset: dmo\nwork_dir: x", "preset 'dmo' does not exist"),
    ],
)
def test_a_mistake_becomes_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    assert words in message(tmp_path, text)


def test_a_missing_file_names_the_nearest_preset() -> None:
    with pytest.raises(UserError, match="did you mean the preset cc100_sample"):
        configfile.load("cc100_sampel")


def test_the_language_no_stays_a_string(tmp_path: Path) -> None:
    assert load(tmp_path, "work_dir: x\ncorpus: {languages: [no, en]}").corpus.languages == ("no", "en")


def test_a_config_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "conf.yaml"
    path.write_bytes(b"work_dir: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        configfile.load(str(path))
    path.write_bytes(b"#" * (configfile.MAX_CONFIG_BYTES + 1))
    with pytest.raises(UserError, match="larger than"):
        configfile.load(str(path))


def test_credentials_are_in_no_dump_repr_or_error(tmp_path: Path) -> None:
    text = "work_dir: x\nstorage_options: {s3: {key: AKIA, secret: hush-hush}}"
    config = load(tmp_path, text)
    assert config.storage_options["s3"]["secret"] == "hush-hush"
    assert "hush" not in configfile.dump(config) + repr(config) + str(fingerprint_slice(config))
    assert "hush" not in message(tmp_path, "work_dir: x\nstorage_options: hush-hush")


def leaves(section: Section, prefix: str = "") -> list[tuple[str, Any, bool]]:
    """(dotted key, value, whether it belongs to the fingerprint) of every field below a section."""
    found: list[tuple[str, Any, bool]] = []
    for name, field in type(section).model_fields.items():
        value, extra = getattr(section, name), field.json_schema_extra
        counts = not (isinstance(extra, dict) and extra.get("fingerprinted") is False)
        if isinstance(value, Section):
            found += [(key, inner, counts and c) for key, inner, c in leaves(value, f"{prefix}{name}.")]
        else:
            found.append((f"{prefix}{field.alias or name}", value, counts))
    return found


CHANGED: dict[type, Any] = {bool: lambda v: not v, int: lambda v: v * 2 or 1, float: lambda v: v * 0.991 or 0.01}
WORDS: dict[str, Any] = {
    "corpus.dedup": "none", "tokens.packing": "stream", "pretrain.embedding_sharing": "nes",
    "pretrain.precision": "fp32", "pretrain.zero_stage": 2, "export.dtype": "bfloat16",
    "export.model_name": "other", "xnli.precision": "bf16", "xnli.mode": "translate_train_all",
    "pretrain.updates": "joint", "pretrain.discriminator.learning_rate": 0.1, "pretrain.discriminator.warmup_steps": 5,
    "pretrain.discriminator.schedule": "cosine", "pretrain.discriminator.max_grad_norm": 2.0,
    "pretrain.schedule": "cosine", "pretrain.attention": "eager", "pretrain.compile": True,
    "pretrain.batch_warmup_rows": 64, "pretrain.deepspeed": "x.json", "pretrain.spikes.factor": 3.0,
    "pretrain.spikes.rollback_every": 2000, "pretrain.keep_every": 5, "pretrain.trackers": ["wandb"],
    "pretrain.tracker_project": "x", "pretrain.model.vocab_size": 4096,
    "corpus.languages": ["en"], "pretrain.model.num_attention_heads": 8, "xnli.max_train_pairs": 5,
    "xnli.max_eval_pairs": 5, "corpus.inputs": ["x/*"], "xnli.data": ["x"], "xnli.train": ["x"],
    "corpus.workers": 2, "tokens.workers": 2, "pretrain.launcher.threads": 2, "tokens.max_seq_len": 256,
    "pretrain.micro_batch": 4, "pretrain.objective": "mlm", "pretrain.masking": "windowed",
    "pretrain.init.checkpoint": "other", "corpus.text_key": "content", "corpus.max_repeated_line_share": 0.4,
    "corpus.max_symbol_share": 0.4, "corpus.language_id.thresholds": {"sw": 0.5}, "corpus.exclude": ["x/*"],
    "corpus.near_duplicates": 0.8, "corpus.copies_across_languages": "drop", "vocab.from": "x", "vocab.compare": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("section", ["corpus", "vocab", "tokens", "pretrain", "export", "xnli"])
def test_the_fingerprint_slice_follows_exactly_the_keys_that_change_bytes(section: str) -> None:
    base = Config.model_validate({"work_dir": "x", "pretrain": {"init": {"checkpoint": "one"}}})
    for key, value, counts in leaves(getattr(base, section), f"{section}."):
        new = WORDS[key] if key in WORDS else CHANGED[type(value)](value)
        tree: dict[str, Any] = base.model_dump(mode="json")
        inner = tree
        for step in key.split(".")[:-1]:
            inner = inner[step]
        inner[key.split(".")[-1]] = new
        changed = Config.model_validate(tree)
        differs = fingerprint_slice(getattr(changed, section)) != fingerprint_slice(getattr(base, section))
        assert differs == counts, key


def test_where_and_how_a_run_happens_is_not_fingerprinted() -> None:
    free = {key for key, _, counts in leaves(Config(work_dir="x")) if not counts}
    assert free >= {
        "work_dir", "corpus.workers", "corpus.chunk_mb", "pretrain.micro_batch", "pretrain.launcher.processes",
        "tokens.workers", "pretrain.checkpoint_every",
    }  # fmt: skip
