"""Learning rates and parameter groups of the optimisers, and the size of the tables."""

from __future__ import annotations

import itertools

import pytest

from model.engine import parameter_groups, schedule
from model.rtd import Discriminator, Generator, JointRTD
from model.vocabulary import table_rows
from pipeline.config import ModelConfig, PretrainConfig
from pipeline.errors import UserError

TINY = ModelConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, generator_num_hidden_layers=2
)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing_without_a_jump() -> None:
    rates = [schedule(step, warmup=10, steps=100) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[99] == pytest.approx(1 / 90)
    assert rates[100] == 0.0
    assert all(abs(after - before) <= 0.1 + 1e-12 for before, after in itertools.pairwise(rates))
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (5, 5), (20, 5), (1, 1)])
def test_short_runs_have_usable_rates(warmup: int, steps: int) -> None:
    assert all(0 < schedule(step, warmup, steps) <= 1 for step in range(steps))


def test_every_parameter_is_updated_once_and_only_weights_decay() -> None:
    both = JointRTD(Generator(TINY, 128, 100), Discriminator(TINY, 128, "gdes"))
    config = PretrainConfig(weight_decay=0.1)
    groups = [
        group
        for prefix, peak in (("generator.", 1.0), ("discriminator.", 2.0))
        for group in parameter_groups(both, prefix, peak, config)
    ]
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    names = {id(parameter): name for name, parameter in both.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names) == len(decay)
    for key, name in names.items():
        free = name.endswith(".bias") or ".LayerNorm." in name
        assert decay[key] == (0.0 if free else 0.1), name
        assert rate[key] == (1.0 if name.startswith("generator.") else 2.0), name
    delta = both.discriminator.deberta.embeddings.word_embeddings.delta
    assert decay[id(delta)] == 0.1  # as in the reference code


def test_tables_have_a_row_for_every_id_and_some_to_spare() -> None:
    assert table_rows(TINY, mask_id=250_000) == 250_112
    assert table_rows(TINY, mask_id=127) == 128
    assert table_rows(TINY.model_copy(update={"vocab_size": 251_000}), mask_id=250_101) == 251_000
    with pytest.raises(UserError, match="vocab_size 250000 is less than the 250001 ids"):
        table_rows(TINY.model_copy(update={"vocab_size": 250_000}), mask_id=250_000)
