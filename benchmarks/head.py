"""The masked-LM head at full vocabulary beside dense cross-entropy and multinomial: time and peak memory.

    python benchmarks/head.py [--masked 1229 --hidden 768 --vocab 251000 --threads 2 --rounds 3]

1,229 masked tokens are 15 % of 8,192. Forward and backward, a draw for every token, bf16 weights and states. The dense
way is the one written first: all logits in fp32, `F.cross_entropy`, `torch.multinomial` on their soft-max. Peak memory
is that of a process of its own, without what it held before its inputs were made; the inputs count.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from turns import compare

from model.head import project_and_sample


def steps(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Each way, on the same random states and table."""
    torch.manual_seed(0)
    table = torch.empty(options.vocab, options.hidden, dtype=torch.bfloat16).normal_(std=0.02).requires_grad_()
    states = torch.randn(options.masked, options.hidden).bfloat16().requires_grad_()
    bias = torch.zeros(options.vocab, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(4, options.vocab - 1000, (options.masked,))
    candidates = range(4, options.vocab - 1000)

    def forget() -> None:
        table.grad = states.grad = bias.grad = None

    def ours() -> None:
        noise = torch.rand(options.masked, 2)
        project_and_sample(states, table, bias, targets, noise, candidates).loss_sum.backward()
        forget()

    def dense() -> None:
        logits = F.linear(states, table, bias).float()
        F.cross_entropy(logits, targets, reduction="sum").backward()
        torch.multinomial(logits.detach().softmax(-1), 1)
        forget()

    return {"ours": ours, "dense": dense}


def peak_mb() -> float:
    """Peak resident memory of this process so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1e3


def print_peak_memory(options: argparse.Namespace, name: str) -> None:
    """Run one way once and print what it took."""
    torch.set_num_threads(options.threads)
    before = peak_mb()
    steps(options)[name]()
    print(f"{name:8} peak {peak_mb() - before:8,.0f} MB")


def main() -> None:
    """Measure the peak memory of each way, then time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"masked": 1229, "hidden": 768, "vocab": 251_000, "threads": 2, "rounds": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="+", choices=["ours", "dense"], default=["ours", "dense"])
    options = parser.parse_args()
    for name in options.ways:
        child = multiprocessing.get_context("spawn").Process(target=print_peak_memory, args=(options, name))
        child.start()
        child.join()
    if options.rounds:
        torch.set_num_threads(options.threads)
        ways = {name: work for name, work in steps(options).items() if name in options.ways}
        title = f"head, V = {options.vocab}, width {options.hidden}, bf16"
        compare(title, "ours", ways, options.masked, "masked tokens", options.rounds)


if __name__ == "__main__":
    main()
