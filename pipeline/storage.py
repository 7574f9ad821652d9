"""The only place that touches files: any fsspec URL, atomic publishing with a digest, verified reading, redaction.

Publishing writes a temporary file, then makes it appear under its name in one step: locally by fsync and rename inside
the same directory, on an object store by one PUT of the finished file. A reader therefore sees a whole file or none,
and a killed run leaves at most a temporary file that `sweep` removes. Each point where that can fail is a function:
`create`, `Sink.write`, `sync_file`, then `replace` and `sync_folder`, or `upload`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import PipelineError, UserError

BLOCK_BYTES = 1 << 20
_DIGEST_BYTES = 1 << 16  # a block that the allocator has at hand: of thousands of small files a larger one is the cost
TEMPORARY = ".tmp."
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")

_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def _may_pass(error: BaseException) -> bool:
    """Whether an error is worth another try: time-outs and refusals of a store are, a missing file is not."""
    return isinstance(error, OSError) and not isinstance(error, _FINAL)


_retry = tenacity.retry(
    retry=tenacity.retry_if_exception(_may_pass),
    stop=tenacity.stop_after_attempt(6),
    wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=10.0),
    reraise=True,
)


class StorageError(PipelineError, OSError):
    """A file could not be written or removed. An OSError too, so that whoever can do without the file may go on."""


@contextlib.contextmanager
def _explained(url: str, failed: str) -> Iterator[None]:
    """Turn an error of the operating system or the store into a sentence that names the file and the way out."""
    try:
        yield
    except PipelineError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        culprit = f": {error.filename}" if error.filename and TEMPORARY not in str(error.filename) else ""
        raise StorageError(
            f"{redact(url)}: could not be {failed} ({reason}{culprit}); free some space or repair what failed, then "
            "run the same command again"
        ) from error


@dataclass(frozen=True)
class Receipt:
    """What was published: size in bytes and sha256 in hex."""

    bytes: int
    sha256: str


class Sink:
    """A binary file that counts and digests what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        """Append a bytes-like object."""
        view = memoryview(data).cast("B")
        self._sha256.update(view)
        self._file.write(view)
        self._bytes += view.nbytes
        return view.nbytes

    @property
    def receipt(self) -> Receipt:
        """Size and digest of everything written so far."""
        return Receipt(self._bytes, self._sha256.hexdigest())

    # pyarrow and safetensors treat a sink as a file object and ask these of it.
    closed = False

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Do nothing: whoever opened the sink closes the file under it."""

    def writable(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True)
class Folder:
    """A directory on any fsspec file system. Cheap to copy and to pickle; never shows its options.

    Args:
        url: local path or URL.
        options: fsspec options by protocol (`{"s3": {"endpoint_url": ...}}`), which may hold credentials.
    """

    url: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.url.rstrip('/')}/{name}", self.options)

    @property
    def fs(self) -> Any:
        """The fsspec file system of this folder (fsspec caches the instance)."""
        return filesystem(self.url, self.options)

    @property
    def is_local(self) -> bool:
        """Whether the folder is a directory of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The file system's own path of a name inside the folder."""
        base = cast(str, self.fs._strip_protocol(self.url)).rstrip("/")
        return f"{base}/{name}" if name else base

    def exists(self, name: str = "") -> bool:
        """Whether a file or directory of this name is there."""
        self.fs.invalidate_cache(self.path(name))  # another process may have made it since the last listing
        return bool(_retry(self.fs.exists)(self.path(name)))

    def files(self, below: str = "") -> dict[str, int]:
        """Every file inside a subdirectory: path relative to this folder to size in bytes, sorted by path."""
        skip = len(self.path()) + 1
        if self.is_local:
            with _explained((self / below).url, "listed"):
                return {path[skip:]: size for path, size in sorted(_walk(self.path(below)))}
        self.fs.invalidate_cache()
        try:
            found = _retry(self.fs.find)(self.path(below), detail=True)
        except FileNotFoundError:
            return {}
        return {path[skip:]: info["size"] for path, info in sorted(found.items())}

    def folders(self) -> list[str]:
        """Names of the directories directly inside, sorted."""
        self.fs.invalidate_cache()
        try:
            entries = _retry(self.fs.ls)(self.path(), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading, without any check of its content."""
        return cast(BinaryIO, _retry(self.fs.open)(self.path(name), "rb"))

    def read(self, name: str) -> bytes:
        """The whole content of a small file."""
        return cast(bytes, _retry(self.fs.cat_file)(self.path(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file."""
        return cast(bytes, _retry(self.fs.cat_file)(self.path(name), start=start, end=stop))

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """The contents of many small files that are still there, fetched concurrently where the store can."""
        if not self.is_local:
            paths = {self.path(name): name for name in names}
            found = _retry(self.fs.cat)(list(paths), on_error="omit") if names else {}
            return {paths[path]: data for path, data in found.items()}
        contents: dict[str, bytes] = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                contents[name] = Path(self.path(name)).read_bytes()
        return contents

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        self.fs.invalidate_cache(self.path(name))
        return int(_retry(self.fs.size)(self.path(name)))

    def digest(self, name: str) -> Receipt:
        """Read a whole file and return its size and sha256."""
        sha256, total = hashlib.sha256(), 0
        with self.open(name) as file:
            while block := file.read(_DIGEST_BYTES):
                sha256.update(block)
                total += len(block)
        return Receipt(total, sha256.hexdigest())

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Sink]:
        """Write a file that appears under its name, whole and durable, only when the block ends without an error.

        Raises:
            StorageError: it could not be written; what stood under the name before stands there still.
        """
        with self.publish_file(name) as temporary, open(temporary, "wb") as file:
            yield Sink(file)

    @contextlib.contextmanager
    def publish_file(self, name: str) -> Iterator[str]:
        """Like `publish` for libraries that want a local path to write to: yields that temporary path."""
        check_relative(name)
        with _explained((self / name).url, "written"):
            temporary = self._temporary(name)
            try:
                mode = create(temporary)
                yield temporary
                os.chmod(temporary, mode)  # some libraries leave a file that only its owner can read
                sync_file(temporary)
                if self.is_local:
                    replace(temporary, self.path(name))
                    sync_folder(os.path.dirname(temporary))
                else:
                    _retry(upload)(self.fs, temporary, self.path(name))
            finally:
                Path(temporary).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> Receipt:
        """Publish bytes under a name."""
        with self.publish(name) as sink:
            sink.write(data)
        return sink.receipt

    def create_exclusively(self, name: str, data: bytes) -> bool:
        """Create a small file, not an empty one, unless it exists; returns whether this call created it."""
        if not data:
            raise ValueError(f"{name}: some stores create empty files unconditionally")
        if self.is_local:
            Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
        try:
            _retry(self._create)(name, data)
        except FileExistsError:
            return False
        return True

    def _create(self, name: str, data: bytes) -> None:
        with self.fs.open(self.path(name), "xb") as file:
            file.write(data)

    def remove(self, *names: str) -> None:
        """Delete files or directory trees; a name that is gone already is fine."""
        for name in names:
            with _explained((self / name).url, "removed"), contextlib.suppress(FileNotFoundError):
                _retry(self.fs.rm)(self.path(name), recursive=True)
        self.fs.invalidate_cache()

    def sweep(self) -> list[str]:
        """Remove temporary files that killed runs left behind; returns their names."""
        stale = [name for name in self.files() if TEMPORARY in name] if self.exists() else []
        self.remove(*stale)
        return stale

    def _temporary(self, name: str) -> str:
        if not self.is_local:
            handle, path = tempfile.mkstemp(prefix="mdeberta-")
            os.close(handle)
            return path
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        return str(target.parent / f".{target.name}{TEMPORARY}{os.getpid()}.{secrets.token_hex(4)}")


def _walk(path: str) -> Iterator[tuple[str, int]]:
    """Every file inside a local directory and its size; one that goes while it is looked for is left out."""
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.path, entry.stat().st_size


def create(path: str) -> int:
    """Make an empty file; returns its mode."""
    Path(path).touch()
    return os.stat(path).st_mode


def sync_file(path: str) -> None:
    """Force a file's bytes to the disk."""
    _sync(path)


def replace(temporary: str, target: str) -> None:
    """Give a file its final name inside the same directory, in place of what had that name before."""
    os.replace(temporary, target)


def sync_folder(path: str) -> None:
    """Force a directory's entries to the disk, so that a new name survives a power cut."""
    _sync(path)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def upload(fs: Any, temporary: str, target: str) -> None:
    """Put a finished file into an object store, where it appears whole."""
    fs.put_file(temporary, target)


def filesystem(url: str, options: dict[str, dict[str, Any]]) -> Any:
    """The fsspec file system of a URL with the options configured for its protocol.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """
    protocol = fsspec.utils.get_protocol(url)
    try:
        return fsspec.filesystem(protocol, **options.get(protocol, {}))
    except (ValueError, ImportError) as error:
        raise UserError(f"{redact(url)}: cannot use protocol {protocol!r}: {error}") from None


def glob(pattern: str, options: dict[str, dict[str, Any]]) -> list[str]:
    """The URLs that match a glob, sorted; a pattern without wildcards is looked up as it is. Always looks anew."""
    fs = filesystem(pattern, options)
    fs.invalidate_cache()
    protocol = fsspec.utils.get_protocol(pattern)
    found = sorted(str(path) for path in _retry(fs.glob)(fs._strip_protocol(pattern)))
    return found if isinstance(fs, LocalFileSystem) else [f"{protocol}://{path.lstrip('/')}" for path in found]


def open_url(url: str, options: dict[str, dict[str, Any]]) -> BinaryIO:
    """Open a file that lies outside the work directory for reading."""
    return cast(BinaryIO, _retry(filesystem(url, options).open)(url, "rb"))


def redact(url: str) -> str:
    """A URL without user name, password and query, fit for messages and logs."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).split("?", 1)[0]


def check_relative(name: str) -> None:
    """Refuse a name that could leave its folder (`..`, absolute, control characters) or hide in it.

    Raises:
        PipelineError: naming the part that is not allowed.
    """
    for step in name.split("/"):
        if not _SAFE_NAME.fullmatch(step):
            raise PipelineError(
                f"{name!r} is not a safe file name: {step!r} may hold letters, digits and _ . + = - only"
            )
