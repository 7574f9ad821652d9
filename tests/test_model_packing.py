"""A row of several segments computes for each of them what a row of its own would: states, draws, judgements, losses.

Rows are longer than `max_position_embeddings`, segments are not: places and distances count within a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers_twin import CONFIG, MASK, assert_same_gradients, gradients_of, networks, seeded, shaken

from model.masked_lm import write_at
from model.rtd import JointRTD, Sharing
from pipeline.config import ModelConfig

DECODERS = {
    "mask decoder": CONFIG,
    "plain": CONFIG.model_copy(update={"enhanced_mask_decoder": False}),
}


class Segment(NamedTuple):
    """What a segment is, wherever it stands."""

    ids: Tensor
    """[n], from [CLS] to [SEP]."""
    masked: Tensor
    """[k] places within the segment."""
    noise: Tensor
    """[k, 2]"""


class Outputs(NamedTuple):
    """What a segment has of its row's results."""

    states: Tensor
    """[k, D] of the generator at masked tokens."""
    sampled: Tensor
    """[k]"""
    logits: Tensor
    """[n] of the discriminator."""


class Result(NamedTuple):
    """Losses over all rows, and each segment's outputs in order."""

    mlm_loss: Tensor
    mlm_tokens: int
    rtd_loss: Tensor
    rtd_tokens: int
    segments: list[Outputs]


def segment(length: int, seed: int, masked: int) -> Segment:
    rng = seeded(seed)
    pieces = torch.randint(4, MASK, (length - 2,), generator=rng)
    return Segment(
        ids=torch.cat([torch.tensor([1]), pieces, torch.tensor([2])]),
        masked=torch.randperm(length - 2, generator=rng)[:masked] + 1,
        noise=torch.rand(masked, 2, generator=rng),
    )


PACKED = [
    [segment(30, 1, masked=5), segment(3, 2, masked=1), segment(60, 3, masked=9)],
    [segment(3, 4, masked=1), segment(3, 5, masked=0), segment(4, 6, masked=2), segment(41, 7, masked=6)],
    [segment(64, 8, masked=10)],
]
ALL = [segment for row in PACKED for segment in row]


def model(sharing: Sharing, config: ModelConfig) -> JointRTD:
    return shaken(JointRTD(*networks(sharing, config)))


def run(model: JointRTD, rows: Sequence[Sequence[Segment]], padding: int = 0) -> Result:
    """Both networks on rows of segments, each row padded to the longest and `padding` more."""
    length = max(sum(len(segment.ids) for segment in row) for row in rows) + padding
    slots = max(1, *(sum(len(segment.masked) for segment in row) for row in rows))
    shape = len(rows), length
    ids, segment_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    positions, noise = torch.full((len(rows), slots), -1), torch.zeros(len(rows), slots, 2)
    places: list[tuple[int, slice, slice]] = []
    for number, row in enumerate(rows):
        start = slot = 0
        for index, segment in enumerate(row, 1):
            tokens, masked = slice(start, start + len(segment.ids)), slice(slot, slot + len(segment.masked))
            ids[number, tokens], segment_ids[number, tokens] = segment.ids, index
            positions[number, masked], noise[number, masked] = segment.masked + start, segment.noise
            places.append((number, tokens, masked))
            start, slot = tokens.stop, masked.stop

    mlm, rtd = model(ids, segment_ids, positions, noise)
    shown = write_at(ids, positions, torch.full_like(positions, MASK))
    states = model.generator.masked_states(shown, segment_ids, positions)
    outputs = [
        Outputs(states[row, masked].detach(), mlm.sampled[row, masked], rtd.logits[row, tokens].detach())
        for row, tokens, masked in places
    ]
    return Result(mlm.loss_sum, int(mlm.tokens), rtd.loss_sum, int(rtd.tokens), outputs)


def assert_same_outputs(found: Outputs, expected: Outputs) -> None:
    assert found.sampled.equal(expected.sampled)
    assert found.logits.sub(expected.logits).abs().max() <= 1e-5
    assert not found.states.sub(expected.states).abs().gt(1e-5).any()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("sharing", ["gdes", "nes", "es"])
def test_packed_rows_give_each_segments_own_outputs_losses_and_gradients(sharing: Sharing, decoder: str) -> None:
    packing, alone = model(sharing, DECODERS[decoder]), model(sharing, DECODERS[decoder])
    packed = run(packing, PACKED, padding=5)
    results = [run(alone, [[segment]]) for segment in ALL]
    for found, result in zip(packed.segments, results, strict=True):
        assert_same_outputs(found, result.segments[0])

    assert packed.mlm_tokens == sum(result.mlm_tokens for result in results) == 34
    assert packed.rtd_tokens == sum(result.rtd_tokens for result in results) == 208
    mlm_loss = torch.stack([result.mlm_loss for result in results]).sum()
    rtd_loss = torch.stack([result.rtd_loss for result in results]).sum()
    assert abs(packed.mlm_loss - mlm_loss) / packed.mlm_tokens <= 1e-5
    assert abs(packed.rtd_loss - rtd_loss) / packed.rtd_tokens <= 1e-5

    (packed.mlm_loss + packed.rtd_loss).backward()
    (mlm_loss + rtd_loss).backward()
    assert_same_gradients(gradients_of(packing), gradients_of(alone))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_segment_means_the_same_wherever_it_stands_in_a_row(place: int, decoder: str) -> None:
    network = model("gdes", DECODERS[decoder])
    moved, others = PACKED[0][0], PACKED[1][:3]
    row = [*others[:place], moved, *others[place:]]
    with torch.no_grad():
        alone = run(network, [[moved]]).segments[0]
        assert_same_outputs(run(network, [row]).segments[place], alone)
        assert_same_outputs(run(network, [PACKED[2], row], padding=2).segments[1 + place], alone)


def test_a_segment_says_nothing_to_its_neighbours() -> None:
    """Other words on one side of a border leave every bit of what is on the other side as it was."""
    network = model("gdes", CONFIG)
    first, second, third = PACKED[0]
    other = segment(len(second.ids), 9, masked=len(second.masked))
    with torch.no_grad():
        before = run(network, [[first, second, third]]).segments
        after = run(network, [[first, other, third]]).segments
    assert not after[1].logits.equal(before[1].logits)
    for number in (0, 2):
        assert after[number].states.equal(before[number].states)
        assert after[number].sampled.equal(before[number].sampled)
        assert after[number].logits.equal(before[number].logits)
