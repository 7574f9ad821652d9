"""Looks at a work directory and changes nothing: `plan` says what would run and why, `verify` reads every byte."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.manifest import IDENTITY_FILE, MANIFEST_FILE, Identity, Manifest
from pipeline.stage import RECORDS, identify, read_manifest, stage_folder
from pipeline.stages import STAGES
from pipeline.storage import Folder, Receipt, redact


@dataclass(frozen=True)
class PlanRow:
    """One stage of a plan. `state` is done, partial or missing; `parts_total` is known only once it is done."""

    stage: str
    fingerprint: str | None
    path: str | None
    state: str
    parts_done: int
    parts_total: int | None
    reason: str


def plan(config: Config) -> list[PlanRow]:
    """Every stage's fingerprint, place and state, and for those that would run the reason, in stage order."""
    rows: list[PlanRow] = []
    found: dict[str, Identity] = {}
    reasons: dict[str, str] = {}
    for name, spec in STAGES.items():
        blocked = [up for up in spec.upstream if up not in found]
        try:
            if blocked:
                raise UserError(f"waits for {blocked[0]}")
            found[name] = identify(spec, config, {up: found[up].fingerprint for up in spec.upstream})
        except UserError as error:
            rows.append(PlanRow(name, None, None, "missing", 0, None, str(error)))
            continue
        rows.append(_row(config, found[name], reasons))
        reasons[name] = rows[-1].reason
    return rows


def _row(config: Config, identity: Identity, upstream_reasons: dict[str, str]) -> PlanRow:
    folder = stage_folder(config, identity)
    where = redact(folder.url)
    manifest = read_manifest(folder)
    if manifest is not None:
        total = len(manifest.parts)
        return PlanRow(identity.stage, identity.fingerprint, where, "done", total, total, "")
    reason = _reason(config, identity, upstream_reasons)
    if not folder.exists(IDENTITY_FILE):
        return PlanRow(identity.stage, identity.fingerprint, where, "missing", 0, None, reason)
    done = sum(name.startswith(f"{RECORDS}/") for name in folder.files())
    return PlanRow(identity.stage, identity.fingerprint, where, "partial", done, None, f"to be finished; {reason}")


def _reason(config: Config, identity: Identity, upstream_reasons: dict[str, str]) -> str:
    """Compare with the most similar earlier run of the stage: the changes that lead from it to this identity."""
    changes = [identity.changes_from(old) for old in _earlier(config, identity)]
    if not changes:
        return "never run in this work_dir"
    fewest = min(changes, key=lambda found: (len(found), found))
    return "; ".join(_with_cause(change, upstream_reasons) for change in fewest)


def _with_cause(change: str, upstream_reasons: dict[str, str]) -> str:
    words = change.split()
    cause = upstream_reasons.get(words[1]) if words[0] == "upstream" else None
    return f"{change} ({cause})" if cause else change


def _earlier(config: Config, identity: Identity) -> list[Identity]:
    parent = Folder(config.work_dir, config.storage_options) / identity.stage
    found = []
    for name in parent.folders():
        folder = parent / name
        if name != identity.fingerprint and folder.exists(IDENTITY_FILE):
            found.append(Identity.from_json(folder.read(IDENTITY_FILE), f"{redact(folder.url)}/{IDENTITY_FILE}"))
    return found


def verify(config: Config) -> tuple[int, list[str]]:
    """Read every committed file of the config's stages again.

    Returns:
        The number of files that were checked, and one sentence for each that is missing, altered or unexpected.
    """
    checked, problems = 0, []
    for row in plan(config):
        if row.fingerprint is None:
            continue
        folder = Folder(config.work_dir, config.storage_options) / row.stage / row.fingerprint
        try:
            manifest = read_manifest(folder)
        except PipelineError as error:
            problems.append(str(error))
            continue
        if manifest is not None:
            checked += len(manifest.parts)
            problems += _check(folder, manifest)
    return checked, problems


def _check(folder: Folder, manifest: Manifest) -> list[str]:
    where, problems = redact(folder.url), []
    present = folder.files()
    for path, part in sorted(manifest.parts.items()):
        if path not in present:
            problems.append(f"{where}/{path}: missing")
        elif folder.digest(path) != Receipt(part.bytes, part.sha256):
            problems.append(f"{where}/{path}: altered (its sha256 is not the committed one)")
    data = {path.split("/")[0] for path in manifest.parts if "/" in path}
    known = {*manifest.parts, MANIFEST_FILE, IDENTITY_FILE}
    for path in present:
        if path not in known and path.split("/")[0] in data:
            problems.append(f"{where}/{path}: not listed in the manifest")
    return problems
