"""Connections between rank 0 and every other process: lines of JSON both ways, and the news that the other end is gone.

The kernel closes a process's connections however it dies, and gives a host up that has been out of reach for 25 s: a
closed connection is news that needs neither a clock nor a thread that runs at the other end. Nothing here waits for
anybody but `connect` and `Hub.expect`. A look costs one system call a connection.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from typing import Any

from pipeline.errors import PipelineError

_GIVE_UP = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),  # also while something sent is not acknowledged
)
_CONNECT_SECONDS = 60.0
_LOOK_SECONDS = 0.01
_BLOCK_BYTES = 1 << 16
_LONGEST_LINE = 1 << 20


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.open = True
        """Whether the other end may still say something."""
        self._connection = connection
        self._received, self._unsent = b"", b""
        connection.setblocking(False)
        for level, option, value in _GIVE_UP:
            connection.setsockopt(level, option, value)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or keep of it for the next time what the kernel does not take now."""
        self._unsent += json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""  # it has ended, as `receive` will find: what it said before may still have to be read

    def receive(self, most: int = -1) -> list[dict[str, Any]]:
        """The messages that have come, at most so many; afterwards `open` says whether the other end is still there."""
        while self.open:
            try:
                block = self._connection.recv(_BLOCK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                block = b""
            self._received += block
            self.open = bool(block) and len(self._received) < _LONGEST_LINE
        *lines, self._received = self._received.split(b"\n", most)
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):  # whoever talks like this is none of ours
            self.open = False
            return []

    def close(self) -> None:
        """Close this end; what was sent still arrives."""
        self.open = False
        self._connection.close()


class Hub:
    """Rank 0's side: where the others connect to.

    Args:
        local: whether all processes run on this machine, so that no other can connect.
    """

    def __init__(self, local: bool) -> None:
        self.channels: dict[int, Channel] = {}
        """By rank, of those that have introduced themselves."""
        self._token = secrets.token_hex(16)
        self._strangers: list[Channel] = []
        if not local and socket.has_dualstack_ipv6():
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            self._server = socket.create_server(("127.0.0.1" if local else "", 0), backlog=1024)
        self._server.setblocking(False)

    @property
    def invitation(self) -> tuple[int, str]:
        """What `connect` needs to know: the port, and a secret that keeps others out."""
        return self._server.getsockname()[1], self._token

    def accept(self) -> None:
        """Let in who has come."""
        try:
            while True:
                self._strangers.append(Channel(self._server.accept()[0]))
        except BlockingIOError:
            pass
        for channel in self._strangers:
            for message in channel.receive(most=1):
                if message.get("token") == self._token:
                    self.channels[int(message["rank"])] = channel
        known = set(map(id, self.channels.values()))
        self._strangers = [channel for channel in self._strangers if channel.open and id(channel) not in known]

    def expect(self, others: int) -> None:
        """Return when so many have introduced themselves.

        Raises:
            PipelineError: some have not in a minute.
        """
        patience = time.monotonic() + _CONNECT_SECONDS
        while len(self.channels) < others:
            if time.monotonic() > patience:
                raise PipelineError(
                    f"{others - len(self.channels)} of {others} other processes did not reach rank 0 at port "
                    f"{self.invitation[0]} in {_CONNECT_SECONDS:.0f} s; the hosts of a run have to let each other in "
                    "on all ports"
                )
            time.sleep(_LOOK_SECONDS)
            self.accept()

    def close(self) -> None:
        """Let nobody in any more."""
        self._server.close()
        for channel in self._strangers:
            channel.close()


def connect(address: str, invitation: tuple[int, str], rank: int) -> Channel:
    """Another process's connection to rank 0.

    Raises:
        PipelineError: rank 0 cannot be reached there.
    """
    port, token = invitation
    try:
        channel = Channel(socket.create_connection((address, port), timeout=_CONNECT_SECONDS))
    except OSError as error:
        raise PipelineError(
            f"rank 0 cannot be reached at {address}:{port} ({error}); the hosts of a run have to let each other in on "
            "all ports"
        ) from None
    channel.send({"rank": rank, "token": token})
    return channel
