"""DeepSpeed's configuration: generated from ours, and a user's own merged into it or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.ds_config import ds_config, merge, read_user_config
from pipeline.config import PretrainConfig
from pipeline.errors import UserError


def generated(**changes: Any) -> dict[str, Any]:
    config = PretrainConfig.model_validate({"global_batch": 64, "micro_batch": 4, **changes})
    return ds_config(config, config.max_grad_norm, processes=2, device=torch.device("cpu"))


def test_the_split_of_the_batch_adds_up() -> None:
    made = generated()
    assert made["train_batch_size"] == 64
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 2 == 64


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stage_and_precision_are_the_ones_asked_for(stage: int, precision: str) -> None:
    if (stage, precision) == (0, "fp16"):
        with pytest.raises(UserError, match=r"pretrain\.precision fp16 needs pretrain\.zero_stage 1, 2 or 3"):
            generated(zero_stage=stage, precision=precision)
        return
    made = generated(zero_stage=stage, precision=precision)
    assert made["zero_optimization"]["stage"] == stage
    assert (made["bf16"]["enabled"], made["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")


def test_what_a_user_adds_is_taken_over_and_nothing_else_changes() -> None:
    base = generated(zero_stage=2)
    user = {
        "zero_optimization": {"allgather_bucket_size": 1000, "contiguous_gradients": True, "stage": 2},
        "communication_data_type": "bf16",
        "comms_logger": {"enabled": True},
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "steps_per_print": 10,
    }
    merged = merge(base, user)
    assert merged["zero_optimization"].pop("allgather_bucket_size") == 1000
    assert merged.pop("comms_logger") == {"enabled": True}
    assert merged["train_batch_size"] == 64
    changed = json.loads(json.dumps(base))
    assert changed["zero_optimization"]["contiguous_gradients"] is False
    changed["zero_optimization"]["contiguous_gradients"] = True
    changed["communication_data_type"] = "bf16"
    changed["steps_per_print"] = 10
    assert merged == changed


@pytest.mark.parametrize(
    ("user", "theirs", "ours"),
    [
        ({"train_batch_size": 128}, "train_batch_size is 128; it is 64 here", "pretrain.global_batch"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3; it is 1 here", "pretrain.zero_stage"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False; it is True here", "pretrain.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True", "pretrain.precision"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5", "pretrain.max_grad_norm"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb'", "pretrain.learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is 'WarmupLR'", "pretrain.schedule"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device is 'cpu'",
            "pretrain.offload_optimizer",
        ),
    ],
)
def test_a_contradiction_names_the_keys_of_both(user: dict[str, Any], theirs: str, ours: str) -> None:
    with pytest.raises(UserError) as told:
        merge(generated(), user)
    assert theirs in str(told.value)
    assert ours in str(told.value)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("zero_optimization", "round_robin_gradients"),
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
        ("fp16", "fp16_master_weights_and_grads"),
        ("fp16", "loss_scale"),
    ],
)
def test_what_checkpoints_could_not_hold_is_refused_and_may_be_said_to_be_off(section: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"pretrain\.deepspeed: {section}\.{key} is 128: .*\. Leave it out"):
        merge(generated(), {section: {key: 128}})
    assert merge(generated(), {section: {key: 0}})[section][key] == 0


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is not JSON"), ("[1]", "holds no JSON object"), (None, "cannot read")]
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"pretrain.deepspeed: .*{words}") as told:
        read_user_config(str(path), {})
    assert "own.json" in str(told.value)
