"""Live progress: a table on a terminal, a line now and then elsewhere, and right numbers in both."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import progress
from pipeline.chunks import Source
from pipeline.progress import Tally, Work, expected, live, published
from pipeline.sources import format_of
from pipeline.stage import RECORDS, PartStore
from pipeline.storage import Folder

CHUNKS = "_work/chunks-8"
PROGRAM = """
import logging, sys, time
from pathlib import Path
from test_progress import CHUNKS, publish
from pipeline.progress import Work, live
from pipeline.storage import Folder

logging.basicConfig(stream=sys.stderr, format="%(message)s")
logging.getLogger("pipeline").setLevel(sys.argv[2])
folder = Folder(sys.argv[1])
with live("corpus", folder, CHUNKS, {"sw": Work(3, 3000), "en": Work(2, 2000)}):
    for number in range(2):
        publish(folder, "sw", number)
        time.sleep(1.2)
"""


def publish(folder: Folder, language: str, number: int) -> str:
    """Publish a chunk of 1,005 documents; returns the name of its record."""
    path = f"{CHUNKS}/{language}/{language}.txt/{number:05d}.arrow"
    with PartStore(folder).publish(path) as draft:
        draft.sink.write(b"text")
        draft.stats.update(documents_in=1005, kept=1000, dropped={"too_short": 1, "code": 2}, rejected={"encoding": 2})
    return f"{RECORDS}/{path}.json"


def run_in_terminal(folder: Path, level: str) -> tuple[str, str]:
    """What the program shows on a terminal as standard error, and what on standard output."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", PROGRAM, str(folder), level]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end of a terminal is closed
        while block := os.read(ours, 4096):
            shown += block
    os.close(ours)
    output, _ = process.communicate()
    assert process.returncode == 0, shown.decode()
    return shown.decode(), output


def test_a_terminal_shows_a_table_that_is_brought_up_to_date(tmp_path: Path) -> None:
    shown, output = run_in_terminal(tmp_path, "INFO")
    rows = re.findall(r"sw\s+│\s+(\d)\s+│\s+3\s+│\s+([\d,]+)\s+│\s+([\d,]+)\s+│\s+(\d+)\s+│\s+(\d+)", shown)
    assert rows[-1] == ("2", "2,010", "2,000", "6", "4")
    assert len({row[0] for row in rows}) > 1
    assert "40% of the input" in shown and "MB/s, about" in shown
    assert output == ""


def test_nothing_is_shown_where_messages_are_off(tmp_path: Path) -> None:
    assert run_in_terminal(tmp_path, "WARNING") == ("", "")


def test_nothing_of_the_table_goes_to_what_is_no_terminal(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "INFO"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_log_gets_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.1)
    folder = Folder(str(tmp_path))
    publish(folder, "sw", 0)
    with caplog.at_level(logging.INFO, "pipeline"), live("corpus", folder, CHUNKS, {"sw": Work(4, 4000)}):
        time.sleep(0.5)
    assert caplog.messages[-1].startswith(
        "corpus: 1 of about 4 parts, 1,005 documents in, 1,000 kept, 3 dropped, 2 rejected; 25% of the input"
    )


def test_a_record_is_read_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    record = publish(folder, "sw", 0)
    tally = Tally(folder, CHUNKS, {"sw": Work(2, 2000)})
    (tmp_path / record).write_text("unreadable")
    publish(folder, "sw", 1)
    tally.look()
    assert tally.done["sw"].documents_in == 2010


def test_parts_of_other_kinds_and_sizes_are_not_counted(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    publish(folder, "sw", 0)
    PartStore(folder).publish_bytes("_work/chunks-16/sw/sw.txt/00000.arrow", b"")
    PartStore(folder).publish_bytes("_work/raw-8/sw/sw.txt/00000.arrow", b"")
    assert Tally(folder, CHUNKS, {}).total()[0].parts == 1
    assert published(folder) == 3


def test_the_pace_is_that_of_this_run(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for number in range(8):
        publish(folder, "sw", number)
    tally = Tally(folder, CHUNKS, {"sw": Work(10, 10_000_000)})
    assert tally.pace().share == 0.8 and tally.pace().mb_per_second == 0 and tally.pace().seconds_left is None
    publish(folder, "sw", 8)
    time.sleep(0.1)
    tally.look()
    pace = tally.pace()
    assert 0 < pace.mb_per_second <= 10
    assert pace.seconds_left == pytest.approx(1 / pace.mb_per_second, rel=0.05)


def test_what_is_expected_follows_from_the_files() -> None:
    sources = [
        Source("en.txt", "en", format_of("en.txt"), "en.txt", 1001),
        Source("en.b.txt", "en", format_of("en.b.txt"), "en.b.txt", 0),
        Source("sw.txt.xz", "sw", format_of("sw.txt.xz"), "sw.txt.xz", 1000),
    ]
    assert expected(sources, 500) == {"en": Work(3 + 1, 1001), "sw": Work(8, 4000)}


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**9), max_size=40), st.data())
def test_every_language_is_shown_or_summed_up(sizes: dict[str, int], data: st.DataObject) -> None:
    tally = Tally(Folder("memory://progress"), CHUNKS, {language: Work(2, size) for language, size in sizes.items()})
    at_work = data.draw(st.sets(st.sampled_from(sorted(sizes)), max_size=15)) if sizes else set()
    for language in at_work:
        tally.done[language].parts = 1
    shown, others = tally.shown()
    assert sorted([*shown, *others]) == sorted(sizes)
    assert at_work <= set(shown) and len(shown) == min(15, len(sizes))
    assert tally.total(shown)[1] + tally.total(others)[1] == tally.total()[1] == 2 * len(sizes)
