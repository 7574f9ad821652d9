"""What several test files share: running the command, killing it, and comparing directories byte by byte."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MDEBERTA = str(Path(sys.executable).with_name("mdeberta"))
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def mdeberta(*arguments: str, cwd: Path | None = None, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command to its end and check its exit code."""
    done = subprocess.run([MDEBERTA, *arguments], capture_output=True, text=True, cwd=cwd, timeout=600)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        [MDEBERTA, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def kill_group_after(seconds: float, *arguments: str) -> bool:
    """Start the command, `kill -9` its whole process group after a while; returns whether it still ran."""
    process = start(*arguments)
    time.sleep(seconds)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def kill_at_work(kills: int, seconds: float, dice: random.Random, output: Path, *arguments: str) -> float:
    """Start a command and kill it at a random moment, until that has hit it at work so many times.

    A command that was done before the kill begins anew, its output removed, and is struck earlier from then on.

    Returns:
        The estimate of how long the command takes, adapted.
    """
    while kills:
        if kill_group_after(dice.uniform(0.2, 1.0) * seconds, *arguments):
            kills -= 1
        else:
            shutil.rmtree(output)
            seconds *= 0.9
    return seconds


def tree(root: Path) -> dict[str, str]:
    """Every file below a directory with its sha256, but for logs and locks."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    names = {str(path.relative_to(root)): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not name.startswith(("logs/", ".locks/"))
    }


def flip_bit(path: Path, position: int | None = None) -> None:
    """Change one bit in the middle (or at a position) of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(bytes(data))


def write_corpus(folder: Path, texts: dict[str, list[str]]) -> Path:
    """Write CC100-style plain files, one a language, from lists of documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, documents in texts.items():
        (folder / f"{language}.txt").write_text("".join(f"{text}\n\n" for text in documents), encoding="utf-8")
    return folder
