"""Attention alone, microseconds a layer: our kernels, our plain torch, and SDPA without any positions as the limit.

    python benchmarks/attention.py [--tokens 32768 --lengths 128 512 2048 --dtype bfloat16]

12 heads of 64; rows of one segment; forward, and forward with backward; dropout as in training. On a GPU the time is
that between events in its queue. Without one only plain torch and SDPA are timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from model.deberta import Encoder
from pipeline.config import ModelConfig

HEADS, SIZE = 12, 64
DROPOUT = 0.1


def layers(rows: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Forward passes by name; gradients go to queries, keys, values and tables. SDPA has its own, apart."""
    encoder = Encoder(ModelConfig(hidden_size=HEADS * SIZE, num_attention_heads=HEADS), 1).to(device, dtype)
    states = leaf(rows, length, 3, HEADS, SIZE, device=device, dtype=dtype)
    apart = [leaf(rows, length, HEADS, SIZE, device=device, dtype=dtype) for _ in range(3)]
    segments = torch.ones(rows, length, dtype=torch.long, device=device)

    def disentangled(choice: str) -> Callable[[], Tensor]:
        encoder.attention = choice  # type: ignore[assignment]
        relations = encoder.relations(segments)
        table = leaf(len(relations.table), 2, HEADS, SIZE, device=device, dtype=dtype)
        return lambda: relations.remember(states, table).attend(None, DROPOUT)

    def plain() -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in apart)
        return F.scaled_dot_product_attention(*heads_first, dropout_p=DROPOUT).transpose(1, 2)

    ways = {"ours, plain torch": disentangled("eager"), "SDPA without positions": plain}
    return {"ours, fused": disentangled("fused"), **ways} if device.type == "cuda" else ways


def leaf(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random numbers that take a gradient."""
    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)


def microseconds(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """The median time."""
    work()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def compare(tokens: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
    """Print a line for each way at one length."""
    rows = max(1, tokens // length)
    ways = layers(rows, length, device, dtype)
    found = {}
    for name, forward in ways.items():
        out = forward()
        gradient = torch.randn_like(out)
        del out

        def both(forward: Callable[[], Tensor] = forward, gradient: Tensor = gradient) -> None:
            forward().backward(gradient)

        with torch.no_grad():
            ahead = microseconds(forward, device)
        found[name] = (ahead, microseconds(both, device))
    limit = found["SDPA without positions"]
    pairs = rows * HEADS * length * length
    for name, (ahead, whole) in found.items():
        tflops = 14 * pairs * SIZE / whole / 1e6  # of products without positions: 4 forward, 10 backward a pair
        print(
            f"{rows:4} x {length:5} {name:24} forward {ahead:10,.0f} us ({ahead / limit[0]:5.2f}x), with backward "
            f"{whole:10,.0f} us ({whole / limit[1]:5.2f}x SDPA), {tflops:6.1f} TFLOP/s of content"
        )


def main() -> None:
    """Compare at all lengths."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = device.type == "cuda"
    parser.add_argument("--tokens", type=int, default=32_768 if on_gpu else 2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048] if on_gpu else [128, 512])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if on_gpu else "float32"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    for length in options.lengths:
        compare(options.tokens, length, device, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
