"""The records of the stage contract: `Part`, `Identity` (what a fingerprint is made of) and `Manifest` (the commit).

All are plain JSON with sorted keys and without times, hosts or absolute paths, so equal work gives equal bytes.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from pipeline.errors import PipelineError

FORMAT = 1
IDENTITY_FILE = "STAGE.json"
MANIFEST_FILE = "MANIFEST.json"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, in UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True)
class Part:
    """One published file of a stage: path relative to the stage's directory, size, digest, rows, counts."""

    path: str
    bytes: int
    sha256: str
    rows: int = 0
    stats: dict[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> builtins.bytes:
        """The part's record as canonical JSON."""
        return canonical(vars(self))

    @staticmethod
    def from_json(data: builtins.bytes, source: str) -> Part:
        """Parse a record; `source` names it in the error."""
        return Part.from_dict(_object(data, source), source)

    @staticmethod
    def from_dict(record: Any, source: str) -> Part:
        """Check and convert one parsed record."""
        try:
            part = Part(**record)
        except TypeError:
            raise PipelineError(f"{source}: a part's record has wrong fields; {_DAMAGED}") from None
        fits = isinstance(part.path, str) and isinstance(part.sha256, str) and isinstance(part.stats, dict)
        if not (fits and isinstance(part.bytes, int) and isinstance(part.rows, int)):
            raise PipelineError(f"{source}: a part's record has values of the wrong type; {_DAMAGED}")
        return part


@dataclass(frozen=True)
class InputIdentity:
    """What makes an external input file this file: name, size and a hash of its first, middle and last MiB.

    Of a file of weights everything is hashed: another training may have left most of its tensors as they were.
    """

    name: str
    bytes: int
    sample_sha256: str


@dataclass(frozen=True)
class Identity:
    """Everything a stage's bytes depend on; its hash is the fingerprint and the directory's name."""

    stage: str
    version: int
    config: dict[str, Any]
    toolchain: dict[str, str]
    inputs: dict[str, list[InputIdentity]]
    upstream: dict[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """First 12 hex digits of the sha256 over the canonical JSON of this identity."""
        return hashlib.sha256(self.to_json()).hexdigest()[:12]

    def to_json(self) -> bytes:
        """The identity as canonical JSON."""
        return canonical({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_json(data: bytes, source: str) -> Identity:
        """Parse an identity; `source` names it in the error."""
        tree = _object(data, source)
        if tree.pop("format", None) != FORMAT:
            raise PipelineError(f"{source}: written in another format than this version's {FORMAT}; {_DAMAGED}")
        try:
            inputs = {key: [InputIdentity(**entry) for entry in entries] for key, entries in tree.pop("inputs").items()}
            return Identity(inputs=inputs, **tree)
        except (TypeError, KeyError, AttributeError):
            raise PipelineError(f"{source}: the identity has wrong fields; {_DAMAGED}") from None

    def changes_from(self, old: Identity) -> list[str]:
        """What differs from an earlier identity of the same stage, one phrase each, config keys first."""
        changes = [
            f"{self.stage}.{key} {_short(before)} -> {_short(after)}"
            for key, before, after in _differences(old.config, self.config)
        ]
        for key in sorted({*self.inputs, *old.inputs}):
            if self.inputs.get(key) != old.inputs.get(key):
                changes.append(f"{key}: {_file_changes(old.inputs.get(key, []), self.inputs.get(key, []))}")
        for name, before, after in _differences(old.toolchain, self.toolchain):
            changes.append(f"{name} {before} -> {after}")
        if self.version != old.version:
            changes.append(f"stage version {old.version} -> {self.version}")
        changes += [f"upstream {name} changed" for name, _, _ in _differences(old.upstream, self.upstream)]
        return changes


@dataclass(frozen=True)
class Manifest:
    """The commit of a stage: its identity, the digests of the upstream manifests it read, its parts and totals."""

    identity: Identity
    upstream_manifests: dict[str, str]
    parts: dict[str, Part]
    stats: dict[str, Any]

    def to_json(self) -> bytes:
        """The manifest as readable, key-sorted JSON."""
        tree = {
            "format": FORMAT,
            "fingerprint": self.identity.fingerprint,
            "identity": json.loads(self.identity.to_json()),
            "upstream_manifests": self.upstream_manifests,
            "parts": [vars(self.parts[path]) for path in sorted(self.parts)],
            "stats": self.stats,
        }
        return json.dumps(tree, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode()

    @staticmethod
    def from_json(data: bytes, source: str) -> Manifest:
        """Parse a manifest; `source` names it in the error."""
        tree = _object(data, source)
        try:
            identity = Identity.from_json(canonical(tree["identity"]), source)
            parts = [Part.from_dict(record, source) for record in tree["parts"]]
            manifest = Manifest(
                identity, tree["upstream_manifests"], {part.path: part for part in parts}, tree["stats"]
            )
            recorded = tree["fingerprint"]
        except (KeyError, TypeError):
            raise PipelineError(f"{source}: a manifest needs identity, parts and stats; {_DAMAGED}") from None
        if recorded != identity.fingerprint:
            raise PipelineError(f"{source}: fingerprint {recorded} does not belong to its identity; {_DAMAGED}")
        return manifest

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest's bytes."""
        return hashlib.sha256(self.to_json()).hexdigest()


_DAMAGED = "it was damaged or edited: delete the stage's directory and run the stage again"


def _object(data: bytes, source: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
        canonical(tree)  # what this cannot write again it never wrote: NaN, numbers beyond a float, lone surrogates
    except (ValueError, RecursionError):
        raise PipelineError(f"{source}: not valid JSON; {_DAMAGED}") from None
    if not isinstance(tree, dict):
        raise PipelineError(f"{source}: expected a JSON object; {_DAMAGED}")
    return tree


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found


def _file_changes(old: list[InputIdentity], new: list[InputIdentity]) -> str:
    added = sorted({entry.name for entry in new} - {entry.name for entry in old})
    removed = sorted({entry.name for entry in old} - {entry.name for entry in new})
    changed = sorted({entry.name for entry in new if entry not in old} - set(added))
    words = [("added", added), ("removed", removed), ("changed", changed)]
    return ", ".join(f"{_first_of(names)} {word}" for word, names in words if names)


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
