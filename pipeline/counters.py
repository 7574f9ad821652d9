"""What the steps of a Beam pipeline count: a step says `count`, whoever runs the step collects and reports.

Steps so need not know Beam. Outside a `collecting` block a count goes nowhere; inside, it is one dictionary update.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

_collector: ContextVar[Counter[str] | None] = ContextVar("_collector", default=None)


def count(name: str, number: int | Mapping[str, int]) -> None:
    """Add to a counter, or with a mapping to one counter for each key: dropped/too_short, dropped/too_long."""
    counts = _collector.get()
    if counts is None:
        return
    if isinstance(number, Mapping):
        counts.update({f"{name}/{key}": more for key, more in number.items()})
    else:
        counts[name] += number


@contextlib.contextmanager
def collecting() -> Iterator[Counter[str]]:
    """Gather what this thread counts inside the block."""
    counts: Counter[str] = Counter()
    token = _collector.set(counts)
    try:
        yield counts
    finally:
        _collector.reset(token)
