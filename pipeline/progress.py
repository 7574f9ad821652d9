"""How far a running stage is, read from the part records it publishes: a table on a terminal, else a line now and then.

A look lists the records and reads those that are new; the next look waits for at least a hundred times as long as the
last one took, so that watching costs less than 1 % of a core whatever the number of parts. Since it reads nothing but
what is published, it works the same on any runner, and counts what earlier runs have done.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.manifest import Part
from pipeline.stage import RECORDS
from pipeline.storage import Folder

_log = logging.getLogger(__name__)

MB = 1_000_000
_LOOK_SECONDS = 1.0
_LINE_SECONDS = 30.0
_LOOK_SHARE = 0.01
_LONGEST_WAIT = 60.0
_ROWS = 15
_COMPRESSION = 4  # text is about so many times as large as its .xz, .gz or .zst; good enough for a time that is left


class Input(Protocol):
    """What has to be known of an input file."""

    @property
    def language(self) -> str: ...  # noqa: D102
    @property
    def compression(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Work:
    """Parts that a language will have and bytes of raw text in them; estimates where its files are compressed."""

    parts: int
    bytes: int


@dataclass
class Done:
    """Parts of a language that are published, and the documents they account for."""

    parts: int = 0
    documents_in: int = 0
    kept: int = 0
    dropped: int = 0
    rejected: int = 0

    def add(self, more: Done) -> None:
        """Add another's numbers to these."""
        for name, number in vars(more).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass(frozen=True)
class Pace:
    """Share of the bytes that is done, MB/s since the run began, and seconds left; 0 and None before the first part."""

    share: float
    mb_per_second: float
    seconds_left: float | None


def published(folder: Folder) -> int:
    """Number of parts of any kind that a stage's directory has records of."""
    return len(folder.files(RECORDS))


def expected(sources: Iterable[Input], chunk_bytes: int) -> dict[str, Work]:
    """The chunks and bytes that input files will come to, by language."""
    work: dict[str, Work] = defaultdict(lambda: Work(0, 0))
    for source in sources:
        size = source.size * (_COMPRESSION if source.compression else 1)
        before = work[source.language]
        work[source.language] = Work(before.parts + max(1, -(-size // chunk_bytes)), before.bytes + size)
    return dict(work)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: 41 s, 12.3 min, 7.2 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Tally:
    """The numbers of every language, brought up to date by `look`."""

    def __init__(self, folder: Folder, below: str, expected: Mapping[str, Work]) -> None:
        self.expected = expected
        self.done: dict[str, Done] = {language: Done() for language in expected}
        self._folder, self._below = folder, f"{RECORDS}/{below}/"
        self._seen: set[str] = set()
        self.look()
        self._bytes_before, self._started = self._bytes(), time.monotonic()

    def look(self) -> None:
        """Read the records that are new; one that goes while it is looked at is left out."""
        names = self._folder.files(self._below.rstrip("/"))
        fresh = [name for name in names if name.endswith(".json") and name not in self._seen]
        for name, data in self._folder.read_many(fresh).items():
            language = name.removeprefix(self._below).split("/")[0]
            self.done.setdefault(language, Done()).add(_counted(Part.from_json(data, name).stats))
            self._seen.add(name)

    def work(self, language: str) -> Work:
        """What a language will have come to, corrected where it has more parts than expected."""
        wanted = self.expected.get(language, Work(0, 0))
        return Work(max(wanted.parts, self.done[language].parts), wanted.bytes)

    def total(self, languages: Iterable[str] | None = None) -> tuple[Done, int]:
        """The numbers of some languages, or of all, together, and the parts they will have."""
        chosen = list(self.done if languages is None else languages)
        sums = Done()
        for language in chosen:
            sums.add(self.done[language])
        return sums, sum(self.work(language).parts for language in chosen)

    def pace(self) -> Pace:
        """How fast the bytes of the input become chunks."""
        everything, now = sum(work.bytes for work in self.expected.values()), self._bytes()
        rate = (now - self._bytes_before) / max(1e-9, time.monotonic() - self._started)
        return Pace(now / max(1, everything), rate / MB, (everything - now) / rate if rate else None)

    def shown(self) -> tuple[list[str], list[str]]:
        """The languages to list, those at work before others and the large before the small; and the rest of them."""
        by_size = sorted(self.done, key=lambda language: (-self.work(language).bytes, language))
        at_work = [language for language in by_size if 0 < self.done[language].parts < self.work(language).parts]
        chosen = set([*at_work, *(language for language in by_size if language not in at_work)][:_ROWS])
        return [x for x in by_size if x in chosen], [x for x in by_size if x not in chosen]

    def _bytes(self) -> float:
        return sum(
            work.bytes * self.done[language].parts / max(1, self.work(language).parts)
            for language, work in self.expected.items()
        )


def _counted(stats: Mapping[str, Any]) -> Done:
    return Done(
        parts=1,
        documents_in=stats.get("documents_in", 0),
        kept=stats.get("kept", 0),
        dropped=sum(stats.get("dropped", {}).values()),
        rejected=sum(stats.get("rejected", {}).values()),
    )


@contextlib.contextmanager
def live(label: str, folder: Folder, below: str, expected: Mapping[str, Work]) -> Iterator[None]:
    """Show during the block how a stage gets on; nothing where messages of level INFO are off.

    Args:
        label: the stage, for the title.
        folder: the stage's directory.
        below: directory of the parts inside it; the next step of a part's path is its language.
        expected: what each language will come to.
    """
    if not _log.isEnabledFor(logging.INFO):
        yield
        return
    stopped = threading.Event()
    show = _table if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(label, folder, below, expected, stopped), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _looks(tally: Tally, stopped: threading.Event) -> Iterator[None]:
    """Look again and again, the last time when the work has stopped."""
    while not stopped.is_set():
        began = time.monotonic()
        with contextlib.suppress(OSError):  # the stage itself will say what is wrong with its store
            tally.look()
        yield
        wait = (time.monotonic() - began) / _LOOK_SHARE
        stopped.wait(min(max(_LOOK_SECONDS, wait), _LONGEST_WAIT))
    tally.look()
    yield


def _lines(label: str, folder: Folder, below: str, expected: Mapping[str, Work], stopped: threading.Event) -> None:
    tally, last = Tally(folder, below, expected), time.monotonic()
    for _ in _looks(tally, stopped):
        if time.monotonic() - last >= _LINE_SECONDS:
            done, parts = tally.total()
            _log.info(
                f"{label}: {done.parts:,} of about {parts:,} parts, {done.documents_in:,} documents in, {done.kept:,} "
                f"kept, {done.dropped:,} dropped, {done.rejected:,} rejected; {_speed(tally.pace())}"
            )
            last = time.monotonic()


def _table(label: str, folder: Folder, below: str, expected: Mapping[str, Work], stopped: threading.Event) -> None:
    from rich.console import Console
    from rich.live import Live

    tally = Tally(folder, below, expected)
    with Live(console=Console(stderr=True), auto_refresh=False) as display:
        for _ in _looks(tally, stopped):
            display.update(_rendered(label, tally), refresh=True)


def _rendered(label: str, tally: Tally) -> Any:
    from rich.table import Table

    table = Table(title=label, caption=_speed(tally.pace()))
    table.add_column("language")
    for name in ("parts", "of about", "documents in", "kept", "dropped", "rejected"):
        table.add_column(name, justify="right")
    shown, others = tally.shown()
    for language in shown:
        table.add_row(language, *_cells(tally.done[language], tally.work(language).parts))
    if others:
        table.add_row(f"{len(others)} others", *_cells(*tally.total(others)))
    table.add_section()
    table.add_row("all", *_cells(*tally.total()))
    return table


def _cells(done: Done, parts: int) -> list[str]:
    return [f"{number:,}" for number in (done.parts, parts, done.documents_in, done.kept, done.dropped, done.rejected)]


def _speed(pace: Pace) -> str:
    left = "" if pace.seconds_left is None else f", about {duration(pace.seconds_left)} left"
    return f"{pace.share:.0%} of the input, {pace.mb_per_second:.1f} MB/s{left}"
