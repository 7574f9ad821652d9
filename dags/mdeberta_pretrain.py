"""Airflow DAG `mdeberta_pretrain`: the six stages in order, each task one run of the `mdeberta` command.

Stages are idempotent and resumable, so a retried task goes on where it was stopped, and a task whose stage is committed
ends at once. Nothing of the project is imported: it lives in an environment of its own. What a user types into the
trigger form becomes elements of an argument list; neither a shell nor a template ever reads it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, BaseOperator, Context, Param, TriggerRule, Variable, chain
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

STAGES = ["corpus", "vocab", "tokens", "pretrain", "export", "xnli"]
USER_ERROR = 2  # exit code of a mistake in the config or the inputs, which no retry mends

PARAMS = {
    "config": Param("demo", type="string", pattern="^[^-]", description="Path of a YAML file, or a preset's name."),
    "overrides": Param(
        [],
        type="array",
        items={"type": "string", "pattern": "^[a-z_][a-z0-9_.]*="},
        description="Config keys to change, one a line: corpus.shard_mb=64",
    ),
    "stages": Param(
        STAGES,
        type="array",
        items={"type": "string", "enum": STAGES},
        examples=STAGES,
        description="Stages to run; the tasks of the others are skipped.",
    ),
    "beam_options": Param(
        [],
        type="array",
        items={"type": "string", "pattern": "^--[a-z]"},
        description="Options of the Beam pipelines, one a line: --runner=FlinkRunner",
    ),
}


class StageOperator(BaseOperator):
    """Runs one stage. The event of its asset `mdeberta_STAGE` carries the path of the stage's manifest."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.outlets = [Asset(f"mdeberta_{self.task_id}")]
        self._process: subprocess.Popen[bytes] | None = None

    def execute(self, context: Context) -> None:
        """Run the command to its end; its output is the task's log.

        Raises:
            AirflowSkipException: the stage was not asked for.
            AirflowFailException: the config or the inputs are wrong.
            AirflowException: the run failed or was stopped; a retry goes on.
        """
        params = context["params"]
        if self.task_id not in params["stages"]:
            raise AirflowSkipException(f"{self.task_id} is not among the stages asked for")
        self._run(["run", *_settings(params), self.task_id, "--", *params["beam_options"]])
        context["outlet_events"][self.outlets[0]].extra = {"manifest": self._manifest(params)}

    def on_kill(self) -> None:
        """Ask the command to stop; pretraining writes a checkpoint first."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def _run(self, arguments: list[str]) -> None:
        self._process = subprocess.Popen(  # a session of its own: signals come through on_kill alone
            [_executable(), *arguments], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = self._process.wait()
        if code:
            error = AirflowFailException if code == USER_ERROR else AirflowException
            raise error(f"stage {self.task_id} ended with exit code {code}; its last line above says why")

    def _manifest(self, params: Mapping[str, Any]) -> str:
        plan = subprocess.run(
            [_executable(), "plan", *_settings(params), "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        return next(f"{row['path']}/MANIFEST.json" for row in json.loads(plan.stdout) if row["stage"] == self.task_id)


def _executable() -> str:
    """Path of the `mdeberta` command, from the Airflow variable `mdeberta`."""
    return Variable.get("mdeberta", default="mdeberta")


def _settings(params: Mapping[str, Any]) -> list[str]:
    return ["-c", params["config"], *(argument for change in params["overrides"] for argument in ("--set", change))]


with DAG(
    "mdeberta_pretrain",
    schedule=None,
    max_active_runs=1,
    params=PARAMS,
    default_args={"retries": 3, "retry_delay": timedelta(minutes=1), "trigger_rule": TriggerRule.NONE_FAILED},
    doc_md=__doc__,
):
    chain(*(StageOperator(task_id=stage) for stage in STAGES))
