"""Two machines on one computer: network namespaces with names and addresses of their own, joined by a cable.

A node shares disk and process numbers with the machine that runs the tests, and nothing of its network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_CABLE = "cable"
_AS_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Node:
    """One end of the cable."""

    host: str
    address: str
    namespace: str
    hosts_file: Path

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on this node."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts"]
        return subprocess.Popen(
            [*enter, "sh", "-c", _AS_NODE, "sh", self.host, str(self.hosts_file), *command],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        """`kill -9` everything that runs on it."""
        for pid in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def plug(self, plugged: bool) -> None:
        """Pull its end of the cable out, or put it back."""
        _ip("-n", self.namespace, "link", "set", _CABLE, "up" if plugged else "down")


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other by name; skips the test where this machine does not permit namespaces."""
    hosts = folder / "hosts"
    nodes = [Node(f"node-{n}", f"10.77.0.{n + 1}", f"mdeberta-{os.getpid()}-{n}", hosts) for n in range(2)]
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{node.address} {node.host}\n" for node in nodes))
    with contextlib.ExitStack() as stack:
        try:
            for node in nodes:
                _ip("netns", "add", node.namespace)
                stack.callback(_ip, "netns", "delete", node.namespace)
                stack.callback(node.kill)
            first, second = (node.namespace for node in nodes)
            _ip("link", "add", _CABLE, "netns", first, "type", "veth", "peer", "name", _CABLE, "netns", second)
            for node in nodes:
                _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", _CABLE)
                _ip("-n", node.namespace, "link", "set", "lo", "up")
                node.plug(True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"needs two network namespaces, for which one has to be root with iproute2: {reason.strip()}")
        yield nodes[0], nodes[1]


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
