"""What is no DeBERTaV3 of the run's shape, damaged, hostile or out of reach is refused by name before it is used."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file
from support import flip_bit
from tiny_hub import WORDS, hidden_states, published, save_as_bin, saved, settings, started
from torch import Tensor
from transformers import DebertaV2ForMaskedLM

from model.hf_checkpoint import read_checkpoint
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.execute import run_stages
from pipeline.stage import identities, input_identity


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return published(tmp_path)


def edit_config(path: Path, **changes: Any) -> None:
    """Change a config file; None takes a key away."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 768}, "pretrain.model.hidden_size is 32 but {} says 768"),
        ({"num_hidden_layers": 4}, "pretrain.model.num_hidden_layers is 3 but {} says 4"),
        ({"num_attention_heads": 2}, "pretrain.model.num_attention_heads is 4 but {} says 2"),
        ({"intermediate_size": 65}, "pretrain.model.intermediate_size is 64 but {} says 65"),
        ({"max_position_embeddings": 512}, "pretrain.model.max_position_embeddings is 160 but {} says 512"),
        (
            {"max_relative_positions": 99},
            "pretrain.model.max_position_embeddings is 160 but {} says max_relative_positions 99",
        ),
        ({"position_buckets": 8}, "pretrain.model.position_buckets is 16 but {} says 8"),
        (
            {"position_buckets": None},
            "pretrain.model.position_buckets is 16 but {} leaves position_buckets to transformers, which takes -1",
        ),
        ({"layer_norm_eps": 1e-12}, "pretrain.model.layer_norm_eps is 1e-07 but {} says 1e-12"),
        ({"embedding_size": 16}, "pretrain.model.hidden_size is 32 but {} says embedding_size 16"),
        ({"hidden_act": "gelu_new"}, '{} says hidden_act "gelu_new" where DeBERTaV3 has "gelu"'),
        ({"model_type": "bert"}, '{}: says model_type "bert"; pretrain.init.checkpoint takes deberta-v2'),
        ({"conv_kernel_size": 3}, "{} says conv_kernel_size 3 where DeBERTaV3 has 0"),
        ({"type_vocab_size": 2}, "{} says type_vocab_size 2 where DeBERTaV3 has 0"),
        ({"position_biased_input": True}, "{} says position_biased_input true where DeBERTaV3 has false"),
        ({"share_att_key": False}, "{} says share_att_key false where DeBERTaV3 has true"),
        ({"norm_rel_ebd": "none"}, '{} says norm_rel_ebd "none" where DeBERTaV3 has "layer_norm"'),
        ({"pos_att_type": "c2p"}, '{} says pos_att_type "c2p" where DeBERTaV3 has ["p2c", "c2p"]'),
        (
            {"relative_attention": None},
            "{} leaves relative_attention to transformers, which takes false where DeBERTaV3 has true",
        ),
    ],
)
def test_other_architecture_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    saved(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    edit_config(path, **changes)
    with pytest.raises(UserError) as refusal:
        started(settings(tmp_path), tmp_path / "hub")
    assert said.format(path) in str(refusal.value)


def test_everything_that_differs_is_said_at_once(tmp_path: Path, hub: Path) -> None:
    edit_config(hub / "config.json", hidden_size=768, pos_att_type="p2c | c2p", hidden_dropout_prob=0.3)
    edit_config(hub / "generator_config.json", hidden_size=256, num_hidden_layers=1)
    with pytest.raises(UserError) as refusal:
        started(settings(tmp_path), hub)
    assert str(refusal.value) == (
        f"pretrain.model.hidden_size is 32 but {hub}/config.json says 768; "
        f"pretrain.model.generator_num_hidden_layers is 2 but {hub}/generator_config.json says num_hidden_layers 1; "
        f"pretrain.model.hidden_size is 32 but {hub}/generator_config.json says 256: change pretrain.model, or let "
        "pretrain.init.checkpoint name a model of its shape"
    )


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


class TestDamage:
    """A file that is not what it should be is refused by name; nothing in it runs."""

    @pytest.mark.parametrize("pickled", [True, False])
    def test_hostile_pickle_does_not_run(self, tmp_path: Path, pickled: bool) -> None:
        saved(tmp_path / "hub")
        save_as_bin(tmp_path / "hub", {"x": Hostile(tmp_path / "mark")})
        if pickled:
            data = pickle.dumps({"x": Hostile(tmp_path / "mark")}, protocol=2)
            (tmp_path / "hub" / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(UserError, match=r"hub/pytorch_model.bin: not a file of plain tensors"):
            started(settings(tmp_path), tmp_path / "hub")
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    @pytest.mark.parametrize("damage", ["cut", "empty", "header"])
    def test_damaged_weights_are_refused(self, tmp_path: Path, name: str, damage: str) -> None:
        network = saved(tmp_path / "hub")
        path = tmp_path / "hub" / name
        if name.endswith(".bin"):
            save_as_bin(tmp_path / "hub", network.state_dict())
        whole = path.read_bytes()
        header = (2**63).to_bytes(8, "little") + b"{}"
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "header": header}[damage])
        with pytest.raises(UserError, match=rf"hub/{name}: not (safetensors|a file of plain tensors)"):
            started(settings(tmp_path), tmp_path / "hub")

    def edited(self, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Start from a checkpoint whose tensors were changed."""
        saved(tmp_path / "hub")
        path = tmp_path / "hub" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        started(settings(tmp_path), tmp_path / "hub")

    def test_missing_layer_is_refused(self, tmp_path: Path) -> None:
        name = "encoder.layer.1.output.dense.bias"
        with pytest.raises(UserError, match=rf"config.json: its weights lack deberta.{name} \(1 in all\)"):
            self.edited(tmp_path, lambda tensors: tensors.pop(name))

    def test_missing_table_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"model.safetensors: has no embeddings.word_embeddings.weight"):
            self.edited(tmp_path, lambda tensors: tensors.pop(WORDS))

    def test_half_a_head_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"its weights lack mask_predictions.LayerNorm.bias, .* \(5 in all\)"):
            self.edited(tmp_path, lambda tensors: tensors.update({"mask_predictions.classifier.bias": torch.ones(1)}))

    @pytest.mark.parametrize("name", ["encoder.rel_embeddings.weight", WORDS])
    def test_other_shape_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UserError, match=rf"config.json: deberta.{name} is \[.*\] in its weights where \[.*32\]"):
            self.edited(tmp_path, lambda tensors: tensors.update({name: torch.ones(32, 31)}))

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (torch.full((32,), torch.nan), "holds NaN or infinity"),
            (torch.ones(32, dtype=torch.int8), "is torch.int8; save the checkpoint in float32"),
        ],
    )
    def test_values_that_are_no_weights_are_refused(self, tmp_path: Path, value: Tensor, said: str) -> None:
        name = "embeddings.LayerNorm.bias"
        with pytest.raises(UserError, match=rf"model.safetensors: {name} {said}"):
            self.edited(tmp_path, lambda tensors: tensors.update({name: value}))

    @pytest.mark.parametrize("shard", ["../model.safetensors", "absent.safetensors", "secrets.txt"])
    def test_index_names_files_beside_it_alone(self, tmp_path: Path, shard: str) -> None:
        saved(tmp_path / "hub")
        (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "model.safetensors")
        (tmp_path / "hub" / "secrets.txt").touch()
        index = {"weight_map": {WORDS: shard}}
        (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"index.json: names '\S+', which is no file of weights beside it"):
            started(settings(tmp_path), tmp_path / "hub")

    def test_directory_without_a_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"config.json: not there; pretrain.init.checkpoint takes a directory"):
            read_checkpoint(str(tmp_path), {})
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"config.json: no weights are with it: neither model.safetensors nor"):
            read_checkpoint(str(tmp_path), {})
        (tmp_path / "config.json").write_text("[" * 100_000)
        with pytest.raises(UserError, match=r"config.json: not a JSON object"):
            read_checkpoint(str(tmp_path), {})

    def test_untied_masked_lm_head_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        saved(tmp_path / "hub", DebertaV2ForMaskedLM, tie_word_embeddings=False)
        assert not [n for n in read_checkpoint(str(tmp_path / "hub"), {}).encoder.tensors if "lm_predictions" in n]
        assert "its LM head has an output layer of its own; left out" in caplog.text


def test_directory_of_links_is_read(tmp_path: Path) -> None:
    """The hub's own cache holds links to its blobs."""
    saved(tmp_path / "blobs")
    (tmp_path / "hub").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "hub" / path.name).symlink_to(path)
    config = settings(tmp_path, init={"checkpoint": str(tmp_path / "hub")})
    started(config, tmp_path / "hub")


class TestRemote:
    """A checkpoint may lie on any fsspec file system."""

    def test_checkpoint_on_s3(self, tmp_path: Path, hub: Path, s3_options: dict[str, dict[str, Any]]) -> None:
        remote = fsspec.filesystem("s3", **s3_options["s3"])
        remote.put(f"{hub}/", "bucket/hub/", recursive=True)
        ours = started(settings(tmp_path), "s3://bucket/hub/", s3_options)
        assert torch.equal(hidden_states(*ours), hidden_states(*started(settings(tmp_path), hub)))
        remote.pipe_file("bucket/hub/pytorch_model.bin", b"rubbish")
        with pytest.raises(UserError) as refusal:
            started(settings(tmp_path), "s3://bucket/hub", s3_options)
        assert "s3://bucket/hub/pytorch_model.bin: not a file of plain tensors" in str(refusal.value)
        assert s3_options["s3"]["secret"] not in str(refusal.value)

    def test_messages_hide_credentials(self) -> None:
        with pytest.raises(UserError, match=r"^memory://store/hub/config.json: not there"):
            read_checkpoint("memory://someone:secret@store/hub/", {})


class TestFingerprint:
    """The run depends on what is read of the checkpoint, and on nothing beside it."""

    @staticmethod
    def fingerprint(folder: Path, checkpoint: Path) -> str:
        config = settings(folder, init={"checkpoint": str(checkpoint)})
        return identities(config, "pretrain")["pretrain"].fingerprint

    def test_weights_count_and_other_files_do_not(self, tmp_path: Path, hub: Path) -> None:
        before = self.fingerprint(tmp_path, hub)
        (hub / ".git").mkdir()
        (hub / ".cache" / "huggingface").mkdir(parents=True)
        (hub / "checkpoint-1.5").mkdir()
        (hub / "README.md").write_text("A model.")
        assert self.fingerprint(tmp_path, hub) == before
        save_as_bin(hub, {"x": torch.ones(1)})
        assert self.fingerprint(tmp_path, hub) != before

    def test_directory_without_a_model_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"pretrain.init.checkpoint: nothing matches '\S+/empty/config.json'"):
            self.fingerprint(tmp_path, tmp_path / "empty")


def test_weights_are_identified_by_all_of_their_bytes(tmp_path: Path) -> None:
    """Another training may have changed one layer only, far from where a sample of the file would look."""
    weights, settings = tmp_path / "model.safetensors", Config(work_dir=str(tmp_path / "work"))
    weights.write_bytes(bytes(12 << 20))
    before = input_identity(str(weights), settings)
    flip_bit(weights, 3 << 20)
    assert input_identity(str(weights), settings) != before


def test_a_checkpoint_of_another_shape_is_refused_before_any_stage_runs(tmp_path: Path, hub: Path) -> None:
    """Otherwise it would be said after days of corpus and tokens; the check needs no torch."""
    wide = {**tiny_model.ARCHITECTURE, "hidden_size": 64}
    config = tiny_model.config(tmp_path / "run", pretrain={"model": wide, "init": {"checkpoint": str(hub)}})
    with pytest.raises(UserError, match=r"pretrain\.model\.hidden_size is 64 but .*config\.json says 32"):
        run_stages(config, [])
    assert not (tmp_path / "run" / "runs" / "corpus").exists()
    script = "import sys, model.hf_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
