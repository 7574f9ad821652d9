"""Embedding sharing: which loss reaches which table, in one backward pass over both losses or in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers_twin import CONFIG, ROWS, assert_same_gradients, batch, gradients_of, networks, shaken

from model.rtd import JointRTD, Sharing, discriminate

LAMBDA = 50.0
TABLE = "deberta.embeddings.word_embeddings.weight"


def gradients(sharing: Sharing, *losses: str) -> tuple[Any, Any]:
    """Gradients (None: not reached) of E_G and of the discriminator's own table under the sum of `losses`."""
    model = JointRTD(*networks(sharing))
    mlm, rtd = model(*batch())
    chosen = {"mlm": mlm.loss_sum / mlm.tokens, "rtd": rtd.loss_sum / rtd.tokens}
    sum(chosen[name] for name in losses).backward()
    own = list(model.discriminator.deberta.embeddings.word_embeddings.parameters())
    return model.generator.deberta.embeddings.word_embeddings.weight.grad, own[0].grad if own else None


def test_gdes_stops_each_loss_at_the_others_table() -> None:
    generator_table, delta = gradients("gdes", "rtd")
    assert generator_table is None
    assert delta is not None and delta.any()
    generator_table, delta = gradients("gdes", "mlm")
    assert generator_table is not None and generator_table.any()
    assert delta is None


def test_nes_keeps_the_tables_apart() -> None:
    generator_table, own = gradients("nes", "rtd")
    assert generator_table is None and own.any()
    assert gradients("nes", "mlm")[1] is None


def joint_gradients(sharing: Sharing) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the generator's and the discriminator's parameters, from one backward pass over both losses."""
    model = shaken(JointRTD(*networks(sharing)))
    mlm, rtd = model(*batch())
    (mlm.loss_sum / mlm.tokens + LAMBDA * rtd.loss_sum / rtd.tokens).backward()
    return gradients_of(model.generator), gradients_of(model.discriminator)


def separate_gradients(sharing: Sharing) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Of L_MLM for the generator, of L_RTD without lambda for the discriminator, and of L_RTD for E_G.

    As in a decoupled step, but at the same weights: E_G does not move in between.
    """
    model = shaken(JointRTD(*networks(sharing)))
    generator, discriminator = model.generator, model.discriminator
    ids, segments, masked, noise = batch()
    mlm = generator(ids, segments, masked, noise)
    (mlm.loss_sum / mlm.tokens).backward()
    of_mlm = gradients_of(generator)
    generator.zero_grad()
    rtd = discriminate(generator, discriminator, ids, segments, masked, mlm.sampled)
    (rtd.loss_sum / rtd.tokens).backward()
    reached = {name: parameter.grad for name, parameter in generator.named_parameters() if parameter.grad is not None}
    assert reached.keys() <= {TABLE}
    return of_mlm, gradients_of(discriminator), reached.get(TABLE)


def times_lambda(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: LAMBDA * gradient for name, gradient in gradients.items()}


@pytest.mark.parametrize("sharing", ["gdes", "nes"])
def test_joint_gradients_are_the_separate_ones(sharing: Sharing) -> None:
    generator, discriminator = joint_gradients(sharing)
    of_mlm, of_rtd, of_rtd_for_table = separate_gradients(sharing)
    assert of_rtd_for_table is None
    assert all(generator[name].equal(gradient) for name, gradient in of_mlm.items())
    assert_same_gradients(discriminator, times_lambda(of_rtd))


def test_es_sends_both_losses_into_the_one_table() -> None:
    """Its gradient is the sum of the two; every other parameter has that of its own network's loss."""
    generator, discriminator = joint_gradients("es")
    of_mlm, of_rtd, of_rtd_for_table = separate_gradients("es")
    assert of_rtd_for_table is not None and of_rtd_for_table.any() and of_mlm[TABLE].any()
    assert_same_gradients(generator, of_mlm | {TABLE: of_mlm[TABLE] + LAMBDA * of_rtd_for_table})
    assert_same_gradients(discriminator, times_lambda(of_rtd))
    assert not any("word_embeddings" in name for name in discriminator)


def test_gdes_starts_as_the_generators_table_and_publishes_the_sum() -> None:
    generator, discriminator = networks("gdes")
    table = generator.deberta.embeddings.word_embeddings.weight
    assert discriminator.word_table(table).equal(table)
    with torch.no_grad():
        for delta in discriminator.deberta.embeddings.word_embeddings.parameters():
            delta.add_(0.5)
    assert discriminator.word_table(table).equal(table + 0.5)
    ids = batch()[0]
    published = nn.Embedding.from_pretrained(discriminator.word_table(table).detach())
    looked_up = discriminator.deberta.embeddings.word_embeddings(ids, generator.word_rows(ids))
    assert looked_up.equal(published(ids))


def test_only_gdes_and_nes_own_a_table() -> None:
    own = {s: sum(p.numel() for p in networks(s)[1].parameters()) for s in ("gdes", "nes", "es")}
    assert own["gdes"] == own["nes"] == own["es"] + ROWS * CONFIG.hidden_size
    generator, discriminator = networks("es")
    table = generator.deberta.embeddings.word_embeddings.weight
    assert discriminator.word_table(table) is table


def test_gdes_discriminator_follows_the_generators_table() -> None:
    generator, discriminator = networks("gdes")
    ids, segments, masked, _ = batch()
    sampled = torch.full_like(masked, 50)
    before = discriminate(generator, discriminator, ids, segments, masked, sampled).logits
    with torch.no_grad():
        generator.deberta.embeddings.word_embeddings.weight[50] += torch.randn(CONFIG.hidden_size)
    after = discriminate(generator, discriminator, ids, segments, masked, sampled).logits
    assert not after.allclose(before)
