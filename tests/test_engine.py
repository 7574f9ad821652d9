"""The wrapper around DeepSpeed: parameter groups, where weights have to be, errors; and the size of the tables."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model.engine import Engine, LossScaleError, parameter_groups
from model.fragments import problem
from model.rtd import Discriminator, Generator, JointRTD
from model.vocabulary import table_rows
from pipeline.config import ModelConfig
from pipeline.errors import UserError

TINY = ModelConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, generator_num_hidden_layers=2
)


def test_every_parameter_is_updated_once_and_only_weights_decay() -> None:
    both = JointRTD(Generator(TINY, 128, 100), Discriminator(TINY, 128, "gdes"))
    groups = [
        {**group, "network": prefix}
        for prefix in ("generator.", "discriminator.")
        for group in parameter_groups(both, prefix, weight_decay=0.1)
    ]
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    network = {id(parameter): group["network"] for group in groups for parameter in group["params"]}
    names = {id(parameter): name for name, parameter in both.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names) == len(decay)
    for key, name in names.items():
        free = name.endswith(".bias") or ".LayerNorm." in name
        assert decay[key] == (0.0 if free else 0.1), name
        assert name.startswith(network[key])
    delta = both.discriminator.deberta.embeddings.word_embeddings.delta
    assert decay[id(delta)] == 0.1  # as in the reference code


def test_tables_have_a_row_for_every_id_and_some_to_spare() -> None:
    assert table_rows(TINY, mask_id=250_000) == 250_112
    assert table_rows(TINY, mask_id=127) == 128
    assert table_rows(TINY.model_copy(update={"vocab_size": 251_000}), mask_id=250_101) == 251_000
    with pytest.raises(UserError, match="vocab_size 250000 is less than the 250001 ids"):
        table_rows(TINY.model_copy(update={"vocab_size": 250_000}), mask_id=250_000)


def in_half_precision(swapped: bool = False, moments: torch.dtype = torch.float32) -> Any:
    """What is asked of a DeepSpeed engine without ZeRO around two layers of one shape."""
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).bfloat16()
    lows = list(module.parameters())
    fulls = [low.detach().float() for low in (reversed(lows) if swapped else lows)]
    state: Any = defaultdict(dict)
    for full in fulls:
        state[full] = {"step": torch.zeros(()), "exp_avg": full.to(moments), "exp_avg_sq": full.to(moments)}
    return SimpleNamespace(
        module=module,
        zero_optimization_stage=lambda: 0,
        optimizer=SimpleNamespace(fp16_groups=[lows], fp32_groups=[fulls]),
        basic_optimizer=SimpleNamespace(state=state),
    )


def test_weights_that_are_not_where_they_should_be_are_found() -> None:
    assert problem(in_half_precision(), 0) is None
    assert problem(in_half_precision(swapped=True), 0) == "the master weights of 0.weight are not where DeepSpeed says"
    found = problem(in_half_precision(moments=torch.bfloat16), 0)
    assert found == "weights or moments of 0.weight are bfloat16 instead of float32"


def test_a_loss_scale_at_its_minimum_is_an_error_of_its_own() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(1.0, 1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    engine = Engine.__new__(Engine)
    engine.name, engine._world, engine._phases = "generator", SimpleNamespace(size=2), SimpleNamespace(begin=id)  # type: ignore[assignment]
    engine._engine = SimpleNamespace(
        set_gradient_accumulation_boundary=id,
        backward=lambda loss, scale_wrt_gas: None,
        optimizer=scaler,
        step=lambda: scaler.update_scale(True),
    )
    with pytest.raises(LossScaleError, match="generator: Current loss scale already at minimum"):
        engine.learn(torch.ones(()), last=True)
