"""What ends a run: the first error of any of its processes, as one sentence that all of them say.

An error of gloo or NCCL is only ever the echo of another process's end, and never that sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import distributed as dist

from model.launch import report_failure
from model.place import Place
from pipeline.errors import PipelineError, UserError


@dataclass(frozen=True)
class Failure:
    """Why the run ends, and the rank that found out."""

    rank: int
    sentence: str
    code: int

    def report(self, place: Place) -> None:
        """Say it once a machine, and where it happened."""
        if place.local_rank == 0 or place.rank == self.rank:
            report_failure(self.sentence, self.code)


class PeerError(PipelineError):
    """Another process has failed, or cannot be reached."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.sentence)
        self.failure = failure


class CommonError(PipelineError):
    """An error that all processes find together, so that none of them is where it happened."""


def failure_of(error: BaseException, place: Place) -> Failure:
    """The sentence and exit code of an error; which process it was is said where others may have fared otherwise."""
    if isinstance(error, PeerError):
        return error.failure
    if isinstance(error, CommonError):
        return Failure(0, str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure(place.rank, "interrupted", 130)
    if isinstance(error, PipelineError):
        sentence, code = str(error), error.exit_code
    else:
        sentence, code = f"{type(error).__name__}: {error}", PipelineError.exit_code
    if place.size > 1 and not isinstance(error, UserError):
        sentence = f"{place.label}: {sentence}"
    return Failure(place.rank, sentence, code)


def is_lost_connection(error: BaseException) -> bool:
    """Whether gloo, NCCL or torch's store failed, which they do when another process ends."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )
