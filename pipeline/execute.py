"""Runs stages in order through their contract: lock, no-op when committed, log of time and memory."""

from __future__ import annotations

import logging
import time

from pipeline import stage
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.stages import STAGES, StageSpec
from pipeline.storage import Folder, redact
from pipeline.usage import measured

_log = logging.getLogger(__name__)


def run_stages(
    config: Config, names: list[str], source: tuple[str, ...] = (), runner_args: tuple[str, ...] = ()
) -> list[str]:
    """Run the named stages in pipeline order, or all of them; each does only what is not committed yet.

    Args:
        source: the `-c` and `--set` arguments, for stages that start processes of their own.
        runner_args: Beam pipeline options, passed through unchanged.

    Returns:
        What the user should know of the stages' results, such as inputs that had to be rejected, one phrase each.

    Raises:
        UserError: a name is no stage, or an upstream stage is missing.
    """
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise UserError(f"no stage is called {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    wanted = [spec for spec in STAGES.values() if not names or spec.name in names]
    for spec in wanted:
        spec.check(config)
    notes: list[str] = []
    for spec in wanted:
        folder = _run_stage(spec, config, source, runner_args)
        manifest = stage.read_manifest(folder)
        notes += manifest.stats.get("notes", []) if manifest else []
    return notes


def _run_stage(spec: StageSpec, config: Config, source: tuple[str, ...], runner_args: tuple[str, ...]) -> Folder:
    started = time.monotonic()
    with stage.open_run(spec, config, source=source, runner_args=runner_args) as run:
        if run.committed:
            _log.info("%s: committed already, nothing to do", spec.name)
            return run.folder
        _log.info("%s %s: into %s", spec.name, run.identity.fingerprint, redact(run.folder.url))
        with measured(Folder(config.work_dir, config.storage_options), f"{spec.name}-{run.identity.fingerprint}"):
            spec.load()(run)
    _log.info("%s: committed after %.1f s", spec.name, time.monotonic() - started)
    return run.folder
