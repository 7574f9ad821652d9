"""Runs one function in a process of its own, which dies with its parent, and tells how it ended.

For work in native code that may be killed for want of memory: the parent lives to say so.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ChildDiedError(Exception):
    """The child ended without an answer; `exit_code` is negative where a signal killed it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}")
        self.exit_code = exit_code


def run_in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a module-level function in a fresh process and return what it returns or raise what it raises.

    Raises:
        ChildDiedError: the process ended before that.
    """
    context = multiprocessing.get_context("spawn")
    answer, sender = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(sender, function, args, kwargs), daemon=True)
    child.start()
    sender.close()
    try:
        value, error = answer.recv()
    except EOFError:
        child.join()
        raise ChildDiedError(child.exitcode or 0) from None
    finally:
        child.kill()
        child.join()
        answer.close()
    if error is not None:
        raise error
    return value


def _serve(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    outcome: tuple[Any, Exception | None]
    try:
        outcome = function(*args, **kwargs), None
    except Exception as error:
        outcome = None, error
    sender.send(outcome)


def _die_with_parent() -> None:
    """End this process as soon as its parent has ended, however that happened."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
