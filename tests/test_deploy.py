"""Containers and manifests: what they name exists, and every command in them is understood by the program it is for."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from beam_cluster import free_port
from documented import documented
from pretraining import SHORT, Project

from pipeline import configfile
from pipeline.cli import app
from pipeline.stages import STAGES

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
BEAM = importlib.metadata.version("apache-beam")


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["demo"]


def manifests() -> dict[str, dict[str, Any]]:
    """The Kubernetes objects of the training job by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((DOCKER / "trainjob.yaml").read_text())}


def trainer() -> dict[str, Any]:
    return manifests()["TrainJob"]["spec"]["trainer"]


def instructions(path: Path, name: str) -> list[list[str]]:
    """The arguments of a Dockerfile's instructions of one kind."""
    lines = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.split(" ")[0] == name]


def copied(path: Path) -> list[str]:
    """What a Dockerfile copies from the project."""
    return [
        source for words in instructions(path, "COPY") if not words[0].startswith("--from") for source in words[:-1]
    ]


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of an `mdeberta` command line; wrong ones raise."""
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    return command.make_context(words[0], words[1:]).params


def shortened(words: list[str]) -> str:
    return " ".join(words)[:60]


PAGES = [DOCKER / "README.md", ROOT / "dags" / "README.md", ROOT / "README.md", ROOT / "docs" / "scaling.md"]
MDEBERTA_COMMANDS = [
    words[words.index("mdeberta") + 1 :]
    for page in PAGES
    for words in [*documented(page), *([compose()["command"]] if page.parent == DOCKER else [])]
    if words and words[0] in ("mdeberta", "docker") and "mdeberta" in words
]


@pytest.mark.parametrize("words", MDEBERTA_COMMANDS, ids=shortened)
def test_documented_commands_are_understood(words: list[str]) -> None:
    stages = parsed(words).get("stages") or []
    names = [name for name in stages if name in STAGES]
    assert stages[len(names) :] == (words[words.index("--") + 1 :] if "--" in words else [])


@pytest.mark.parametrize(
    "words", [w for page in PAGES for w in documented(page) if w and w[0] in ("torchrun", "deepspeed")], ids=shortened
)
def test_documented_launches_are_understood(words: list[str]) -> None:
    from deepspeed.launcher import runner
    from torch.distributed import run

    if words[0] == "torchrun":
        options = run.get_args_parser().parse_args(words[1:])
        script, rest = options.training_script, options.training_script_args
    else:
        options = runner.parse_args(words[1:])
        script, rest = options.user_script, options.user_args
    assert (script, options.module) == ("model.pretrain", True)
    assert rest[:2] == ["-c", "conf.yaml"]
    configfile.load("mdeberta_v3_base", rest[3::2])


@pytest.mark.parametrize("words", [words for words in MDEBERTA_COMMANDS if "--" in words], ids=shortened)
def test_documented_beam_options_exist(words: list[str]) -> None:
    from apache_beam.options import pipeline_options as options

    parser = options._BeamArgumentParser()
    kinds: list[Any] = [kind for kind in vars(options).values() if inspect.isclass(kind)]
    for kind in kinds:
        if issubclass(kind, options.PipelineOptions) and "_add_argparse_args" in vars(kind):
            kind._add_argparse_args(parser)
    assert parser.parse_known_args(words[words.index("--") + 1 :])[1] == []


@pytest.mark.parametrize("words", [w for w in documented(DOCKER / "README.md") if w[:2] == ["docker", "build"]])
def test_documented_builds_name_files_and_arguments_that_exist(words: list[str]) -> None:
    dockerfile = ROOT / words[words.index("-f") + 1]
    given = {words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--build-arg"}
    assert given <= {argument[0].split("=")[0] for argument in instructions(dockerfile, "ARG")}


def test_beam_images_have_the_version_of_the_submitting_side() -> None:
    from apache_beam.options.pipeline_options import FlinkRunnerOptions

    text = "".join(path.read_text() for path in DOCKER.iterdir() if path.is_file())
    assert set(re.findall(r"apache/beam_\w[\w.]*:([\d.]+)", text)) == {BEAM}
    assert set(re.findall(r"'apache-beam\[gcp\]==([\d.]+)'", text)) == {BEAM}
    assert set(re.findall(r"beam_flink([\d.]+)_job", text)) <= set(FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS)


def test_all_images_have_one_minor_version_of_python() -> None:
    text = "".join(path.read_text() for path in DOCKERFILES)
    assert len(set(re.findall(r"FROM python:(3\.\d+)-", text) + re.findall(r"beam_python(3\.\d+)_sdk", text))) == 1


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_an_ordinary_user(dockerfile: Path) -> None:
    defaults = dict(argument[0].split("=") for argument in instructions(dockerfile, "ARG"))
    (user,) = instructions(dockerfile, "USER")
    assert defaults.get(user[0].strip("${}"), user[0]) == "1000"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_package_can_be_built_from_what_an_image_copies(dockerfile: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in copied(dockerfile):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    packages = [path for package in ("pipeline", "tokenizer", "model") for path in (ROOT / package).rglob("*")]
    files = {str(path.relative_to(ROOT)) for path in packages if path.is_file() and "__pycache__" not in path.parts}
    assert files - inside == set()


ONLY = """
import ast, importlib.abc, importlib.metadata, sys
from pathlib import Path
from packaging.requirements import Requirement
found, queue = set(), [Requirement(text) for text in sys.argv[1:]]
while queue:
    wanted = queue.pop()
    key = (wanted.name.lower().replace("_", "-"), frozenset(wanted.extras))
    if key in found:
        continue
    found.add(key)
    for text in importlib.metadata.requires(wanted.name) or []:
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
            queue.append(need)
names = {name for name, _ in found} | {"mdeberta-pipeline"}
owners = importlib.metadata.packages_distributions()

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        owner = {name.lower().replace("_", "-") for name in owners.get(fullname, [])}
        if owner and not owner & names:
            raise ModuleNotFoundError(f"{fullname} of {owner} is not in the image", name=fullname)

sys.meta_path.insert(0, Refuse())
import pipeline.corpus, tokenizer.encode

def imported(path):
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module

# what is imported only where it is used has to be there too, but for what draws the launcher's tables
ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("pipeline", "tokenizer")]
for name in {name for module in ours for name in imported(module.__file__)}:
    if name.split(".")[0] != "rich":
        importlib.import_module(name)
"""


def test_the_worker_image_installs_what_the_beam_steps_import() -> None:
    (install,) = (words for words in instructions(DOCKER / "Dockerfile.beam", "RUN") if "apache-beam" in words)
    distributions = [word for word in install[install.index("apache-beam") :] if word != "${EXTRA}"]
    subprocess.run([sys.executable, "-c", ONLY, *distributions], check=True)
    for needed in ("xxhash", "ftfy"):
        incomplete = [name for name in distributions if name != needed]
        failed = subprocess.run([sys.executable, "-c", ONLY, *incomplete], capture_output=True, text=True)
        assert f"{needed} of" in failed.stderr


def test_the_demo_container_uses_an_image_that_is_there() -> None:
    service = compose()
    context = (DOCKER / service["build"]["context"]).resolve()
    assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()
    (target,) = (volume.split(":")[1] for volume in service["volumes"])
    assert parsed(service["command"][1:])["work_dir"].startswith(f"{target}/")


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_the_training_job_is_what_kubeflow_trainer_understands(kind: str) -> None:
    """Its own data model drops fields it does not know and refuses values of a wrong type."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the package kubeflow-trainer-api")
    manifest = manifests()[kind]
    assert getattr(models, f"TrainerV1alpha1{kind}").from_dict(manifest).to_dict() == manifest


def test_the_training_job_runs_in_its_own_runtime() -> None:
    runtime, job = manifests()["TrainingRuntime"], manifests()["TrainJob"]
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert {"name": "XDG_CACHE_HOME", "value": mounts["cache"]} in job["spec"]["trainer"]["env"]
    (patience,) = (word for word in trainer()["args"] if word.startswith("--shutdown-timeout="))
    assert int(patience.split("=")[1]) < pod["terminationGracePeriodSeconds"]


def test_the_training_job_shares_its_batch_evenly() -> None:
    job = trainer()
    given = [word.removeprefix("--set=") for word in job["args"] if word.startswith("--set=")]
    (preset,) = (word.removeprefix("--config=") for word in job["args"] if word.startswith("--config="))
    config = configfile.load(preset, given).pretrain
    assert config.global_batch // config.micro_batch % (job["numNodes"] * job["numProcPerNode"]) == 0
    assert int(job["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == job["numProcPerNode"]


def test_the_training_jobs_command_starts_pretraining_under_torchrun(tmp_path: Path) -> None:
    """With the variables of its runtime and another work_dir it comes as far as a stage that is not there."""
    job = trainer()
    (program,) = job["command"]
    here = ["--set", f"work_dir={tmp_path}", "--set", "corpus.inputs=[package://demo/corpus/sw.txt.xz]"]
    runtime = {"NNODES": 1, "NPROC_PER_NODE": 1, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *job["args"], *here],
        env={**os.environ, **{f"PET_{name}": str(value) for name, value in runtime.items()}},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "mdeberta: pretrain needs vocab" in done.stderr, done.stderr


def batch_job(project: Project, code: int) -> tuple[int, str]:
    """Run the SLURM script where every task ends with `code`; its own exit code, and what it asked of SLURM."""
    folder = project.config.parent / "slurm"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    asked = folder / "asked"
    asked.touch()
    for name, body in {"srun": f"exit {code}", "scontrol": f'echo "$@" >> {asked}'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    script = ["bash", str(DOCKER / "slurm.sbatch"), *project.arguments(*SHORT)]
    done = subprocess.run(script, env={**os.environ, "PATH": path, "SLURM_JOB_ID": "4711"})
    return done.returncode, asked.read_text()


def test_the_slurm_job_queues_itself_again_until_the_stage_is_done(project: Project) -> None:
    asked_to_stop, lost_a_node, wrong_command = 0, 1, 2
    assert batch_job(project, asked_to_stop) == (0, "requeue 4711\n")
    assert batch_job(project, lost_a_node) == (1, "requeue 4711\n")
    assert batch_job(project, wrong_command) == (2, "")
    project.train(*SHORT)
    assert batch_job(project, 0) == (0, "")


def test_the_slurm_job_has_a_task_for_every_gpu_and_time_for_a_checkpoint() -> None:
    text = (DOCKER / "slurm.sbatch").read_text()
    options = dict(line.split("=", 1) for line in re.findall(r"^#SBATCH --(.+=.+)$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "USR1@120"  # to the tasks, not to the script
    config = configfile.load("mdeberta_v3_base", ["corpus.inputs=[x]"]).pretrain
    assert config.global_batch // config.micro_batch % (int(options["nodes"]) * int(options["ntasks-per-node"])) == 0


def test_the_dag_names_the_stages_in_order_and_imports_nothing_of_the_project() -> None:
    module = ast.parse((ROOT / "dags" / "mdeberta_pretrain.py").read_text())
    constants = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(constants["STAGES"]) == list(STAGES)
    imports = [node for node in ast.walk(module) if isinstance(node, ast.Import | ast.ImportFrom)]
    sources = [
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] for node in imports
    ]
    assert {name.split(".")[0] for names in sources for name in names} <= {*sys.stdlib_module_names, "airflow"}
    parameters = constants["PARAMS"]
    assert isinstance(parameters, ast.Dict)
    known = {key.value for key in parameters.keys if isinstance(key, ast.Constant)}
    runs = [words for words in documented(ROOT / "dags" / "README.md") if "--conf" in words]
    assert runs and all(set(json.loads(words[words.index("--conf") + 1])) <= known for words in runs)
