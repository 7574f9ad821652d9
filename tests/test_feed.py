"""Which samples a process gets in a step: the same of the run's with any number of processes, masks included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import VOCAB_ROWS, make_tokens

from model.batch import MicroBatch
from model.data import TrainingData
from model.feed import Feed, require_fitting
from model.masking import Masking
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import UserError

MASK = 4999
LANGUAGES = {"en": [40, 30], "de": [20], "sw": [7]}


def feeds(folder: Path, processes: int, **changes: object) -> list[Feed]:
    config = PretrainConfig.model_validate({"global_batch": 24, "micro_batch": 2, "mask_fraction": 0.3, **changes})
    data = TrainingData(make_tokens(folder, LANGUAGES), config, VOCAB_ROWS)
    masking = Masking(config, MASK, torch.ones(VOCAB_ROWS, dtype=torch.bool).numpy())
    worlds = [World(rank, processes, torch.device("cpu"), None) for rank in range(processes)]
    return [Feed(data, masking, config, world) for world in worlds]


def joined(batches: list[MicroBatch], masking: Masking) -> dict[str, torch.Tensor]:
    """The tokens, masks and slots of micro-batches, without what is padding."""
    parts = [(batch.slots, batch.input_ids, masking(batch.input_ids, batch.slots).positions) for batch in batches]
    real = torch.cat([batch.segment_ids for batch in batches]).sum(1) > 0
    slots, ids, positions = (torch.cat(tensors)[real] for tensors in zip(*parts, strict=True))
    return {"slots": slots, "ids": ids, "positions": positions}


@pytest.mark.parametrize("processes", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("changes", [{}, {"batch_warmup_steps": 9, "batch_warmup_rows": 3}], ids=["whole", "growing"])
def test_samples_masks_and_seeds_do_not_depend_on_the_processes(
    tmp_path: Path, processes: int, changes: dict[str, int]
) -> None:
    (alone,) = feeds(tmp_path / "one", 1, **changes)
    many = feeds(tmp_path / "many", processes, **changes)
    for step in (0, 1, 7, 30):  # crosses epochs of all three languages
        one = alone.work(step, slots_left_out=5)
        shares = [feed.work(step, slots_left_out=5) for feed in many]
        batches = [batch for share in shares for batch in share.batches]
        expected, found = joined(one.batches, alone.masking), joined(batches, alone.masking)
        assert len(expected["slots"]) == alone.sizes.rows(step)
        for name, values in expected.items():
            assert torch.equal(found[name], values), name
        real = [batch.purpose for batch in batches if batch.segment_ids.any()]
        assert real == [batch.purpose for batch in one.batches]
        assert len({len(share.batches) for share in shares}) == 1
        assert tuple(map(sum, zip(*(share.totals for share in shares), strict=True))) == one.totals
        assert np.array_equal(sum(share.tokens_by_language for share in shares), one.tokens_by_language)


def test_all_micro_batches_have_one_shape(tmp_path: Path) -> None:
    for feed in feeds(tmp_path, 4, micro_batch=6, batch_warmup_steps=9, batch_warmup_rows=4):
        for step in (0, 3, 12):
            assert {tuple(batch.input_ids.shape) for batch in feed.work(step, 0).batches} == {(6, 12)}
        assert {tuple(batch.input_ids.shape) for _, batch in feed.held_out()} == {(6, 12)}


def test_samples_of_a_step_are_the_ones_that_it_reads(tmp_path: Path) -> None:
    (feed,) = feeds(tmp_path, 1)
    samples = feed.samples(3, slots_left_out=11)
    assert samples.slot.tolist() == list(range(3 * 24 + 11, 4 * 24 + 11))
    read = joined(feed.work(3, slots_left_out=11).batches, feed.masking)
    assert read["slots"].tolist() == samples.slot.tolist()
    order = [list(LANGUAGES).index(name) for name in feed.data.languages]
    first_token = 100 + 1000 * np.array(order)[samples.language] + samples.row
    assert read["ids"][:, 0].tolist() == first_token.tolist()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_held_out_row_is_measured_once_with_its_language_alone(tmp_path: Path, processes: int) -> None:
    found: list[tuple[int, int]] = []
    shares = [feed.held_out() for feed in feeds(tmp_path, processes, validation_rows=11)]
    for language, batch in (entry for share in shares for entry in share):
        real = batch.segment_ids.sum(1) > 0
        found += [(int(slot), language) for slot in batch.slots[real]]
    assert len({len(share) for share in shares}) == 1
    whole = TrainingData(make_tokens(tmp_path / "again", LANGUAGES), PretrainConfig(), VOCAB_ROWS).held_out(11)
    assert sorted(found) == sorted(zip(whole.slots.tolist(), whole.languages.tolist(), strict=True))


def test_processes_that_do_not_divide_the_batch_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"use 1, 2, 3, 4, 6, 12 processes"):
        require_fitting(PretrainConfig(global_batch=24, micro_batch=2), 5)
