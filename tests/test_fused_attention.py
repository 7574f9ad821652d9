"""The fused attention operator against fp64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_reference import Case, Inputs, attend, differences
from torch import nn
from triton.runtime import interpreter

from model import attention_operator as operator
from model.deberta import Deberta, initialise
from model.rtd import Discriminator, Generator, discriminate
from pipeline.config import ModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SEGMENTS = (20, 1, 1, 47)
"""Of 80 tokens; the rest is padding."""


@pytest.fixture(autouse=True)
def interpreted_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as its 16 bits, and multiplies these as integers; here it multiplies numbers."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), operator.kernels.tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return multiply(self, numbers(left), numbers(right), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def assert_right(case: Case) -> None:
    errors = differences(case._replace(device=DEVICE))
    assert max(errors.values()) < TOLERANCE[case.dtype], (case, errors)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 97])
def test_equals_fp64_at_every_edge_of_a_tile(length: int) -> None:
    assert_right(Case(length, rows=1, heads=1, seed=length))


@pytest.mark.parametrize("size", [16, 64])
def test_head_sizes(size: int) -> None:
    assert_right(Case(40, size=size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_right(Case(129, rows=1, heads=1, size=64, dtype=dtype))


@pytest.mark.parametrize("max_distance", [2, 33, 64])
def test_far_distances_share_a_row(max_distance: int) -> None:
    assert_right(Case(129, rows=1, heads=1, max_distance=max_distance))


def test_far_distances_with_segments_some_queries_and_dropout() -> None:
    assert_right(Case(130, heads=1, size=16, max_distance=20, segments=(7, 110), queries=60, dropout=0.1))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("queries", [None, 15])
def test_segments_padding_some_queries_and_dropout(queries: int | None, dropout: float) -> None:
    assert_right(Case(80, heads=1, segments=SEGMENTS, queries=queries, dropout=dropout))


def test_random_shapes() -> None:
    rng = torch.Generator().manual_seed(3)

    def draw(high: int) -> int:
        return int(torch.randint(1, high + 1, (1,), generator=rng))

    for seed in range(200 if DEVICE == "cuda" else 6):
        length = draw(600 if DEVICE == "cuda" else 80)
        segments = tuple(n for n in (draw(length), draw(9)) if n)[: 1 if length < 12 else 2]
        fits = sum(segments) <= length
        assert_right(
            Case(
                length,
                rows=draw(3),
                heads=draw(3),
                segments=segments if fits else (),
                max_distance=draw(300) + 1,
                queries=draw(length) if draw(2) == 1 else None,
                dropout=0.2 * (draw(2) - 1),
                seed=seed,
            )
        )


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 255, 511, 512, 513, 1024, 4096])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    assert_right(Case(length, size=64, dtype=dtype))


def test_rows_without_any_key_are_zero() -> None:
    inputs = Inputs.of(Case(20, device=DEVICE))
    nothing = operator.reach(torch.zeros(2, 20, dtype=torch.long, device=DEVICE))
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors]
    out = attend(tensors, nothing, 0.1)
    out.backward(inputs.grad_out)
    assert not out.any()
    assert not any(tensor.grad.any() for tensor in tensors)


def test_same_input_same_bits() -> None:
    case = Case(80, heads=1, segments=SEGMENTS, dropout=0.1, device=DEVICE)
    runs = []
    for _ in range(2):
        inputs = Inputs.of(case)
        torch.manual_seed(1)
        tensors = [tensor.requires_grad_() for tensor in inputs.tensors]
        out = attend(tensors, inputs.reach, 0.1, None, case.dropout)
        out.backward(inputs.grad_out)
        runs.append([out, *(tensor.grad for tensor in tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_dropout_drops_its_share_and_depends_on_the_seed() -> None:
    torch.manual_seed(0)
    states = torch.empty(2, 256, 1, 3, 1, device=DEVICE)
    one, other = (operator.kept(operator.noise_of(states), 0.1).double() for _ in range(2))
    share, deviation = 0.9, (0.09 / one.numel()) ** 0.5
    assert abs(one.mean() - share) < 5 * deviation
    # By row, by column and by head nothing stands out, and another seed is another draw.
    for axes in ((2,), (3,), (2, 3)):
        means = one.mean(axes).flatten()
        spread = (0.09 / (one.numel() / len(means))) ** 0.5
        assert means.std() == pytest.approx(spread, rel=4 / (2 * len(means)) ** 0.5)
    assert abs(((one - share) * (other - share)).mean()) < 5 * 0.09 / one.numel() ** 0.5
    for both in (one, other):  # nor do a pair and its mirror image
        mirrored = both.mT - share
        mirrored.diagonal(dim1=-2, dim2=-1).zero_()
        assert abs(((both - share) * mirrored).mean()) < 5 * 0.09 / (one.numel() / 2) ** 0.5
    for step in (1, 2, 64):  # nor neighbours
        assert abs(((one[..., step:] - share) * (one[..., :-step] - share)).mean()) < 5 * 0.09 / one.numel() ** 0.5
    centred = one - share
    for down, right in ((1, 1), (1, 64), (3, 5), (128, 128)):  # nor the corners of a rectangle
        across = centred[..., right:] * centred[..., :-right]
        corners = across[..., down:, :] * across[..., :-down, :]
        assert abs(corners.mean()) < 5 * 0.09**2 / corners.numel() ** 0.5


def test_queries_apart_are_as_queries_beside_keys() -> None:
    inputs = Inputs.of(Case(40, segments=(9, 30), device=DEVICE))
    query, key, value, relative_key, relative_query = inputs.tensors
    relative = torch.stack([relative_query, relative_key], 1)
    beside = torch.stack([query, key, value], 2).requires_grad_()
    apart = [query.clone().requires_grad_(), torch.stack([key, value], 2).requires_grad_()]
    outs = (
        operator.disentangled_attention(beside, relative, inputs.reach, 0.1),
        operator.disentangled_attention(apart[1], relative, inputs.reach, 0.1, apart[0]),
    )
    assert torch.equal(*outs)
    for out in outs:
        out.backward(inputs.grad_out)
    assert torch.equal(beside.grad, torch.cat([apart[0].grad[:, :, None], apart[1].grad], 2))


def test_a_single_token_in_any_layout() -> None:
    """Strides of a dimension of size 1 mean nothing, and torch takes any for contiguous."""
    base = torch.randn(1, 4, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    relative = torch.randn(32, 2, 2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    reach = operator.reach(torch.ones(4, 1, dtype=torch.long, device=DEVICE))
    outs = [
        operator.disentangled_attention(states, relative, reach, 0.1)
        for states in (base.transpose(0, 1), base.transpose(0, 1).clone(memory_format=torch.contiguous_format))
    ]
    assert torch.equal(*outs)
    assert torch.allclose(outs[0], base[0, :, None, 2])  # alone, it attends to itself


def test_what_it_cannot_do_is_said() -> None:
    case = Inputs.of(Case(20, size=32, device=DEVICE))
    states, relative = torch.stack(case.tensors[:3], 2), torch.stack(case.tensors[3:], 1)
    with pytest.raises(ValueError, match="heads of size 24"):
        operator.disentangled_attention(states[..., :24], relative[..., :24], case.reach, 0.1)
    with pytest.raises(ValueError, match="different types"):
        operator.disentangled_attention(states, relative.half(), case.reach, 0.1)
    with pytest.raises(ValueError, match="3 states a token"):
        operator.disentangled_attention(states, relative, case.reach, 0.1, case.tensors[0])


@pytest.mark.parametrize("apart", [False, True])
def test_the_operator_is_one_for_torch(apart: bool) -> None:
    inputs = Inputs.of(Case(20, rows=1, heads=1, size=16, device=DEVICE))
    query = inputs.tensors[0].requires_grad_() if apart else None
    states = torch.stack(inputs.tensors[apart:3], 2).detach().requires_grad_()
    relative = torch.stack(inputs.tensors[3:], 1).requires_grad_()
    arguments = (states, relative, query, *inputs.reach, None, None, 0.0, 0.1)
    torch.library.opcheck(
        operator._attend, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, generator_num_hidden_layers=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


@pytest.mark.parametrize("decoder", [True, False])
def test_networks_are_the_same_with_either_attention(decoder: bool) -> None:
    """Both networks' losses and gradients, the mask decoder's queries included, with packed segments and padding."""
    config = CONFIG.model_copy(update={"enhanced_mask_decoder": decoder})
    ids = torch.randint(4, 100, (2, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    segments = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor([12, 1, 22, 5])).expand(2, -1)
    segments = segments.to(DEVICE)
    positions = torch.tensor([[3, 10, 20, 30, 33], [2, 5, -1, -1, -1]], device=DEVICE)
    noise = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for choice in ("eager", "fused"):
        rng = torch.Generator().manual_seed(2)
        generator, discriminator = Generator(config, 128, 120, rng), Discriminator(config, 128, "gdes", rng)
        for network in (generator, discriminator):
            network.to(DEVICE)
            network.deberta.encoder.attention = choice  # type: ignore[assignment]
        mlm = generator(ids, segments, positions, noise)
        rtd = discriminate(generator, discriminator, ids, segments, positions, mlm.sampled)
        (mlm.loss_sum + rtd.loss_sum).backward()
        gradients = {
            name: parameter.grad
            for network in (generator, discriminator)
            for name, parameter in network.named_parameters(prefix=type(network).__name__)
        }
        results.append((mlm, rtd, gradients))
    (mlm, rtd, gradients), (fused_mlm, fused_rtd, fused_gradients) = results
    torch.testing.assert_close(fused_mlm.loss_sum, mlm.loss_sum)
    assert torch.equal(fused_mlm.sampled[positions >= 0], mlm.sampled[positions >= 0])
    torch.testing.assert_close(fused_rtd.loss_sum, rtd.loss_sum)
    torch.testing.assert_close(fused_rtd.logits[segments > 0], rtd.logits[segments > 0], rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_autocast_decides_the_precision() -> None:
    encoder = Deberta(CONFIG, 1, nn.Embedding(100, 32)).to(DEVICE)
    initialise(encoder, 0.2, torch.Generator().manual_seed(0))
    ids, segments = torch.arange(4, 74, device=DEVICE)[None], torch.ones(1, 70, dtype=torch.long, device=DEVICE)
    states = []
    for choice in ("eager", "fused"):
        encoder.encoder.attention = choice  # type: ignore[assignment]
        with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
            states.append(encoder(ids, segments).float())
    torch.testing.assert_close(*states, rtol=0.05, atol=0.05)


def test_compiled_layers_have_no_graph_break() -> None:
    encoder = Deberta(CONFIG, 1, nn.Embedding(100, 32))
    initialise(encoder, 0.2, torch.Generator().manual_seed(0))
    encoder.to(DEVICE)
    encoder.encoder.attention = "fused"
    segments = torch.ones(2, 40, dtype=torch.long, device=DEVICE)
    hidden = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    relations = encoder.encoder.relations(segments)
    (layer,) = encoder.encoder.layers
    expected = layer(hidden, relations)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compiled(hidden, relations)
    torch.testing.assert_close(found, expected)
    expected_gradients, gradients = (
        torch.autograd.grad(states.sum(), list(layer.parameters())) for states in (expected, found)
    )
    torch.testing.assert_close(gradients, expected_gradients)
