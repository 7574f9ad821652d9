"""The stage contract: a stage is a pure function from its fingerprint to a set of parts, killed and resumed at will.

1. A stage's directory is `<work_dir>/<stage>/<fingerprint>`; `STAGE.json` says what the fingerprint was made of.
2. Its work is a list of parts whose names and bytes depend on the fingerprint alone.
3. A part is published atomically, then its record (path, size, digest, rows, counts) under `_parts/`. Small files that
   come with a part, its companions, are written before it and have no record. Parts under `_work/` are intermediate:
   they make a resumed run cheaper and are gone after the commit.
4. `MANIFEST.json` is written last: it is the commit. With it the stage is a no-op, without it the missing parts are
   made.
5. Readers open an upstream file only through its manifest (`pipeline.artifact`), which says what its bytes have to be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import lock
from pipeline.artifact import Artifact
from pipeline.config import Config, fingerprint_slice
from pipeline.errors import PipelineError, UserError
from pipeline.manifest import IDENTITY_FILE, MANIFEST_FILE, Identity, InputIdentity, Manifest, Part, canonical
from pipeline.stages import STAGES, StageSpec
from pipeline.storage import BLOCK_BYTES, Folder, Receipt, Sink, filesystem, glob, open_url, redact

RECORDS = "_parts"
WORK = "_work"
BEGUN = "_begun.json"
_WEIGHTS = (".safetensors", ".bin")
_hashes: dict[tuple[str, str], str] = {}
"""Of input files, by URL and all that the store says of the file: every stage asks for them, and each commit again."""


@dataclass
class Draft:
    """What is told of a part while it is being written: its rows and stats, recorded when its block ends."""

    rows: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SinkDraft(Draft):
    """A part being written to a sink."""

    sink: Sink


@dataclass(kw_only=True)
class FileDraft(Draft):
    """A part being written to a local file, whose path is a temporary one."""

    path: str


@dataclass(frozen=True)
class PartStore:
    """Publishes parts into a stage's directory and knows which exist. Small and picklable: workers carry it."""

    folder: Folder

    @contextlib.contextmanager
    def publish(self, path: str) -> Iterator[SinkDraft]:
        """Publish one part, written to the draft's sink: the file first, its record second."""
        with self.folder.publish(path) as sink:
            draft = SinkDraft(sink=sink)
            yield draft
        self._record(path, sink.receipt, draft)

    @contextlib.contextmanager
    def publish_file(self, path: str) -> Iterator[FileDraft]:
        """Like `publish`, for libraries that write to a local path."""
        with self.folder.publish_file(path) as temporary:
            draft = FileDraft(path=temporary)
            yield draft
            receipt = Folder(str(Path(temporary).parent)).digest(Path(temporary).name)
        self._record(path, receipt, draft)

    def publish_bytes(self, path: str, data: bytes, rows: int = 0) -> None:
        """Publish a small part that is already in memory."""
        with self.publish(path) as draft:
            draft.sink.write(data)
            draft.rows = rows

    def get(self, path: str) -> Part | None:
        """One part, if it is published whole."""
        record = f"{RECORDS}/{path}.json"
        if not (self.folder.exists(record) and self.folder.exists(path)):
            return None
        try:
            part = Part.from_json(self.folder.read(record), record)
            return part if self.folder.size(path) == part.bytes else None
        except FileNotFoundError:  # forgotten by another worker since
            return None

    def done(self, below: str = "") -> dict[str, Part]:
        """The parts inside a directory that are published whole (record there, file of the recorded size), by path.

        Work parts are among them only where `below` is a directory of theirs.
        """
        there = self.folder.files(f"{RECORDS}/{below}".rstrip("/"))
        records = [
            name for name in there if name.endswith(".json") and (below or not name.startswith(f"{RECORDS}/{WORK}/"))
        ]
        sizes = self.folder.files(below)
        parts = [Part.from_json(data, name) for name, data in self.folder.read_many(records).items()]
        return {part.path: part for part in parts if sizes.get(part.path) == part.bytes}

    def forget(self, *paths: str) -> None:
        """Remove parts together with their records; records go first, so a kill in between leaves no false record."""
        self.folder.remove(*(f"{RECORDS}/{path}.json" for path in paths))
        self.folder.remove(*paths)

    def _record(self, path: str, receipt: Receipt, draft: Draft) -> None:
        part = Part(path, receipt.bytes, receipt.sha256, draft.rows, draft.stats)
        self.folder.write(f"{RECORDS}/{path}.json", part.to_json())


@dataclass(frozen=True)
class StageRun:
    """One execution of a stage: what its code gets to work with."""

    spec: StageSpec
    config: Config
    identity: Identity
    folder: Folder
    upstream: dict[str, Artifact]
    source: tuple[str, ...] = ()
    runner_args: tuple[str, ...] = ()
    committed: bool = False

    @property
    def parts(self) -> PartStore:
        """The stage's parts."""
        return PartStore(self.folder)

    @property
    def label(self) -> str:
        """Stage and fingerprint, for messages."""
        return f"{self.spec.name} {self.identity.fingerprint}"

    def commit(
        self, stats: dict[str, Any], *, keep_work: bool = False, companions: Mapping[str, bytes] | None = None
    ) -> Manifest:
        """Write the manifest over every published part, then remove what the stage only made on the way.

        Args:
            stats: the stage's totals.
            keep_work: whether work parts stay.
            companions: small files that come with parts and have no records, with their bytes.

        Raises:
            PipelineError: an input file changed while the stage read it.
        """
        if identify(self.spec, self.config, self.identity.upstream) != self.identity:
            raise PipelineError(f"{self.label}: an input file changed during the run; run it again on files that stay")
        parts, sizes = self.parts.done(), self.folder.files()
        for path, data in (companions or {}).items():
            if sizes.get(path) != len(data):  # somebody removed it since
                self.folder.write(path, data)
            parts[path] = Part(path, len(data), hashlib.sha256(data).hexdigest())
        manifest = Manifest(self.identity, upstream_digests(self.upstream), parts, stats)
        self.folder.write(MANIFEST_FILE, manifest.to_json())
        tidy(self.folder, keep_work)
        return manifest


def upstream_digests(upstream: dict[str, Artifact]) -> dict[str, str]:
    """The manifest digest of every stage that is read."""
    return {name: artifact.manifest.digest for name, artifact in upstream.items()}


def tidy(folder: Folder, keep_work: bool = False) -> None:
    """Bring a committed directory to its final state: work parts go, then all part records."""
    if folder.exists(BEGUN):
        folder.remove(*(() if keep_work else (WORK,)), RECORDS, BEGUN)


def identify(spec: StageSpec, config: Config, upstream: dict[str, str]) -> Identity:
    """The stage's identity under this config; `upstream` holds the fingerprints of the stages it reads.

    Raises:
        UserError: a glob of the stage's inputs is empty or matches no file.
    """
    inputs = {
        key: [input_identity(url, config) for url in input_files(key, globs, config)]
        for key, globs in spec.inputs(config).items()
    }
    return Identity(
        stage=spec.name,
        version=spec.version,
        config=fingerprint_slice(spec.section(config)),
        toolchain={name: _tool_version(name, depth) for name, depth in spec.toolchain.items()},
        inputs={key: sorted(found, key=lambda i: (i.name, i.sample_sha256)) for key, found in inputs.items()},
        upstream={name: upstream[name] for name in spec.upstream},
    )


def input_files(key: str, globs: tuple[str, ...], config: Config) -> list[str]:
    """The URLs that the globs of one config key match, each once, sorted."""
    if not globs:
        raise UserError(f"{key} is empty: name the input files, for example --set '{key}=[data/*.txt.xz]'")
    urls: set[str] = set()
    for pattern in globs:
        found = glob(pattern, config.storage_options)
        if not found:
            raise UserError(f"{key}: nothing matches {redact(pattern)!r}; check the path or the pattern")
        urls.update(found)
    return sorted(urls)


def input_identity(url: str, config: Config) -> InputIdentity:
    """Name, size and sampled hash of an external file; reads at most 3 MiB of it, of weights all.

    A process reads a file again only if the store says that it has changed: a local one its size, inode or times,
    others their ETag or what they have of that kind.
    """
    fs = filesystem(url, config.storage_options)
    try:
        info = fs.info(url)
        size, version = int(info["size"]), (url, str(info))
        if version not in _hashes:
            _hashes[version] = _hash_blocks(url, config, _sampled(url, size))
    except (OSError, TypeError) as error:
        raise UserError(
            f"{redact(url)}: cannot be read ({error}); fix it or its permissions, or leave it out"
        ) from None
    name = url.rsplit("/", 1)[-1]
    if not name.isprintable():  # undecodable bytes arrive as lone surrogates, which are not printable either
        raise UserError(f"{redact(url)!r}: the file's name holds unprintable or undecodable characters; rename it")
    return InputIdentity(name, size, _hashes[version])


def _sampled(url: str, size: int) -> Iterable[int]:
    """Where the blocks begin that stand for a file."""
    if url.endswith(_WEIGHTS):
        return range(0, max(1, size), BLOCK_BYTES)
    return sorted({0, max(0, size // 2 - BLOCK_BYTES // 2), max(0, size - BLOCK_BYTES)})


def _hash_blocks(url: str, config: Config, starts: Iterable[int]) -> str:
    """One sha256 over a MiB from each of these places."""
    sha256 = hashlib.sha256()
    with open_url(url, config.storage_options) as file:
        for start in starts:
            file.seek(start)
            sha256.update(file.read(BLOCK_BYTES))
    return sha256.hexdigest()


@lru_cache
def _tool_version(name: str, depth: int) -> str:
    if name == "unicode":
        version = unicodedata.unidata_version
    else:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"
    return ".".join(version.split("+")[0].split(".")[:depth])


def stage_folder(config: Config, identity: Identity) -> Folder:
    """Where a stage of this identity lives."""
    return Folder(config.work_dir, config.storage_options) / identity.stage / identity.fingerprint


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a stage's directory, or None where the stage is not committed."""
    if not folder.exists(MANIFEST_FILE):
        return None
    return Manifest.from_json(folder.read(MANIFEST_FILE), f"{redact(folder.url)}/{MANIFEST_FILE}")


def identities(config: Config, last: str) -> dict[str, Identity]:
    """The identities of a stage and everything upstream of it, in stage order."""
    needed = _upstream_closure(last)
    found: dict[str, Identity] = {}
    for name, spec in STAGES.items():
        if name in needed:
            found[name] = identify(spec, config, {up: found[up].fingerprint for up in spec.upstream})
    return found


def _upstream_closure(name: str) -> set[str]:
    return {name}.union(*(_upstream_closure(up) for up in STAGES[name].upstream))


def open_artifact(config: Config, identity: Identity, wanted_by: str) -> Artifact:
    """The committed output of a stage.

    Raises:
        UserError: it is not committed yet; the sentence says how to make it.
    """
    folder = stage_folder(config, identity)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{wanted_by} needs {identity.stage} {identity.fingerprint}, which is not there yet; "
            f"run `mdeberta run {identity.stage}` with the same config first"
        )
    return Artifact(folder, manifest)


@contextlib.contextmanager
def open_run(
    spec: StageSpec,
    config: Config,
    *,
    locked: bool = True,
    source: tuple[str, ...] = (),
    runner_args: tuple[str, ...] = (),
) -> Iterator[StageRun]:
    """Take a stage's lock and prepare its directory; `committed` of the run says that nothing is left to do.

    Args:
        locked: whether to take the lock (a training process whose launcher holds it does not).
        source: the `-c` and `--set` arguments, for stages that start processes of their own.
        runner_args: Beam pipeline options, passed through unchanged.

    Raises:
        UserError: an upstream stage is missing.
        PipelineError: a half-done directory was made from other upstream bytes.
    """
    found = identities(config, spec.name)
    identity = found[spec.name]
    folder = stage_folder(config, identity)
    upstream = {name: open_artifact(config, found[name], spec.name) for name in spec.upstream}
    run = StageRun(spec, config, identity, folder, upstream, source, runner_args)
    locks = Folder(config.work_dir, config.storage_options) / ".locks"
    with lock.hold(locks, f"{spec.name}-{identity.fingerprint}") if locked else contextlib.nullcontext():
        manifest = read_manifest(folder)
        if locked:
            folder.sweep()
        if manifest is not None:
            tidy(folder)
            yield dataclasses.replace(run, committed=True)
        else:
            _begin(run)
            yield run


def _begin(run: StageRun) -> None:
    """Write the directory's identity, or check that a half-done directory read the same upstream bytes."""
    reads = canonical(upstream_digests(run.upstream))
    if not run.folder.exists(BEGUN):
        run.folder.write(IDENTITY_FILE, run.identity.to_json())
        run.folder.write(BEGUN, reads)
    elif (begun := run.folder.read(BEGUN)) != reads:
        raise PipelineError(
            f"{run.label}: begun on other upstream bytes than those there now ({begun.decode()} against "
            f"{reads.decode()}); delete {redact(run.folder.url)} and run it again"
        )
