"""One run at a time for a stage directory: `flock` on a local disk, a leased object elsewhere.

The lock saves double work; correctness never rests on it, because a part's bytes depend on the fingerprint alone. A
lease is an object that its holder rewrites every few seconds. A waiting run takes over a lease whose content it has
seen unchanged for a whole lease time by its own monotonic clock, so clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.storage import Folder, StorageError

LEASE_SECONDS = 60.0
_POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(folder: Folder, name: str) -> Iterator[None]:
    """Hold the lock `name` in a folder; waits for another holder and says so once."""
    with _flock(folder, name) if folder.is_local else _lease(folder, name):
        yield


@contextlib.contextmanager
def _flock(folder: Folder, name: str) -> Iterator[None]:
    with _lock_file(Path(folder.path(f"{name}.lock"))) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            _log.warning(
                "%s: another run is working here (%s); waiting for it", name, file.read().decode() or "unknown"
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(_owner().encode())
        file.flush()
        yield


def _lock_file(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b")
    except OSError as error:
        raise StorageError(
            f"{path}: the lock could not be made ({error.strerror}); free some space or make the directory writable"
        ) from None


@contextlib.contextmanager
def _lease(folder: Folder, name: str) -> Iterator[None]:
    path, token = f"{name}.lease", secrets.token_hex(8)
    _acquire(folder, path, token)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(folder, path, token, stop), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        folder.remove(path)


def _acquire(folder: Folder, path: str, token: str) -> None:
    seen, since, warned = b"", time.monotonic(), False
    while not folder.create_exclusively(path, _beat(token)):
        with contextlib.suppress(FileNotFoundError):
            current = folder.read(path)
            if current != seen:
                seen, since = current, time.monotonic()
        if time.monotonic() - since > LEASE_SECONDS:
            _log.warning("%s: its holder stopped renewing it; taking over", path)
            folder.remove(path)
            continue
        if not warned:
            _log.warning("%s: another run is working here (%s); waiting for it", path, seen.decode())
            warned = True
        time.sleep(_POLL_SECONDS)


def _keep(folder: Folder, path: str, token: str, stop: threading.Event) -> None:
    while not stop.wait(LEASE_SECONDS / 6):
        with contextlib.suppress(OSError):  # a missed beat is harmless, the next one follows
            folder.write(path, _beat(token))


def _beat(token: str) -> bytes:
    return f"{_owner()} {token} {secrets.token_hex(4)}".encode()


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
