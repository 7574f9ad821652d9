"""Worker processes of this machine, forked in milliseconds from a server that has imported the large packages already.

The launcher starts the server once, in the background, and asks it over a socket pair for each worker; a worker gets
its own socket and is handed one element at a time, so that all of them are busy to the end whatever an element costs.
A worker whose socket is closed exits, even in the midst of an element: that is how a pool ends, and since the kernel
closes the sockets of a launcher that was killed, nothing outlives it. An element costs 0.03 ms, a worker 10 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any, cast

from pipeline.counters import collecting
from pipeline.errors import PipelineError

Step = Callable[[Any], Iterable[Any]]
Size = Callable[[Any], float]
_PRELOADED = ("pyarrow.ipc", "pandas", "ftfy", "pipeline.streams", "pipeline.assemble", "tokenizer.encode")
"""What the steps import; pandas is what pyarrow looks for when it makes its first array."""
_server: tuple[subprocess.Popen[bytes], socket.socket] | None = None
_pools: dict[int, Pool] = {}


@dataclass(frozen=True)
class Outcome:
    """What became of one element: the elements for the next step and what was counted, or the error instead."""

    elements: list[Any] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    error: Exception | None = None


class Pool:
    """Some workers, until the pool is closed. Pickles as a reference that only its own process can follow."""

    def __init__(self, count: int) -> None:
        """Start `count` workers."""
        server = _running_server()
        self._workers = [_Worker(server) for _ in range(count)]
        _pools[id(self)] = self

    def __reduce__(self) -> tuple[Callable[[int], Pool], tuple[int]]:
        return _pool, (id(self),)

    def run(self, step: Step, elements: Iterable[Any], size: Size | None = None) -> Iterator[Outcome]:
        """Run a step on every element, each on the next worker that is free; outcomes come as they are ready.

        Elements of the largest `size` go first, without it they keep their order.

        Raises:
            PipelineError: the step's own, or a worker ended before its work did.
            RuntimeError: the step failed otherwise; the message is its traceback.
        """
        pickled = pickle.dumps(step)
        waiting = deque(elements if size is None else sorted(elements, key=size, reverse=True))
        idle, busy = list(self._workers), dict[int, _Worker]()
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop()
                worker.begin(pickled, waiting.popleft())
                busy[worker.socket.fileno()] = worker
            for ready in wait(list(busy)):
                worker = busy.pop(cast(int, ready))
                outcome = worker.outcome()
                if outcome.error:
                    raise outcome.error
                idle.append(worker)
                yield outcome

    def close(self) -> None:
        """End the workers, whatever they do."""
        _pools.pop(id(self), None)
        for worker in self._workers:
            worker.close()


def _pool(number: int) -> Pool:
    return _pools[number]


def _running_server() -> socket.socket:
    """The launcher's end of the server's socket; the server is started where it does not run."""
    global _server
    if _server is None or _server[0].poll() is not None:
        ours, theirs = socket.socketpair()
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        _server = process, ours
    return _server[1]


class _Worker:
    """The launcher's side of one worker."""

    def __init__(self, server: socket.socket) -> None:
        self.socket, theirs = socket.socketpair()
        self._answers = self.socket.makefile("rb")
        with theirs:
            socket.send_fds(server, [b"+"], [theirs.fileno()])

    def begin(self, step: bytes, element: Any) -> None:
        # in two layers: the worker can tell of what it fails to load only after it has read the whole message
        work = pickle.dumps((step, pickle.dumps(element)))
        with contextlib.suppress(OSError):  # `outcome` tells
            self.socket.sendall(work)

    def outcome(self) -> Outcome:
        try:
            return pickle.load(self._answers)  # noqa: S301  from our own process
        except (EOFError, OSError):
            fewer = "run again with fewer workers (corpus.workers, tokens.workers)"
            error = PipelineError(f"a worker process ended before its work did, perhaps for lack of memory; {fewer}")
            return Outcome(error=error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # another thread may wait for it, which a mere close leaves waiting
        self.socket.close()


def serve(control: int) -> None:
    """The server: import what is large, then fork a worker for every socket that comes in, until the launcher ends.

    Args:
        control: file descriptor of the server's end of its socket pair.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a worker would copy the pages that it shares with the server
    with socket.socket(fileno=control) as launcher:
        while True:
            message, handles, _, _ = socket.recv_fds(launcher, 1, 1)
            if not message:
                return
            if os.fork() == 0:
                launcher.close()
                _work(socket.socket(fileno=handles[0]))
            os.close(handles[0])


def _work(launcher: socket.socket) -> None:
    """A worker's life: one element after the other until the launcher closes the socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=_exit_on_hangup, args=(launcher,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError), launcher.makefile("rb") as stream:
        while True:
            launcher.sendall(_outcome(*pickle.load(stream)))  # noqa: S301  from the launcher
    os._exit(0)


def _exit_on_hangup(launcher: socket.socket) -> None:
    hangup = select.poll()
    hangup.register(launcher, 0)
    hangup.poll()
    os._exit(1)


def _outcome(step: bytes, element: bytes) -> bytes:
    try:
        with collecting() as counts:
            return pickle.dumps(Outcome(list(_loaded(step)(pickle.loads(element))), counts))  # noqa: S301  as above
    except PipelineError as error:
        return pickle.dumps(Outcome(error=PipelineError(str(error))))
    except Exception:
        return pickle.dumps(Outcome(error=RuntimeError(traceback.format_exc())))


@lru_cache(maxsize=1)
def _loaded(step: bytes) -> Step:
    """The step, which comes with every element and is mostly the one of the element before."""
    _give_memory_back()
    return pickle.loads(step)  # noqa: S301  from the launcher


def _give_memory_back() -> None:
    """Return what the step before has freed: Arrow's allocator keeps it for Arrow, the C library's for the others."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError):  # it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def processes(count: int) -> Iterator[Pool]:
    """A pool of workers for the block."""
    pool = Pool(count)
    try:
        yield pool
    finally:
        pool.close()
