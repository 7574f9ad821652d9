"""The processes of a run watch each other: what each is doing, which one is behind, and one sentence when one fails.

A thread of every process sends its state to rank 0 every two seconds and hears rank 0's (`model.lifeline`). So

1. an error on one rank reaches all others at once, and what they end with is its sentence, not the lost connection;
2. a process that was killed, or whose host is gone, is noticed by its closed connection;
3. a run in which no step ends for too long is ended, naming the rank that is behind;
4. `heartbeats.json` in the stage's directory says how far everybody is, for `mdeberta status`.

A process whose main thread hangs in a collective is ended by this thread. Intervals are measured inside a process by
its monotonic clock; the time during which a process was itself stopped does not count. Cost: 0.2 kB a rank every 2 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from model.failure import Failure, PeerError, failure_of, is_lost_connection
from model.lifeline import Channel, Hub, connect
from model.place import Place
from model.world import World
from pipeline.errors import PipelineError
from pipeline.progress import duration
from pipeline.storage import Folder

HEARTBEATS_FILE = "heartbeats.json"
_TICK_SECONDS = 0.5
_START_TICK_SECONDS = 0.05  # until rank 0 has let the others begin, for which they wait
_SEND_SECONDS = 2.0
_SILENT_SECONDS = 3 * _SEND_SECONDS
_NEWS_SECONDS = 10.0
_RATE_LOOKS = 7  # the steps per second are those of the last minute
_GRACE_SECONDS = 3.0  # for the main thread to find the same error
_CLEANING_SECONDS = 10.0  # for a main thread that has found it to clean up
_PATIENCE_SECONDS = 10.0  # for the news of why a connection broke
_NAMED = 4
_AGAIN = "run the same command again, it continues from the last checkpoint"


@dataclass(frozen=True)
class State:
    """What a process says of itself."""

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = "start"
    busy_seconds: float = 0.0
    """How long it computed in its last steps without waiting for others."""
    beats: int = 0

    @property
    def name(self) -> str:
        """The process for people."""
        return f"rank {self.rank} on {self.host}"


class Heartbeats:
    """The watch of one process over itself and the others; as a context it lasts from joining to leaving them.

    Leaving by an error tells it to all others. Leaving by an error of gloo or NCCL waits for the news of what broke the
    connection, and raises that.

    Args:
        world: the processes; all of them have to come here together.
        place: this one's place.
        stall_seconds: the run is ended when so long passes after a beat without another one.

    Raises:
        PeerError: another process failed first, or this one has lost the others.
    """

    def __init__(self, world: World, place: Place, stall_seconds: float) -> None:
        self._place = place
        self._mine = State(place.rank, socket.gethostname(), os.getpid())
        self._states = {rank: State(rank, "an unknown host", 0) for rank in range(place.size)}
        self._silence = dict.fromkeys(range(place.size), 0.0)
        """Seconds since each was last heard."""
        self._left: set[int] = set()
        self._failure: Failure | None = None
        self._failing = threading.Lock()
        self._grace_seconds = _GRACE_SECONDS
        self._failed, self._released, self._over = threading.Event(), threading.Event(), threading.Event()
        self._hub = Hub(place.address in {"127.0.0.1", "localhost"}) if world.is_first else None
        self._channels: dict[int, Channel] = self._hub.channels if self._hub else {}
        invitation = world.share(self._hub.invitation if self._hub else (0, ""))
        if self._hub:
            # Rank 0 may have nothing to do and leave at once: not before all others can hear that.
            self._hub.expect(place.size - 1)
        else:
            self._channels[0] = connect(place.address, invitation, place.rank)
        # Rank 0 knows most, so it speaks first.
        self._stall_seconds = stall_seconds if self._hub else stall_seconds + 2 * _SEND_SECONDS
        self._thread = threading.Thread(target=self._watch, name="heartbeats", daemon=True)

    def beat(self, step: int, phase: str, busy_seconds: float) -> None:
        """Note what this process does now; all processes have to beat at the same places of the program.

        Args:
            step: the step it is at.
            phase: the part of the work that begins, one word.
            busy_seconds: how long it computed in its last steps, waiting for others left out.
        """
        last = self._mine
        self._mine = replace(last, step=step, phase=phase, busy_seconds=busy_seconds, beats=last.beats + 1)

    def release(self) -> None:
        """Let the others return from `wait_for_first`; only rank 0 calls it."""
        self._released.set()

    def wait_for_first(self) -> None:
        """Return when rank 0 has called `release`, however long that takes.

        Raises:
            PeerError: a process failed meanwhile.
        """
        while not self._released.wait(_TICK_SECONDS):
            if self._failure:
                raise PeerError(self._failure)

    @contextlib.contextmanager
    def shown_in(self, folder: Folder) -> Iterator[None]:
        """Have rank 0 keep `heartbeats.json` in a folder up to date meanwhile; only a run that ends well removes it."""
        if not self._hub:
            yield
            return
        over = threading.Event()
        writer = threading.Thread(target=self._show, args=(folder, over), name="heartbeats.json", daemon=True)
        writer.start()
        try:
            yield
        finally:
            over.set()
            writer.join(_PATIENCE_SECONDS)
        folder.remove(HEARTBEATS_FILE)

    def __enter__(self) -> Heartbeats:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error:
            self.tell(error)
        self._over.set()
        self._thread.join(_PATIENCE_SECONDS)
        if error and is_lost_connection(error) and self._failure:
            raise PeerError(self._failure) from None

    def tell(self, error: BaseException) -> None:
        """Let the others know at once of the error that is going to end this process, which may still clean up.

        A stop that all have agreed on is none.
        """
        if isinstance(error, SystemExit):
            return
        # A launcher that is ending everybody must not keep this process from saying why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._grace_seconds = _CLEANING_SECONDS
        if is_lost_connection(error):
            self._failed.wait(_PATIENCE_SECONDS)
            self._fail(self._lost_connection(error))
        else:
            self._fail(failure_of(error, self._place))

    def _fail(self, failure: Failure) -> None:
        """End the run with this failure, unless there was one before."""
        with self._failing:
            self._failure = self._failure or failure
        self._failed.set()

    def _watch(self) -> None:
        """The thread: hear, look, say, and end the process if the main thread does not."""
        last, beats, idle, unsaid, failing = time.monotonic(), 0, 0.0, _SEND_SECONDS, 0.0
        released = False
        while not self._over.wait(_TICK_SECONDS if released else _START_TICK_SECONDS):
            now = time.monotonic()
            passed, last = min(now - last, 2 * _TICK_SECONDS), now  # more than that, and this process was stopped
            self._listen(passed)
            idle = idle + passed if beats and self._mine.beats == beats else 0.0
            beats = self._mine.beats
            if idle > self._stall_seconds:
                self._fail(Failure(self._place.rank, self._stalled(), PipelineError.exit_code))
            unsaid += passed
            if unsaid >= _SEND_SECONDS or self._failure or released != self._released.is_set():
                released = self._released.is_set()
                self._say()
                unsaid = 0.0
            failing += passed if self._failure else 0.0
            if self._failure and failing > self._grace_seconds:
                # The main thread waits for a process that will never answer.
                self._failure.report(self._place)
                os._exit(self._failure.code)
        self._listen(0.0)
        self._say(leaving=True)
        for channel in self._channels.values():
            channel.close()
        if self._hub:
            self._hub.close()

    def _say(self, leaving: bool = False) -> None:
        """Tell the others what there is to know here."""
        message = {
            "state": asdict(self._mine),
            "released": self._released.is_set(),
            "failure": asdict(self._failure) if self._failure else None,
            "leaving": leaving,
        }
        for channel in self._channels.values():
            channel.send(message)

    def _listen(self, passed: float) -> None:
        """Take in what has come since the last time, so many seconds ago."""
        if self._hub:
            self._hub.accept()
        for rank, channel in list(self._channels.items()):
            self._silence[rank] += passed
            for message in channel.receive():
                self._silence[rank] = 0.0
                self._hear(rank, message)
            if not channel.open:
                self._channels.pop(rank).close()
                if rank not in self._left:
                    self._fail(Failure(self._place.rank, self._lost(rank), PipelineError.exit_code))

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        self._states[rank] = State(**message["state"])
        if message["failure"]:
            self._fail(Failure(**message["failure"]))
        if message["released"]:
            self._released.set()
        if message["leaving"]:
            self._left.add(rank)

    def _lost(self, rank: int) -> str:
        state = self._states[rank]
        return (
            f"{state.name} ended without a word at step {state.step} in phase {state.phase}: it was killed, perhaps "
            f"because memory ran out, or its host cannot be reached any more; {_AGAIN}"
        )

    def _lost_connection(self, error: BaseException) -> Failure:
        reason = re.sub(r"^\[.*?\] *", "", str(error)).partition("\n")[0]
        mine = self._mine
        sentence = f"{mine.name} lost the others at step {mine.step} in phase {mine.phase} ({reason}); {_AGAIN}"
        return Failure(self._place.rank, sentence, PipelineError.exit_code)

    def _stalled(self) -> str:
        """Who keeps everybody waiting: who is not heard, or else who has done least."""
        mine = self._place.rank
        states = [state for state in ({**self._states, mine: self._mine}).values() if state.pid]
        unheard = [state for state in states if state.rank != mine and self._silence[state.rank] > _SILENT_SECONDS]
        least = min(state.beats for state in states)
        behind = unheard or [state for state in states if state.beats == least]
        others = [state for state in states if state not in behind]
        where = f"{_names(behind)} {'gave no sign of life any more, last ' if unheard else ''}at {_most_are(behind)}"
        if others:
            where += f", {_names(others) if len(others) == 1 else 'the others'} at {_most_are(others)}"
        return f"no step ended for {duration(self._stall_seconds)}: {where}; {_AGAIN}"

    def _show(self, folder: Folder, over: threading.Event) -> None:
        """The thread of `shown_in`."""
        looks: deque[tuple[float, int]] = deque(maxlen=_RATE_LOOKS)
        while True:
            if looks and self._mine.step < looks[-1][1]:
                looks.clear()  # the run went back to a checkpoint
            looks.append((time.monotonic(), self._mine.step))
            seconds, steps = looks[-1][0] - looks[0][0], looks[-1][1] - looks[0][1]
            states = {**self._states, self._place.rank: self._mine}
            news = {
                "time": round(time.time(), 3),
                "step": self._mine.step,
                "phase": self._mine.phase,
                "steps_per_second": round(steps / seconds, 4) if seconds else None,
                "ranks": [
                    {**asdict(state), "silent_seconds": round(self._silence[rank], 1)} for rank, state in states.items()
                ],
            }
            with contextlib.suppress(OSError):  # old news is harmless, and newer ones follow
                folder.write(HEARTBEATS_FILE, json.dumps(news).encode())
            if over.wait(_NEWS_SECONDS):
                return


def _names(states: list[State]) -> str:
    """Some processes; the first few by name."""
    more = f" and {len(states) - _NAMED} more" if len(states) > _NAMED else ""
    return ", ".join(state.name for state in states[:_NAMED]) + more


def _most_are(states: list[State]) -> str:
    (step, phase), _ = Counter((state.step, state.phase) for state in states).most_common(1)[0]
    return f"step {step} in phase {phase}"
