"""Parameter groups of the optimisers, and the size of the tables."""

from __future__ import annotations

import pytest

from model.engine import parameter_groups
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
