"""Ways to compute a step that must not change it: activations computed again, compiled layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.deberta import Deberta, Encoder, initialise
from model.rtd import Discriminator, Generator, discriminate
from pipeline.config import ModelConfig
from pipeline.errors import UserError

CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, generator_num_hidden_layers=2
)


def losses_and_gradients(set_up: Callable[[Encoder], None], dtype: torch.dtype) -> list[Tensor]:
    """Of one step with dropout, on packed rows."""
    rng = torch.Generator().manual_seed(0)
    generator, discriminator = Generator(CONFIG, 128, 120, rng), Discriminator(CONFIG, 128, "gdes", rng)
    for network in (generator, discriminator):
        network.to(dtype)
        set_up(network.deberta.encoder)
    ids = torch.randint(4, 120, (3, 40), generator=rng)
    segments = torch.repeat_interleave(torch.tensor([1, 2, 0]), torch.tensor([20, 15, 5])).expand(3, -1)
    positions = torch.tensor([[3, 17, 25]]).expand(3, -1)
    torch.manual_seed(1)
    mlm = generator(ids, segments, positions, torch.rand(3, 3, 2))
    mlm.loss_sum.backward()
    rtd = discriminate(generator, discriminator, ids, segments, positions, mlm.sampled)
    rtd.loss_sum.backward()
    gradients = [p.grad for p in (*generator.parameters(), *discriminator.parameters()) if p.grad is not None]
    return [mlm.loss_sum.detach(), rtd.loss_sum.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_computed_again_are_the_same_bits(dtype: torch.dtype) -> None:
    kept = losses_and_gradients(lambda encoder: encoder.set_up("auto", False, False), dtype)
    again = losses_and_gradients(lambda encoder: encoder.set_up("auto", False, True), dtype)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_activations_within_layers_are_not_kept() -> None:
    def kept_bytes(checkpoint_activations: bool) -> int:
        encoder = Deberta(CONFIG, 2, nn.Embedding(120, 32))
        encoder.encoder.set_up("auto", False, checkpoint_activations)
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.itemsize)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(torch.randint(4, 120, (4, 64)), torch.ones(4, 64, dtype=torch.long)).sum()
        return sum(sizes)

    assert kept_bytes(True) < kept_bytes(False) / 5


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    encoder = Deberta(CONFIG, 1, nn.Embedding(120, 32)).eval()
    initialise(encoder, 0.2, torch.Generator().manual_seed(0))
    ids, segments = torch.arange(4, 44)[None], torch.ones(1, 40, dtype=torch.long)
    expected = encoder(ids, segments)
    encoder.encoder.set_up("auto", True, False)
    torch.testing.assert_close(encoder(ids, segments), expected)


def test_fused_attention_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.deberta.has_triton", lambda: False)
    with pytest.raises(UserError, match=r"pretrain\.attention fused needs a GPU, and Triton"):
        Encoder(CONFIG, 1).set_up("fused", False, False)
