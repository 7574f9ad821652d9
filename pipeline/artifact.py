"""Reading what another stage has committed: its parts by name, each as it was when its digest was taken.

`fetch` checks a part before anybody reads it. Training, which reads from many large ones at once, opens what `locate`
finds and lets `verify` check it meanwhile. Parts of a remote stage come through a cache on this machine's disk.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.manifest import Manifest, Part
from pipeline.storage import BLOCK_BYTES, Folder, Receipt, redact


@dataclass(frozen=True)
class Artifact:
    """A committed stage seen by a reader."""

    folder: Folder
    manifest: Manifest

    def select(self, prefix: str = "", suffix: str = "") -> list[Part]:
        """The parts whose path starts and ends so, in path order."""
        parts = self.manifest.parts
        return [parts[path] for path in sorted(parts) if path.startswith(prefix) and path.endswith(suffix)]

    def fetch(self, path: str) -> str:
        """Local path of a part whose digest has been checked."""
        if path not in self.manifest.parts:
            raise PipelineError(f"{redact(self.folder.url)}: the manifest lists no {path}")
        return fetch(self.folder, self.manifest.parts[path])


@lru_cache(maxsize=4096)
def fetch(folder: Folder, part: Part) -> str:
    """Local path of a part after checking its size and sha256 (once a process); remote parts come through a cache.

    Raises:
        PipelineError: the file is missing or its bytes are not the ones that were committed.
    """
    local = locate(folder, part)
    verify(folder, part)
    return local


def locate(folder: Folder, part: Part) -> str:
    """The first half of `fetch`: local path of a part whose bytes `verify` has still to check.

    Raises:
        PipelineError: the file is missing.
    """
    place, name = _place(folder, part)
    if not place.exists(name):
        if folder.is_local:
            raise _missing(folder, part)
        _download(folder, part)
    return place.path(name)


def verify(folder: Folder, part: Part) -> None:
    """The second half of `fetch`: check size and sha256 of a part that is on this machine.

    Raises:
        PipelineError: as `fetch`.
    """
    place, name = _place(folder, part)
    try:
        found = place.digest(name)
    except FileNotFoundError:
        raise _missing(folder, part) from None
    if found.sha256 != part.sha256 and not folder.is_local:
        place.remove(name)
    _check(folder, part, found)


def read(folder: Folder, part: Part) -> bytes:
    """The bytes of a part that fits into memory and is read but once, after checking them; nothing is cached.

    Raises:
        PipelineError: as `fetch`.
    """
    try:
        data = folder.read(part.path)
    except FileNotFoundError:
        raise _missing(folder, part) from None
    _check(folder, part, Receipt(len(data), hashlib.sha256(data).hexdigest()))
    return data


def _missing(folder: Folder, part: Part) -> PipelineError:
    return PipelineError(
        f"{redact(folder.url)}/{part.path}: the file is missing; delete its stage's directory and run it again"
    )


def _check(folder: Folder, part: Part, found: Receipt) -> None:
    if found != Receipt(part.bytes, part.sha256):
        raise PipelineError(
            f"{redact(folder.url)}/{part.path}: its bytes are not the ones that were committed (sha256 "
            f"{found.sha256[:12]}, expected {part.sha256[:12]}); delete its stage's directory and run it again"
        )


def _place(folder: Folder, part: Part) -> tuple[Folder, str]:
    """Where a part's bytes are read on this machine: in the stage's own directory, or in the cache of remote ones."""
    if folder.is_local:
        return folder, part.path
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Folder(f"{base}/mdeberta"), f"{part.sha256}-{Path(part.path).name}"


def _download(folder: Folder, part: Part) -> None:
    cache, name = _place(folder, part)
    try:
        with cache.publish(name) as sink, folder.open(part.path) as source:
            while block := source.read(BLOCK_BYTES):
                sink.write(block)
    except FileNotFoundError:
        raise _missing(folder, part) from None
