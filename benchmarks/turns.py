"""Times ways of doing the same work in turn, so that a noisy machine disturbs all alike, and prints their ratios."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import psutil


def compare(
    title: str,
    ours: str,
    ways: dict[str, Callable[[], object]],
    amount: float,
    unit: str = "MB",
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Run every way once a round; print amounts a second (median, spread) and how many times faster `ours` is."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, work in ways.items():
            began = clock()
            work()
            seconds[name].append(clock() - began)
            print(f"  round {turn + 1} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    print(f"\n{title} ({amount:,.1f} {unit}, {rounds} rounds, {platform.machine()}, {psutil.cpu_count()} cores)")
    for name, times in seconds.items():
        ratios = sorted(peer / own for peer, own in zip(times, seconds[ours], strict=True))
        spread = f"{min(times):.2f}-{max(times):.2f} s"
        line = f"{name:32} {amount / statistics.median(times):10,.2f} {unit}/s  {spread:16}"
        if name != ours:
            line += f" ours is {statistics.median(ratios):.2f}x as fast ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(line)
