"""Everything about a GPU in one run of less than eight minutes: whether the kernels are right, and how fast all is.

    python benchmarks/gpu.py [--out results]

Needed beside torch (2.11 or later, with its Triton), transformers and numpy: pydantic, pyyaml, psutil, and for that
peer disentangled-flash. Not needed: DeepSpeed, Beam, or an installation of this project.

    1. the kernels against fp64: every length, precision and head size, segments, queries, dropout, 200 random shapes;
       several processes at a time, because compiling is what takes the time; the head's kernels at full vocabulary
    2. the training step at three lengths by phase, that nothing in it waits for the device and how far the host is
       ahead; on documents; beside its peers, and the peak memory of each
    3. 300 steps from one seed with fused and with plain attention: two curves in losses.json and losses.svg
    4. attention alone beside SDPA, and with the time that is left, how its kernels are best started

Without a GPU, TRITON_INTERPRET=1 runs the third part alone, of a tiny model in fp32, in a quarter of an hour.

Each part is announced with the seconds so far; one that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import attention  # noqa: E402
import step  # noqa: E402
import torch  # noqa: E402
from attention_reference import Case, differences  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from model import attention_operator as operator  # noqa: E402
from model.head import project_and_sample  # noqa: E402
from model.rtd import discriminate  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 255, 511, 512, 513, 1024, 4096)
STEPS = 300
CHECK_SECONDS = 150
ALL_SECONDS = 450


def cases(device: str) -> Iterator[Case]:
    """What the kernels have to get right."""
    for dtype in TOLERANCE:
        for size in (64, 32):
            for length in LENGTHS if size == 64 else LENGTHS[:8]:
                yield Case(length, rows=1, heads=1 if length > 1024 else 3, size=size, dtype=dtype, device=device)
        for queries in (None, 60):
            for dropout in (0.0, 0.1):
                segments = (200, 1, 1, 90, 64)
                yield Case(
                    400, size=64, dtype=dtype, segments=segments, queries=queries, dropout=dropout, device=device
                )
    rng = torch.Generator().manual_seed(7)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    for seed in range(200):
        length = draw(33, 600)
        split = draw(1, length)
        yield Case(
            length,
            rows=draw(1, 3),
            heads=draw(1, 4),
            size=64,
            dtype=torch.bfloat16,
            segments=(split, draw(0, length - split)) if draw(0, 1) else (),
            max_distance=draw(2, 512),
            queries=draw(1, length) if draw(0, 2) == 0 else None,
            dropout=0.1 * draw(0, 1),
            device=device,
            seed=seed,
        )


def check(case: Case) -> tuple[Case, float, str]:
    """The worst relative error of a case, or what went wrong with it."""
    try:
        return case, max(differences(case).values()), ""
    except Exception as error:
        return case, float("inf"), f"{type(error).__name__}: {error}"[:300]


def check_attention(device: str, processes: int) -> None:
    """All cases; raise if one is wrong."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        found = list(pool.map(check, cases(device), chunksize=4, timeout=CHECK_SECONDS))
    finally:
        for process in list(pool._processes.values()):  # one that hangs would be waited for
            process.kill()
    for dtype, tolerance in TOLERANCE.items():
        errors = {case: error for case, error, _ in found if case.dtype == dtype}
        worst = max(errors, key=errors.__getitem__)
        print(f"{len(errors)} cases in {dtype}: worst error {errors[worst]:.1e} of {tolerance:.0e} allowed, at {worst}")
    wrong = [(case, error, what) for case, error, what in found if not error < TOLERANCE[case.dtype]]
    if wrong:
        raise AssertionError(f"{len(wrong)} cases are wrong, among them {wrong[:5]}")


def check_head(device: str) -> None:
    """Loss, gradients and draws of the head beside those of dense operations in fp32."""
    rng = torch.Generator(device).manual_seed(0)
    rows, tokens, width = 251_000, 700, 256
    states = torch.randn(tokens, width, generator=rng, device=device).bfloat16().requires_grad_()
    table = (torch.randn(rows, width, generator=rng, device=device) * 0.1).bfloat16().requires_grad_()
    bias = torch.randn(rows, generator=rng, device=device).bfloat16().requires_grad_()
    targets = torch.randint(-1, rows, (tokens,), generator=rng, device=device)
    noise = torch.rand(tokens, 2, generator=rng, device=device)
    leaves = [states, table, bias]
    dense = F.cross_entropy(F.linear(*(leaf.float() for leaf in leaves)), targets, ignore_index=-1, reduction="sum")
    expected = torch.autograd.grad(dense, leaves)
    for kept in (0, 1 << 30):
        out = project_and_sample(*leaves, targets, noise, range(4, rows - 900), kept_logits=kept)
        found = torch.autograd.grad(out.loss_sum, leaves)
        errors = [
            float((one.float() - other.float()).norm() / other.float().norm())
            for one, other in zip(found, expected, strict=True)
        ]
        off = abs(float(out.loss_sum / dense) - 1)
        print(f"head at V = {rows:,}: loss off by {off:.1e}, gradients by {', '.join(f'{e:.1e}' for e in errors)}")
        assert off < 1e-4 and max(errors) < 1e-2
        assert int(out.sampled.min()) >= 4 and int(out.sampled.max()) < rows - 900


def time_attention(device: str) -> None:
    """Ours beside SDPA."""
    for length in (128, 512, 2048):
        attention.compare(32_768, length, torch.device(device), torch.bfloat16)


def sweep(device: str, deadline: float) -> None:
    """Ways of starting the kernels at length 512, as many as there is time for."""
    where = torch.device(device)
    for tile in (64, 32):
        operator.largest_tile = lambda *_, tile=tile: tile
        forward = attention.layers(64, 512, where, torch.bfloat16)["ours, fused"]
        both = partial(train_once, forward, torch.randn_like(forward()))
        for kernel, launches in operator.LAUNCHES.items():
            usual = launches[tile]
            for warps, stages in ((4, 1), (4, 2), (8, 1), (8, 2), (8, 3)):
                if time.perf_counter() > deadline:
                    print("no time is left")
                    return
                launches[tile] = operator.Launch(warps, stages)
                how = f"T = {tile}, {kernel.__name__:18} {warps} warps, {stages} stages"
                try:
                    took = attention.microseconds(both, where, rounds=5)
                    print(f"{how}: with backward {took:10,.0f} us{' (usual)' if launches[tile] == usual else ''}")
                except Exception as error:  # too much shared memory
                    print(f"{how}: {type(error).__name__}")
            launches[tile] = usual


def train_once(forward: Callable[[], torch.Tensor], gradient: torch.Tensor) -> None:
    """Forward and backward."""
    forward().backward(gradient)


def time_steps(device: str, shape: list[str]) -> None:
    """The whole step at three lengths, with all peers at 512."""
    for length, rows in ((128, 256), (2048, 16), (512, 64)):
        torch._dynamo.reset()
        options = step.parse(["--device", device, *shape, "--length", str(length), "--rows", str(rows)])
        step.print_phases(options)
        print_lead(options)
    step.compare_packing(options)
    failed = []
    for name, build in step.ways(options).items():
        work = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            work = build()
            work()
            work()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            print(f"{name:46} peak {peak:8,.0f} MB")
        except Exception as error:
            failed.append(name)
            print(f"{name:46} failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    work = None
    gc.collect()
    torch.cuda.empty_cache()
    step.compare_steps(options, rounds=3, without=failed)


def print_lead(options: argparse.Namespace) -> None:
    """When the host has queued our step and when the device is done: CUDA graphs could win what the host is later.

    The queue is finite: with more than about a thousand kernels a step the host is held back to the device's pace, and
    what it then says is only that it is not slower.
    """
    work = step.ours(options, step.batch_of(options))
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    began = time.perf_counter()
    try:
        work()
        waits = "nothing waits on the way"
    except RuntimeError as error:
        waits = f"it waits: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    done = time.perf_counter() - began
    print(f"ours: queued after {queued * 1e3:,.1f} ms, done after {done * 1e3:,.1f} ms; {waits}")


def draw_curves(device: str, shape: list[str], out: Path) -> None:
    """300 steps of a small model with either attention on the same rows of an invented language."""
    options = step.parse(["--device", device, *shape])
    curves: dict[str, list[float]] = {}
    for choice in ("eager", "fused"):
        torch.manual_seed(0)
        generator, discriminator = step.networks(options)
        for network in (generator, discriminator):
            network.deberta.encoder.attention = choice
        for module in [*generator.modules(), *discriminator.modules()]:
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "query_proj"):
                module.dropout = 0.0
        optimizers = [torch.optim.AdamW(net.parameters(), 3e-4, fused=True) for net in (generator, discriminator)]
        losses = curves[choice] = []
        torch.manual_seed(1)
        follows = torch.randint(4, options.vocab - 100, (options.vocab,))
        for _ in range(STEPS):
            batch = step.batch_of(options)
            ids = batch.ids.cpu()
            for place in range(1, ids.shape[1]):  # a word is followed by its own successor, three times out of four
                ids[:, place] = torch.where(torch.rand(len(ids)) < 0.75, follows[ids[:, place - 1]], ids[:, place])
            batch = batch._replace(ids=ids.to(device))
            noise = torch.rand(*batch.masked.shape, 2).to(device)
            mlm = generator(*batch, noise)
            (mlm.loss_sum / mlm.tokens).backward()
            step.update(optimizers[0])
            rtd = discriminate(generator, discriminator, *batch, mlm.sampled)
            (rtd.loss_sum / rtd.tokens).backward()
            step.update(optimizers[1])
            losses.append(float(mlm.loss_sum.detach() / mlm.tokens))
    gaps = [abs(one - other) for one, other in zip(*curves.values(), strict=True)]
    apart = [abs(one - other) for one, other in pairwise(curves["eager"])]
    print(
        f"{STEPS} steps: loss {curves['fused'][0]:.3f} to {curves['fused'][-1]:.3f}; fused and plain differ by "
        f"{sum(gaps) / len(gaps):.1e} on average and {max(gaps):.1e} at most, neighbouring steps by "
        f"{sum(apart) / len(apart):.1e}"
    )
    (out / "losses.json").write_text(json.dumps(curves))
    (out / "losses.svg").write_text(picture(curves))


def picture(curves: dict[str, list[float]]) -> str:
    """Two curves, the second one dashed, as SVG."""
    lowest, highest = min(map(min, curves.values())), max(map(max, curves.values()))
    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-dasharray="{"4 4" * number or "none"}" points="'
        + " ".join(f"{2 * x},{300 - 280 * (y - lowest) / (highest - lowest):.1f}" for x, y in enumerate(values))
        + f'"/><text x="450" y="{20 + 20 * number}" fill="{colour}">{name}</text>'
        for number, ((name, values), colour) in enumerate(zip(curves.items(), ("#1f77b4", "#d62728"), strict=True))
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * STEPS} 310">{lines}</svg>'


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for losses.json and losses.svg")
    parser.add_argument("--processes", type=int, default=12, help="that check kernels at a time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    curves = ["--length", "128", "--rows", "16", "--vocab", "4096", "--hidden", "256", "--layers", "4"]
    if not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":
            sys.exit("no GPU is here that torch can use; with TRITON_INTERPRET=1 the 300 steps run without one")
        tiny = ["--length", "64", "--rows", "2", "--vocab", "512", "--hidden", "64", "--layers", "2"]
        return draw_curves("cpu", tiny, options.out)
    began = time.perf_counter()
    import transformers
    import triton

    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}, transformers {transformers.__version__}")
    base = ["--hidden", "768", "--layers", "12", "--vocab", "251000", "--dtype", "bfloat16"]
    parts: dict[str, Callable[[], None]] = {
        "attention is right": lambda: check_attention("cuda", options.processes),
        "the head is right": lambda: check_head("cuda"),
        "the training step": lambda: time_steps("cuda", base),
        "300 steps": lambda: draw_curves("cuda", [*curves, "--dtype", "bfloat16"], options.out),
        "attention alone": lambda: time_attention("cuda"),
        "ways of starting kernels": lambda: sweep("cuda", began + ALL_SECONDS),
    }
    failed = []
    for title, part in parts.items():
        print(f"\n== {title} ({time.perf_counter() - began:.0f} s)", flush=True)
        try:
            part()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(title)
    print(f"\n{time.perf_counter() - began:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
