"""One full RTD training step (generator, sampling, discriminator, AdamW) beside the same composed from `transformers`.

    python benchmarks/step.py [--layers 12 --hidden 384 --length 256 --rows 8 --vocab 64000 --threads 2]
    python benchmarks/step.py --device cuda --dtype bfloat16 --hidden 768 --length 512 --rows 64 --vocab 251000

The peers are `DebertaV2ForMaskedLM` as shipped, with logits at all positions, and the same with its head at the masked
positions only; both share embeddings by GDES as a summed table. Generators have half the layers, every way has torch's
fused AdamW. Peak memory is that of a process of its own for each way, on a GPU that of the GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model
from turns import compare

from model.rtd import Discriminator, Generator, discriminate
from pipeline.config import ModelConfig

WEIGHT = 50.0


class Batch(NamedTuple):
    """ids and segments [B, L], masked positions [B, K]."""

    ids: Tensor
    segments: Tensor
    masked: Tensor


def batch_of(options: argparse.Namespace) -> Batch:
    """Random rows of one segment each with 15 % of their tokens masked."""
    rows, length = options.rows, options.length
    ids = torch.randint(4, options.vocab - 100, (rows, length))
    ids[:, 0], ids[:, -1] = 1, 2
    count = round(0.15 * length)
    masked = torch.stack([torch.randperm(length - 2)[:count] + 1 for _ in range(rows)]).sort(dim=1).values
    return Batch(*(tensor.to(options.device) for tensor in (ids, torch.ones_like(ids), masked)))


def place(network: nn.Module, options: argparse.Namespace) -> None:
    """Bring a network to the device and the precision of the comparison, for training."""
    network.to(options.device, getattr(torch, options.dtype)).train()


def ours(options: argparse.Namespace, batch: Batch) -> Callable[[], None]:
    """A decoupled step of this project's modules."""
    config = ModelConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
        generator_num_hidden_layers=options.layers // 2,
        enhanced_mask_decoder=False,  # transformers has none
    )
    generator = Generator(config, options.vocab, options.vocab - 100)
    discriminator = Discriminator(config, options.vocab, "gdes")
    for network in (generator, discriminator):
        place(network, options)
    optimizers = [torch.optim.AdamW(network.parameters(), 1e-4, fused=True) for network in (generator, discriminator)]

    def step() -> None:
        mlm = generator(*batch, torch.rand(*batch.masked.shape, 2, device=options.device))
        (mlm.loss_sum / mlm.tokens).backward()
        update(optimizers[0])
        rtd = discriminate(generator, discriminator, *batch, mlm.sampled)
        (WEIGHT * rtd.loss_sum / rtd.tokens).backward()
        update(optimizers[1])

    return step


class Composed(nn.Module):
    """Generator and discriminator from `transformers`, E_D = sg(E_G) + E_delta as one table."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.generator = DebertaV2ForMaskedLM(hf_config(options, options.layers // 2))
        self.discriminator = DebertaV2Model(hf_config(options, options.layers))
        self.discriminator.embeddings.word_embeddings.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros(options.vocab, options.hidden))
        self.norm = nn.LayerNorm(options.hidden)
        width = options.hidden
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    @property
    def table(self) -> Tensor:
        """E_G [V, D]."""
        return self.generator.deberta.embeddings.word_embeddings.weight

    def masked_logits(self, ids: Tensor, batch: Batch, everywhere: bool) -> Tensor:
        """[B * K, V], computed at all positions first or at the masked ones alone."""
        if everywhere:
            logits = self.generator(ids, attention_mask=batch.segments).logits
            return logits.gather(1, batch.masked[..., None].expand(-1, -1, logits.shape[-1])).flatten(0, 1)
        hidden = self.generator.deberta(ids, attention_mask=batch.segments).last_hidden_state
        hidden = hidden.gather(1, batch.masked[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.generator.lm_predictions(hidden, self.generator.deberta.embeddings.word_embeddings).flatten(0, 1)

    def judge(self, ids: Tensor, batch: Batch) -> Tensor:
        """Logits [B, L] of the discriminator."""
        embedded = F.embedding(ids, self.table.detach() + self.delta)
        hidden = self.discriminator(inputs_embeds=embedded, attention_mask=batch.segments).last_hidden_state
        return self.head(self.norm(hidden + hidden[:, :1])).squeeze(-1)


def composed(options: argparse.Namespace, batch: Batch, everywhere: bool) -> Callable[[], None]:
    """The step one writes with `transformers`."""
    model = Composed(options)
    place(model, options)
    own = {id(parameter) for parameter in model.generator.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    optimizers = [torch.optim.AdamW(owned, 1e-4, fused=True) for owned in (model.generator.parameters(), rest)]

    def step() -> None:
        logits = model.masked_logits(batch.ids.scatter(1, batch.masked, options.vocab - 100), batch, everywhere)
        F.cross_entropy(logits.float(), batch.ids.gather(1, batch.masked).flatten()).backward()
        update(optimizers[0])
        drawn = torch.multinomial(logits.detach().float().softmax(-1), 1).view_as(batch.masked)
        corrupted = batch.ids.scatter(1, batch.masked, drawn)
        replaced = (corrupted != batch.ids).float()
        (WEIGHT * F.binary_cross_entropy_with_logits(model.judge(corrupted, batch).float(), replaced)).backward()
        update(optimizers[1])

    return step


def update(optimizer: torch.optim.Optimizer) -> None:
    """One AdamW step on fresh gradients."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def hf_config(options: argparse.Namespace, layers: int) -> DebertaV2Config:
    """DeBERTaV3 spelled out for `transformers`, whose defaults are another architecture."""
    return DebertaV2Config(
        vocab_size=options.vocab, hidden_size=options.hidden, num_hidden_layers=layers,
        num_attention_heads=options.hidden // 64, intermediate_size=4 * options.hidden, layer_norm_eps=1e-7,
        relative_attention=True, position_buckets=256, max_relative_positions=-1, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, type_vocab_size=0, legacy=False,
    )  # fmt: skip


def steps(options: argparse.Namespace) -> dict[str, Callable[[], Callable[[], None]]]:
    """Each way's name and what builds its step."""
    batch = batch_of(options)
    return {
        "ours": lambda: ours(options, batch),
        "transformers, masked head": lambda: composed(options, batch, everywhere=False),
        "transformers as shipped": lambda: composed(options, batch, everywhere=True),
    }


def finished(step: Callable[[], None], options: argparse.Namespace) -> Callable[[], None]:
    """The step with all that it started on a GPU."""

    def whole() -> None:
        step()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return whole


def print_peak_memory(options: argparse.Namespace, name: str) -> None:
    """Take two steps of one way and print the peak memory of this process, or of its GPU."""
    torch.set_num_threads(options.threads)
    step = steps(options)[name]()
    step()
    step()
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 1e3
    print(f"{name:32} peak {peak:8,.0f} MB")


def main() -> None:
    """Time all ways in turn, then measure the peak memory of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "hidden": 384, "length": 256, "rows": 8, "vocab": 64_000, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ways = {name: finished(build(), options) for name, build in steps(options).items()}
    for step in ways.values():
        step()
    shape = f"{options.layers // 2}+{options.layers} layers of {options.hidden}, V = {options.vocab}"
    compare(f"RTD step, {shape}, {options.dtype}", "ours", ways, options.rows * options.length, "tokens")
    for name in ways:
        child = multiprocessing.get_context("spawn").Process(target=print_peak_memory, args=(options, name))
        child.start()
        child.join()


if __name__ == "__main__":
    main()
