"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pretraining import CONFIG, Project, copy_of
from support import SHARED_DATA, mdeberta

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only wait for each other
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, by whichever test comes first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that none of them keeps one process busy while the others have nothing."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger real data that may lie beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real data of ../shared/data, which is not part of the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, dict[str, Any]]]:
    """fsspec options for an S3 protocol server on loopback with a bucket called `bucket`."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "AKIATESTKEY", "secret": "very-secret-value"}
    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield {"s3": options}
    server.stop()


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its committed tokens; copy it before pretraining in it."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "conf.yaml").write_text(yaml.safe_dump({"work_dir": str(folder / "work"), **CONFIG}))
    mdeberta("run", "-c", str(folder / "conf.yaml"), "corpus", "vocab", "tokens")
    return folder


@pytest.fixture
def project(tokens: Path, tmp_path: Path) -> Project:
    """A pretraining project of one test's own."""
    return copy_of(tokens, tmp_path / "project")
