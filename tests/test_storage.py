"""Storage: publishing is all or nothing on every kind of store, names stay inside, secrets stay out of messages."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import lock, storage
from pipeline.errors import PipelineError, UserError
from pipeline.storage import Folder, redact


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return Folder(f"s3://bucket/{tmp_path.name}", request.getfixturevalue("s3_options"))
    return Folder(str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}")


def test_publish_read_list_and_remove(folder: Folder) -> None:
    receipt = folder.write("a/b.txt", b"hello")
    folder.write("a/c.txt", b"more")
    assert folder.read("a/b.txt") == b"hello"
    assert folder.files() == {"a/b.txt": 5, "a/c.txt": 4}
    assert folder.digest("a/b.txt") == receipt
    assert receipt.sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert folder.folders() == ["a"]
    assert folder.read_many(["a/c.txt", "gone", "a/b.txt"]) == {"a/c.txt": b"more", "a/b.txt": b"hello"}
    folder.remove("a/b.txt", "a/gone.txt")
    assert folder.files() == {"a/c.txt": 4}


def test_only_the_first_creates_a_file(folder: Folder) -> None:
    assert [folder.create_exclusively("claims/7", b"claimed") for _ in range(3)] == [True, False, False]
    with pytest.raises(ValueError, match="empty files"):
        folder.create_exclusively("claims/8", b"")


def test_publishing_again_replaces_the_whole_file(folder: Folder) -> None:
    folder.write("x", b"a" * 100_000)
    folder.write("x", b"b")
    assert folder.read("x") == b"b"


def test_a_failed_write_publishes_nothing_and_leaves_nothing(folder: Folder) -> None:
    folder.write("x", b"old")
    with pytest.raises(RuntimeError), folder.publish("x") as sink:
        sink.write(b"new")
        raise RuntimeError
    assert folder.read("x") == b"old"
    assert folder.files() == {"x": 3}


@pytest.mark.parametrize("point", ["create", "sync_file", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, code: int
) -> None:
    folder = Folder(str(tmp_path))
    folder.write("x", b"old")

    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(storage, point, fail)
        with pytest.raises(
            OSError, match=rf"{tmp_path}/x: could not be written \({os.strerror(code)}\); free some space"
        ):
            folder.write("x", b"new")
    assert folder.files() == {"x": 3}
    folder.write("x", b"new")
    assert folder.read("x") == b"new"


def test_a_full_disk_is_reported_and_the_old_file_stays(tmp_path: Path) -> None:
    code = f"""
import resource
from pipeline.storage import Folder
folder = Folder({str(tmp_path)!r})
folder.write("x", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder.write("x", b"n" * 100_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert Folder(str(tmp_path)).files() == {"x": 3}


def test_sweep_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    code = f"""
import os
from pipeline.storage import Folder
with Folder({str(tmp_path)!r}).publish("deep/x") as sink:
    sink.write(b"half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert len(folder.files()) == 1
    assert len(folder.sweep()) == 1
    assert folder.files() == {}


def test_a_store_that_fails_now_and_then_is_tried_again(
    s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder("s3://bucket/flaky", s3_options)
    fs, calls = folder.fs, []
    real: Callable[..., Any] = fs.put_file

    def flaky(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) % 3:
            raise OSError(errno.EBUSY, "SlowDown")
        return real(*arguments)

    monkeypatch.setattr(fs, "put_file", flaky)
    folder.write("x", b"content")
    assert (folder.read("x"), len(calls)) == (b"content", 3)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../x", "a//x", "a/./x", "x\ny", "x\n", ".hidden", "C:\\x", "a\0b", ""]
)
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match="not a safe file name"):
        Folder(str(tmp_path)).write(name, b"")


def test_an_unknown_protocol_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="nosuch"):
        Folder("nosuch://bucket/x").exists()


def test_secrets_are_in_no_repr_or_message() -> None:
    folder = Folder("s3://bucket/x", {"s3": {"secret": "hush"}})
    assert "hush" not in repr(folder)
    assert "hush" in repr(pickle.loads(pickle.dumps(folder)).options)  # workers still get them
    assert redact("https://user:hush@host/path?token=hush") == "https://host/path"


def test_the_second_holder_of_a_lock_waits_for_the_first(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.05)
    order: list[str] = []
    held = threading.Event()

    def first() -> None:
        with lock.hold(folder, "stage"):
            held.set()
            threading.Event().wait(0.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(10)
    with lock.hold(folder, "stage"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_lease_of_a_dead_holder_is_taken_over(s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.1)
    folder = Folder("s3://bucket/locks", s3_options)
    folder.create_exclusively("stage.lease", b"process 1 on a machine that is gone")
    with lock.hold(folder, "stage"):
        assert b"gone" not in folder.read("stage.lease")
    assert not folder.exists("stage.lease")
