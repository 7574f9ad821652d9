"""What the tests of the vocab and tokens stages share: small configs on real text, and copies of committed stages."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline import configfile
from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.execute import run_stages
from pipeline.stage import identities, open_artifact

DEMO = Path(configfile.__file__).parent / "demo" / "corpus"


def conf(work: Path, inputs: Path | str, *overrides: str) -> Config:
    """A config of the demo's kind for other inputs."""
    return configfile.load("demo", [f"work_dir={work}", f"corpus.inputs=['{inputs}']", *overrides])


def committed(config: Config, stage: str) -> Artifact:
    """Run the pipeline up to a stage and open what it committed."""
    names = list(identities(config, stage))
    run_stages(config, names)
    return open_artifact(config, identities(config, stage)[stage], "a test")


def copy_stages(source: Path, work: Path, *stages: str) -> Path:
    """A work directory that has some stages of another one already; fingerprints know no paths."""
    for stage in stages:
        shutil.copytree(source / stage, work / stage)
    return work
