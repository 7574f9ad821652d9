"""The encoder against transformers' DebertaV2Model with the same weights, and what packing must not change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers_twin import assert_same_gradients, gradients_of, transformers_config

from model.attention import log_bucket, reachable_rows
from model.deberta import Deberta, initialise
from model.eager_attention import relative_index, segment_mask
from pipeline.config import ModelConfig

ROWS = 120
CONFIG = ModelConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    generator_num_hidden_layers=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture(scope="module")
def pair() -> tuple[Deberta[nn.Embedding], DebertaV2Model]:
    """Our encoder and transformers' with the same weights, biases and norms drawn too so that none of them is idle."""
    ours = Deberta(CONFIG, CONFIG.num_hidden_layers, nn.Embedding(ROWS, CONFIG.hidden_size))
    rng = torch.Generator().manual_seed(1)
    initialise(ours, 0.2, rng)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=rng))
    theirs = DebertaV2Model(transformers_config(CONFIG, ROWS, CONFIG.num_hidden_layers))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def batch(length: int, padded: bool) -> tuple[Tensor, Tensor]:
    """Ids and segments of three rows; when padded, of different lengths."""
    ids = torch.randint(4, ROWS, (3, length), generator=torch.Generator().manual_seed(length))
    lengths = torch.tensor([length, length // 2, 3] if padded else [length] * 3)
    segments = (torch.arange(length) < lengths[:, None]).long()
    return ids * segments, segments


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [8, 64, 128, 200, 512])
def test_encoder_equals_transformers(
    pair: tuple[Deberta[nn.Embedding], DebertaV2Model], length: int, padded: bool
) -> None:
    ours, theirs = pair
    ids, segments = batch(length, padded)
    weights = torch.randn(*ids.shape, CONFIG.hidden_size) * segments[..., None]
    mine = ours(ids, segments)
    other = theirs(ids, attention_mask=segments).last_hidden_state
    assert ((mine - other) * segments[..., None]).abs().max() <= 1e-5

    ours.zero_grad()
    theirs.zero_grad()
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    assert_same_gradients(gradients_of(ours), gradients_of(theirs))


def test_state_dict_keys_are_those_of_transformers(pair: tuple[Deberta[nn.Embedding], DebertaV2Model]) -> None:
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_packed_segments_are_encoded_as_if_alone(pair: tuple[Deberta[nn.Embedding], DebertaV2Model]) -> None:
    ours, _ = pair
    lengths = [30, 1, 50, 13]
    ids, _ = batch(100, padded=False)
    segments = torch.repeat_interleave(torch.tensor([1, 2, 3, 4, 0]), torch.tensor([*lengths, 6])).expand(3, -1)
    with torch.no_grad():
        packed = ours(ids, segments)
        start = 0
        for length in lengths:
            piece = ids[:, start : start + length]
            alone = ours(piece, torch.ones_like(piece))
            assert (packed[:, start : start + length] - alone).abs().max() <= 1e-5
            start += length


def test_padding_starts_at_zero_and_stays_finite(pair: tuple[Deberta[nn.Embedding], DebertaV2Model]) -> None:
    ours, theirs = pair
    ids, segments = batch(16, padded=True)
    first = ours.embeddings(ids, segments)
    assert not first[segments == 0].any()
    assert first.allclose(theirs.embeddings(input_ids=ids, mask=segments), atol=1e-6)
    assert ours(ids, torch.zeros_like(ids)).isfinite().all()


def test_bf16_stays_near_fp32() -> None:
    full = Deberta(CONFIG, 2, nn.Embedding(ROWS, CONFIG.hidden_size)).eval()
    initialise(full, 0.02, torch.Generator().manual_seed(0))
    half = Deberta(CONFIG, 2, nn.Embedding(ROWS, CONFIG.hidden_size)).eval().bfloat16()
    half.load_state_dict(full.state_dict())
    ids, segments = batch(64, padded=True)
    output = half(ids, segments)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    assert ((output - full(ids, segments)) * segments[..., None]).abs().max() < 0.1


def test_bucket_values() -> None:
    expected = {0: 0, 1: 1, 128: 128, 129: 129, 200: 169, 256: 192, 300: 207, 511: 255, 512: 255, 9000: 255}
    assert {distance: log_bucket(distance, 256, 512) for distance in expected} == expected


@pytest.mark.parametrize(("buckets", "reach"), [(256, 512), (256, 1024), (256, 4096), (32, 128)])
def test_buckets_equal_those_of_transformers(buckets: int, reach: int) -> None:
    theirs = make_log_bucket_position(torch.arange(reach), buckets, reach)
    assert [log_bucket(distance, buckets, reach) for distance in range(reach)] == theirs.tolist()


@pytest.mark.parametrize("max_distance", [64, 129, 130])
def test_buckets_of_short_models_are_the_distances_themselves(max_distance: int) -> None:
    near = range(min(max_distance, 129))
    assert [log_bucket(distance, 256, max_distance) for distance in near] == list(near)
    assert log_bucket(max_distance, 256, max_distance) <= 255


def test_only_reachable_rows_of_the_table_are_projected() -> None:
    place = (128, 256, 512, torch.device("cpu"))
    rows, index = reachable_rows(*place), relative_index(*place)
    assert rows.tolist() == list(range(256 - 127, 256 + 128))
    assert index[0, 0] == 127 and index[127, 0] == 254 and index[0, 127] == 0
    assert len(reachable_rows(512, 256, 512, torch.device("cpu"))) == 511


def test_index_made_in_inference_mode_serves_training() -> None:
    model = Deberta(CONFIG, 1, nn.Embedding(ROWS, CONFIG.hidden_size))
    ids, segments = batch(23, padded=False)
    relative_index.cache_clear()
    reachable_rows.cache_clear()
    with torch.inference_mode():
        model(ids, segments)
    model(ids, segments).sum().backward()


def test_mask_separates_segments() -> None:
    mask = segment_mask(torch.tensor([[1, 1, 2, 0]]), torch.float32)
    allowed = mask[0] == 0
    assert allowed.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert (mask[0][~allowed] == -math.inf).all()
