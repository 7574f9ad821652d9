"""The corpus and the tokens are the same bytes on every Beam runner, whatever the workers and the chunk size."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest
from beam_cluster import job_server, worker_pool
from documented import documented
from support import mdeberta, tree

from pipeline import configfile
from pipeline.stages import STAGES

README = Path(__file__).parents[1] / "docker" / "README.md"
ON_A_CLUSTER = [words[1:] for words in documented(README) if "--environment_type=EXTERNAL" in words]
STAGES_ON_BEAM = ["corpus", "vocab", "tokens"]  # vocab is between them and runs in the launcher
MULTI_PROCESSING = ["--runner=FnApiRunner", "--direct_running_mode=multi_processing"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and four languages, two of them in plain files and two in compressed ones."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "in").mkdir()
    demo = Path(configfile.__file__).parent / "demo" / "corpus"
    for language in ("de", "th"):
        (folder / "in" / f"{language}.txt").write_bytes(lzma.decompress((demo / f"{language}.txt.xz").read_bytes()))
    for language in ("ka", "sw"):
        (folder / "in" / f"{language}.txt.xz").write_bytes((demo / f"{language}.txt.xz").read_bytes())
    (folder / "conf.yaml").write_text(
        f"preset: demo\nwork_dir: {folder}/work\nvocab: {{size: 600, sample_mb: 0.3, num_threads: 1}}\n"
        f"corpus: {{inputs: ['{folder}/in/*'], shard_mb: 0.2, workers: 1}}\ntokens: {{workers: 1}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def in_this_process(project: Path) -> dict[str, str]:
    """Digests of all files that FnApiRunner commits in one process."""
    mdeberta("run", "-c", f"{project}/conf.yaml", *STAGES_ON_BEAM)
    return tree(project / "work")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of a job server and a worker pool, by those that the documentation gives them."""
    with job_server(tmp_path_factory.mktemp("staged")) as job, worker_pool() as pool:
        yield {"localhost:8099": f"localhost:{job}", "localhost:50000": f"localhost:{pool}"}


def results(project: Path, work: Path, chunk_mb: float, *arguments: str) -> dict[str, str]:
    changes = [f"work_dir={work}", f"corpus.chunk_mb={chunk_mb}"]
    sets = [word for change in changes for word in ("--set", change)]
    mdeberta("run", "-c", f"{project}/conf.yaml", *sets, *arguments)
    return tree(work)


def test_worker_processes_of_this_machine(project: Path, in_this_process: dict[str, str], tmp_path: Path) -> None:
    workers = ["--set", "corpus.workers=2", "--set", "tokens.workers=3"]
    assert results(project, tmp_path, 0.05, *workers, *STAGES_ON_BEAM) == in_this_process


@pytest.mark.parametrize(("processes", "chunk_mb"), [(1, 0.5), (2, 0.11)])
def test_worker_processes_of_beam(
    project: Path, in_this_process: dict[str, str], tmp_path: Path, processes: int, chunk_mb: float
) -> None:
    arguments = [*STAGES_ON_BEAM, "--", *MULTI_PROCESSING, f"--direct_num_workers={processes}"]
    assert results(project, tmp_path, chunk_mb, *arguments) == in_this_process


def test_a_job_server_whose_workers_are_threads_of_the_launcher(
    project: Path, in_this_process: dict[str, str], cluster: dict[str, str], tmp_path: Path
) -> None:
    options = ["--runner=PortableRunner", f"--job_endpoint={cluster['localhost:8099']}", "--environment_type=LOOPBACK"]
    assert results(project, tmp_path, 0.07, *STAGES_ON_BEAM, "--", *options) == in_this_process


@pytest.mark.parametrize("words", ON_A_CLUSTER, ids=lambda words: words[words.index("--") + 1])
def test_documented_commands_with_a_worker_pool(
    project: Path, in_this_process: dict[str, str], cluster: dict[str, str], tmp_path: Path, words: list[str]
) -> None:
    """The job reaches a portable job server and runs in the worker pool; what Flink makes of it is not tested."""
    for old, new in cluster.items():
        words = [word.replace(old, new) for word in words]
    arguments = words[words.index(next(word for word in words if word in STAGES)) :]
    assert arguments[: arguments.index("--")] == STAGES_ON_BEAM
    assert results(project, tmp_path, 0.3, *arguments) == in_this_process
