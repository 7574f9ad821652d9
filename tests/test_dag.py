"""The Airflow DAG in a real Airflow, whose environment's Python the variable MDEBERTA_AIRFLOW_PYTHON names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import MDEBERTA, mdeberta

from pipeline.stages import STAGES

DAGS = Path(__file__).parents[1] / "dags"
INSPECT = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag()
dag = bag.dags["mdeberta_pretrain"]
print(json.dumps({
    "errors": bag.import_errors,
    "tasks": {task.task_id: sorted(task.upstream_task_ids) for task in dag.topological_sort()},
    "retries": sorted({task.retries for task in dag.tasks}),
    "max_active_runs": dag.max_active_runs,
    "ours": sorted({"pipeline", "tokenizer", "model"} & set(sys.modules)),
}))
"""
SMALL = {
    "corpus.inputs": "[package://demo/corpus/de.txt.xz, package://demo/corpus/sw.txt.xz]",
    "corpus.max_chars": "3000",
    "vocab.size": "500",
    "vocab.sample_mb": "0.1",
    "pretrain.steps": "2",
    "pretrain.validation_rows": "16",
    "pretrain.launcher.threads": "1",
    "xnli.epochs": "0.1",
    "xnli.max_train_pairs": "64",
    "xnli.max_eval_pairs": "16",
}


class Airflow:
    """An Airflow with a database of its own and the project's DAG folder."""

    def __init__(self, python: str, home: Path) -> None:
        self.python = python
        self.environment = {
            **os.environ,
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW_VAR_MDEBERTA": MDEBERTA,
        }
        self.run("-m", "airflow", "db", "migrate")

    def run(self, *arguments: str, expect: int = 0) -> str:
        done = subprocess.run(
            [self.python, *arguments], env=self.environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def test_dag(self, parameters: dict[str, Any], expect: int = 0) -> str:
        """Run the DAG to its end, all tasks and their retries."""
        command = ("-m", "airflow", "dags", "test", "mdeberta_pretrain", "--conf", json.dumps(parameters))
        return self.run(*command, expect=expect)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Airflow:
    python = os.environ.get("MDEBERTA_AIRFLOW_PYTHON")
    if python is None:
        pytest.skip("MDEBERTA_AIRFLOW_PYTHON names no Python with Airflow (dags/README.md says how to install it)")
    return Airflow(python, tmp_path_factory.mktemp("airflow"))


def manifests(work_dir: Path) -> dict[str, bytes]:
    found = sorted(work_dir.glob("*/*/MANIFEST.json"))
    return {str(path.relative_to(work_dir)): path.read_bytes() for path in found}


def test_the_dag_loads_without_the_project_and_has_the_stages_in_order(airflow: Airflow) -> None:
    found = json.loads(airflow.run("-c", INSPECT).splitlines()[-1])
    names = list(STAGES)
    assert found == {
        "errors": {},
        "tasks": {name: names[max(0, i - 1) : i] for i, name in enumerate(names)},
        "retries": [3],
        "max_active_runs": 1,
        "ours": [],
    }


@pytest.mark.slow
def test_the_dag_makes_what_the_command_makes(airflow: Airflow, tmp_path: Path) -> None:
    changes = [f"{key}={value}" for key, value in SMALL.items()]
    airflow.test_dag({"config": "demo", "overrides": [f"work_dir={tmp_path}/dag", *changes]})
    options = [word for change in (f"work_dir={tmp_path}/command", *changes) for word in ("--set", change)]
    mdeberta("run", "-c", "demo", *options)
    made, expected = manifests(tmp_path / "dag"), manifests(tmp_path / "command")
    assert made == expected and [Path(name).parts[0] for name in made] == sorted(STAGES)


@pytest.mark.slow
def test_stages_that_were_not_asked_for_are_skipped(airflow: Airflow, tmp_path: Path) -> None:
    changes = [f"work_dir={tmp_path}", f"corpus.inputs={SMALL['corpus.inputs']}"]
    output = airflow.test_dag({"overrides": changes, "stages": ["corpus"], "beam_options": ["--runner=FnApiRunner"]})
    assert output.count("is not among the stages asked for") == len(STAGES) - 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in STAGES) == ["corpus"]


@pytest.mark.slow
def test_a_mistake_in_the_config_fails_at_once_and_no_shell_reads_it(airflow: Airflow, tmp_path: Path) -> None:
    output = airflow.test_dag({"config": f"demo; touch {tmp_path}/owned $(touch {tmp_path}/owned)"}, expect=1)
    assert "is neither a file nor a preset" in output
    assert "up_for_retry" not in output
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters",
    [{"config": "--help"}, {"overrides": ["--debug"]}, {"stages": ["corpse"]}, {"beam_options": ["corpus"]}],
)
def test_parameters_of_the_wrong_form_start_nothing(airflow: Airflow, parameters: dict[str, Any]) -> None:
    output = airflow.test_dag(parameters, expect=1)
    assert "Invalid input for param" in output and "starting task_id" not in output
