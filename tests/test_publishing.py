"""Publishing under faults: killed, full or broken at every point, a stage says so and then ends with the same bytes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import resource
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
from faults import STAGES, Quiet, left_behind, run, tiny
from support import MDEBERTA, tree

from pipeline.errors import PipelineError

EVERY = 8  # of the points, here; the torture takes all of them
FIRST_PART = {"corpus": "en/data-00000", "vocab": "spm.model", "tokens": "en/train-00000"}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    return Quiet(tmp_path_factory.mktemp("quiet"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two tries."""
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: None))


def test_the_quiet_run_passes_every_point_and_its_counts_balance(quiet: Quiet) -> None:
    for stage in STAGES:
        points = {str(passage) for passage in quiet.passed[stage]}
        for file in ("a part", "a record", "the manifest", "the identity", "the beginning"):
            for point in ("create", "write", "fsync", "replace", "fsync of the directory"):
                assert f"{point} of {file}" in points, stage
        assert "remove of all records" in points
    (manifest,) = (quiet.work / "corpus").glob("*/MANIFEST.json")
    inputs = json.loads(manifest.read_bytes())["stats"]["inputs"]
    assert {name: counts["documents_in"] for name, counts in inputs.items()} == {"en.txt": 40, "sw.txt.xz": 32}
    for counts in inputs.values():
        assert counts["documents_in"] == counts["kept"] + sum(
            (*counts["dropped"].values(), *counts["rejected"].values())
        )


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_a_point_and_run_again_gives_the_same_bytes(quiet: Quiet, tmp_path: Path, stage: str) -> None:
    for number in quiet.first_of_each(stage)[::EVERY]:
        quiet.kill_at(number, stage, tmp_path / "work")


@pytest.mark.parametrize(("code", "first"), [(errno.ENOSPC, 2), (errno.EIO, 5)], ids=["full disk", "broken disk"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_disk_is_told_in_a_sentence_and_leaves_nothing(
    quiet: Quiet, tmp_path: Path, stage: str, code: int, first: int
) -> None:
    for number in quiet.first_of_each(stage)[first::EVERY]:
        quiet.fail_at(number, code, stage, tmp_path / "work")


@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_be_removed_is_told_and_removed_by_the_next_run(quiet: Quiet, tmp_path: Path, stage: str) -> None:
    removals = [n for n in quiet.first_of_each(stage) if quiet.passed[stage][n].point == "remove"]
    for number in removals[-2:]:
        quiet.fail_at(number, errno.EIO, stage, tmp_path / "work")


@pytest.mark.parametrize("stage", STAGES)
def test_a_limit_on_file_sizes_is_told_in_a_sentence(quiet: Quiet, tmp_path: Path, stage: str) -> None:
    overrides = quiet.prepare(stage, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(PipelineError, match=rf"{stage}.*File too large.*run the same command again"):
            run(overrides, stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run(overrides, stage)
    quiet.check(stage, tmp_path)


FULL_DISK = """
set -e
mount -t tmpfs -o size=4m tmpfs "$DISK"
cp -r "$BEFORE/." "$DISK"
cat /dev/zero > "$DISK/filler" 2> /dev/null || truncate -s -40K "$DISK/filler"
if "$@" 2> "$AFTER/told"; then exit 3; fi
rm "$DISK/filler"
"$@"
cp -r "$DISK/." "$AFTER"
"""


@pytest.mark.parametrize("stage", STAGES)
def test_a_really_full_disk(quiet: Quiet, tmp_path: Path, stage: str) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a name space of its own to mount a small disk in")
    disk, before, after = (tmp_path / name for name in ("disk", "before", "after"))
    quiet.prepare(stage, before)
    disk.mkdir()
    after.mkdir()
    overrides = [word for key in tiny(disk, quiet.inputs) for word in ("--set", key)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", MDEBERTA, "-q", "run", "-c", "demo", *overrides, stage],
        env={**os.environ, "DISK": str(disk), "BEFORE": str(before), "AFTER": str(after)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = (after / "told").read_text().strip().splitlines()[-1]
    assert told.startswith(f"mdeberta: {disk}/{stage}/") and "No space left on device" in told
    quiet.check(stage, after)


@pytest.fixture
def refusing_s3() -> Iterator[tuple[dict[str, Any], list[Callable[[str], bool]]]]:
    """fsspec options of an S3 server, and a list: a PUT of a path for which its last function holds gets a 503."""
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    refuse: list[Callable[[str], bool]] = [lambda path: False]
    serve = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and refuse[-1](environ["PATH_INFO"]):
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return serve(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {
        "endpoint_url": f"http://127.0.0.1:{server.server_port}", "key": "AKIATESTKEY", "secret": "very-secret-value",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }  # fmt: skip
    with suppress(FileExistsError):
        s3fs.S3FileSystem(**options).mkdir("refusing")
    yield {"s3": options}, refuse
    server.shutdown()


@pytest.mark.parametrize("stage", STAGES)
def test_a_store_that_refuses(
    quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str,
    refusing_s3: tuple[dict[str, Any], list[Callable[[str], bool]]],
) -> None:  # fmt: skip
    import s3fs

    options, refuse = refusing_s3
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = s3fs.S3FileSystem(**options["s3"])
    work = f"refusing/{stage}"
    overrides = [*tiny(f"s3://{work}", quiet.inputs), f"storage_options={json.dumps(options)}"]
    for upstream in STAGES[: STAGES.index(stage)]:
        fs.put(str(quiet.work / upstream), f"{work}/{upstream}", recursive=True)
    for file in (FIRST_PART[stage], f"_parts/{FIRST_PART[stage]}", "MANIFEST.json"):
        refuse.append(lambda path, file=file: file in path)  # type: ignore[misc]
        with pytest.raises(
            PipelineError, match=rf"{work}/{stage}/\w+/{file}[^ ]*: could not be written .*the same command again"
        ):
            run(overrides, stage)
        assert left_behind() == []
    puts: dict[str, Iterator[int]] = defaultdict(itertools.count)
    refuse.append(lambda path: next(puts[path]) < 2)
    run(overrides, stage)
    stored = {path.removeprefix(f"{work}/"): hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(work)}
    assert {path: digest for path, digest in stored.items() if path.startswith(f"{stage}/")} == {
        f"{stage}/{path}": digest for path, digest in tree(quiet.work / stage).items()
    }
