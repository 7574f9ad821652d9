"""The chunked head against dense cross-entropy, its draws against the soft-max they come from."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.head import project_and_sample


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def projection() -> dict[str, Any]:
    """37 states against 1,301 rows, a prime so that no block divides it; three tokens have no target."""
    rng = seeded(9)
    targets = torch.randint(0, 1301, (37,), generator=rng)
    targets[[0, 17, 36]] = -1
    return {
        "hidden": torch.randn(37, 24, generator=rng, requires_grad=True),
        "weight": torch.randn(1301, 24, generator=rng).mul_(0.7).requires_grad_(),
        "bias": torch.randn(1301, generator=rng, requires_grad=True),
        "targets": targets,
    }


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the head use its kernels, in Triton's interpreter where there is no GPU, or not."""
    monkeypatch.setattr("model.head._has_kernels", lambda _: request.param)


@pytest.mark.parametrize("kernels", [False, True], indirect=True)
@pytest.mark.parametrize("kept_logits", [0, 2**26])
@pytest.mark.parametrize("logits_at_once", [1, 37 * 600, 2**28])
@pytest.mark.usefixtures("kernels")
def test_chunked_loss_and_gradients_equal_dense(
    projection: dict[str, Any], logits_at_once: int, kept_logits: int
) -> None:
    inputs = [projection[name] for name in ("hidden", "weight", "bias")]
    logits = F.linear(*inputs)
    dense = F.cross_entropy(logits, projection["targets"], ignore_index=-1, reduction="sum")
    expected = torch.autograd.grad(3.0 * dense, inputs)
    output = project_and_sample(
        **projection,
        noise=torch.rand(37, 2),
        candidates=range(4, 1290),
        logits_at_once=logits_at_once,
        kept_logits=kept_logits,
    )
    assert output.loss_sum.item() == pytest.approx(dense.item(), rel=1e-5)
    for mine, reference in zip(torch.autograd.grad(3.0 * output.loss_sum, inputs), expected, strict=True):
        assert (mine - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_bf16_head_computes_in_fp32(projection: dict[str, Any]) -> None:
    half: dict[str, Any] = {
        name: projection[name].detach().bfloat16().requires_grad_() for name in ("hidden", "weight", "bias")
    }
    dense = F.cross_entropy(
        F.linear(*(t.float() for t in half.values())), projection["targets"], ignore_index=-1, reduction="sum"
    )
    output = project_and_sample(
        **half, targets=projection["targets"], noise=torch.rand(37, 2), candidates=range(4, 1290)
    )
    assert output.loss_sum.dtype == torch.float32
    assert output.loss_sum.item() == pytest.approx(dense.item(), rel=1e-5)
    expected = torch.autograd.grad(dense, list(half.values()))
    for mine, reference in zip(torch.autograd.grad(output.loss_sum, list(half.values())), expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - reference).abs().max() <= 2e-2 * reference.abs().max()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_head_never_holds_all_logits(projection: dict[str, Any]) -> None:
    with Largest() as seen:
        output = project_and_sample(
            **projection, noise=torch.rand(37, 2), candidates=range(4, 1290), logits_at_once=4 * 1301, kept_logits=0
        )
        output.loss_sum.backward()
    assert seen.elements <= 1301 * 24 < 37 * 1301


@pytest.mark.parametrize("kernels", [False, True], indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.usefixtures("kernels")
def test_draws_do_not_depend_on_how_the_vocabulary_is_cut(projection: dict[str, Any], temperature: float) -> None:
    noise = torch.rand(37, 2, generator=seeded(5))
    drawn = [
        project_and_sample(**projection, noise=noise, candidates=range(4, 1290), temperature=temperature, **limits)
        for limits in ({}, {"logits_at_once": 1}, {"logits_at_once": 37 * 1024, "kept_logits": 0})
    ]
    assert all(one.sampled.equal(drawn[0].sampled) for one in drawn)
    with torch.no_grad():
        assert project_and_sample(
            **projection, noise=noise, candidates=range(4, 1290), temperature=temperature
        ).sampled.equal(drawn[0].sampled)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_have_the_soft_max_frequencies_and_never_a_forbidden_id(temperature: float) -> None:
    draws, rows, candidates = 20_000, 1100, range(4, 1061)
    logits = torch.randn(rows, generator=seeded(1)) * 2
    logits[:4] = logits[1061:] = 9.0  # what must not be drawn is by far the likeliest
    output = project_and_sample(
        hidden=torch.zeros(draws, 1),
        weight=torch.zeros(rows, 1),
        bias=logits,
        targets=torch.zeros(draws, dtype=torch.long),
        noise=torch.rand(draws, 2, dtype=torch.float64, generator=seeded(2)),
        candidates=candidates,
        temperature=temperature,
    )
    assert output.sampled.min() >= 4 and output.sampled.max() < 1061
    expected = draws * torch.softmax(logits[4:1061].double() / temperature, dim=0)
    observed = torch.bincount(output.sampled - 4, minlength=len(candidates)).double()
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_extreme_noise_and_logits_stay_among_the_candidates() -> None:
    bias = torch.full((600,), -80.0)
    bias[[0, 599]] = 200.0
    noise = torch.tensor(
        [[0.0, 0.0], [1 - 2**-53, 1 - 2**-53], [0.0, 1 - 2**-53], [1 - 2**-53, 0.0]], dtype=torch.float64
    )
    for values in (bias, torch.zeros(600), torch.full((600,), float("nan"))):
        sampled = project_and_sample(
            torch.zeros(4, 1), torch.zeros(600, 1), values, torch.zeros(4).long(), noise, range(4, 599)
        ).sampled
        assert sampled.min() >= 4 and sampled.max() < 599
    assert sampled.shape == (4,)


@pytest.mark.slow
def test_peak_memory_at_full_vocabulary_stays_under_a_gigabyte_and_a_half() -> None:
    """8,192 tokens, 15 % of them masked, 251,000 rows of 768 in bf16; inputs (0.4 GB) and gradients count."""
    script = Path(__file__).parents[1] / "benchmarks" / "head.py"
    arguments = ["--ways", "ours", "--rounds", "0", "--threads", "1"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True, timeout=500)
    (peak,) = re.findall(r"ours +peak +([\d,]+) MB", done.stdout)
    assert 700 < int(peak.replace(",", "")) < 1500
