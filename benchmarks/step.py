"""One full RTD training step (generator, sampling, discriminator, AdamW) beside the same composed from `transformers`.

    python benchmarks/step.py [--layers 12 --hidden 384 --length 256 --rows 8 --vocab 64000 --threads 2]
    python benchmarks/step.py --device cuda --dtype bfloat16 --hidden 768 --length 512 --rows 64 --vocab 251000

The peers are `DebertaV2ForMaskedLM` as shipped, with logits at all positions, and the same with its head at the masked
positions only; on a GPU also that compiled, and that with the kernels of disentangled-flash where these are installed.
Documents of CC100's lengths are taken one a row and packed, by ours; what counts then are tokens that are no padding.

Utilisation is `model.flops`' count of what the mathematics asks for over 790 TFLOP/s, what an H200 reaches in large
products of bf16. Peak memory is that of a process of its own for each way, on a GPU that of the GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from step_peers import WEIGHT, Batch, peers, update
from turns import compare

from model.flops import flops_per_token
from model.phases import Phases
from model.rtd import Discriminator, Generator, discriminate
from pipeline.config import ModelConfig, PretrainConfig

PEAK_TFLOPS = 790.0
MASKED = 0.15
DOCUMENT_TOKENS = (40, 85, 105, 125, 148, 172, 198, 228, 261, 302, 344, 399, 467, *[512] * 8)
"""Every twentieth of the lengths of CC100's documents, over 107 languages, cut at 512."""


def batch_of(options: argparse.Namespace, lengths: list[list[int]] | None = None) -> Batch:
    """Random rows with 15 % of their tokens masked.

    Args:
        options: of the command line.
        lengths: of the segments of each row; None = one that fills it.
    """
    length = options.length
    lengths = lengths or [[length]] * options.rows
    ids = torch.randint(4, options.vocab - 100, (len(lengths), length))
    segments = torch.zeros_like(ids)
    masked = torch.full((len(lengths), round(MASKED * length)), -1)
    for row, parts in enumerate(lengths):
        numbers = torch.repeat_interleave(torch.arange(len(parts)) + 1, torch.tensor(parts))
        segments[row, : len(numbers)] = numbers
        chosen = torch.randperm(len(numbers) - 2)[: round(MASKED * len(numbers))] + 1
        masked[row, : len(chosen)] = chosen.sort().values
    ids = ids.where(segments > 0, 0)
    return Batch(*(tensor.to(options.device) for tensor in (ids, segments, masked)))


def networks(options: argparse.Namespace) -> tuple[Generator, Discriminator]:
    """Ours, in the precision and on the device of the comparison, for training."""
    config = model_config(options)
    with torch.device(options.device):
        generator = Generator(config, options.vocab, options.vocab - 100)
        discriminator = Discriminator(config, options.vocab, "gdes")
    for network in (generator, discriminator):
        network.to(options.device, getattr(torch, options.dtype)).train()
        network.deberta.encoder.set_up(options.attention, options.device == "cuda", options.checkpoint_activations)
    return generator, discriminator


def model_config(options: argparse.Namespace) -> ModelConfig:
    """The shape of ours and the peers'; `transformers` has no mask decoder."""
    return ModelConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
        generator_num_hidden_layers=options.layers // 2,
        enhanced_mask_decoder=False,
    )


def ours(options: argparse.Namespace, batch: Batch, phases: Phases | None = None) -> Callable[[], None]:
    """A decoupled step of this project's modules."""
    generator, discriminator = networks(options)
    optimizers = [torch.optim.AdamW(network.parameters(), 1e-4, fused=True) for network in (generator, discriminator)]
    begin = phases.begin if phases else lambda _: None
    generator.lm_predictions.lm_head.register_forward_pre_hook(lambda *_: begin("sampling"))

    def step() -> None:
        begin("generator forward")
        mlm = generator(*batch, torch.rand(*batch.masked.shape, 2, device=options.device))
        begin("generator backward")
        (mlm.loss_sum / mlm.tokens).backward()
        begin("optimizer")
        update(optimizers[0])
        begin("discriminator forward")
        rtd = discriminate(generator, discriminator, *batch, mlm.sampled)
        begin("discriminator backward")
        (WEIGHT * rtd.loss_sum / rtd.tokens).backward()
        begin("optimizer")
        update(optimizers[1])

    return step


def documents(options: argparse.Namespace) -> dict[str, Batch]:
    """As many rows of documents of CC100's lengths: one a row, and as many as fit."""
    rng = torch.Generator().manual_seed(0)

    def draw() -> int:
        step = int(torch.randint(0, len(DOCUMENT_TOKENS), (1,), generator=rng))
        return min(DOCUMENT_TOKENS[step], options.length)

    padded = [[draw()] for _ in range(options.rows)]
    packed: list[list[int]] = [[] for _ in range(options.rows)]
    for row in packed:
        while (left := options.length - sum(row)) > 8:
            row.append(min(draw(), left))
    return {"one document a row": batch_of(options, padded), "packed documents": batch_of(options, packed)}


def ways(options: argparse.Namespace) -> dict[str, Callable[[], Callable[[], None]]]:
    """Each way's name and what builds its step."""
    batch = batch_of(options)
    return {"ours": lambda: ours(options, batch), **peers(options, batch)}


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
    step = ways(options)[name]()
    step()
    step()
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 1e3
    print(f"{name:46} peak {peak:8,.0f} MB")


def print_phases(options: argparse.Namespace, steps: int = 5) -> None:
    """Where the time of our step goes."""
    phases = Phases(torch.device(options.device))
    step = ours(options, batch_of(options), phases)
    step()
    phases.discard()
    for _ in range(steps):
        step()
        phases.settle()
    parts = {name: seconds / steps for name, seconds in phases.take().items() if name != "data_seconds"}
    total = sum(parts.values())
    tokens = options.rows * options.length / total
    training = PretrainConfig(model=model_config(options))
    used = tokens * flops_per_token(training, options.length, options.vocab) / 1e12
    shares = ", ".join(f"{name.removesuffix('_seconds')} {seconds / total:.0%}" for name, seconds in parts.items())
    print(f"ours, {options.rows} x {options.length}: {total * 1000:,.1f} ms, {tokens:,.0f} tokens/s; {shares}")
    print(f"ours: {used:,.2f} model TFLOP/s, {used / PEAK_TFLOPS:.1%} of {PEAK_TFLOPS:.0f}")


def compare_steps(options: argparse.Namespace, rounds: int = 5, without: Collection[str] = ()) -> None:
    """Time all ways in turn, `without` those that do not work."""
    builders = {name: build for name, build in ways(options).items() if name not in without}
    steps = {name: finished(build(), options) for name, build in builders.items()}
    for step in steps.values():
        step()
    shape = f"{options.layers // 2}+{options.layers} layers of {options.hidden}, V = {options.vocab}"
    shape += f", {options.rows} x {options.length} {options.dtype}"
    compare(f"RTD step, {shape}", "ours", steps, options.rows * options.length, "tokens", rounds)


def compare_packing(options: argparse.Namespace, rounds: int = 5) -> None:
    """Time ours on padded and on packed documents, by tokens that are no padding."""
    rates = {}
    for name, batch in documents(options).items():
        step = finished(ours(options, batch), options)
        step()
        tokens = int((batch.segments > 0).sum())
        seconds = Phases(torch.device("cpu"))
        for _ in range(rounds):
            seconds.begin("generator forward")
            step()
        seconds.settle()
        rates[name] = tokens * rounds / seconds.take()["generator_seconds"]
        print(f"ours, {name:24} {rates[name]:12,.0f} tokens/s that are no padding, {tokens:,} a step")
    padded, packed = rates.values()
    print(f"packed is {packed / padded:.2f}x as fast as padded")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "hidden": 384, "length": 256, "rows": 8, "vocab": 64_000, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--attention", choices=["auto", "eager", "fused"], default="auto")
    parser.add_argument("--checkpoint-activations", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Time all ways in turn, ours by phase and on documents, then measure the peak memory of each."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    compare_steps(options)
    print_phases(options)
    compare_packing(options)
    for name in ways(options):
        child = multiprocessing.get_context("spawn").Process(target=print_peak_memory, args=(options, name))
        child.start()
        child.join()


if __name__ == "__main__":
    main()
