"""The two kinds of error the command line turns into one sentence and an exit code."""

from __future__ import annotations


class PipelineError(Exception):
    """A run failed although it was asked for correctly; the message says what and what to do (exit code 1)."""

    exit_code = 1


class UserError(PipelineError):
    """The request itself is wrong: a config key, a path, a missing upstream stage (exit code 2)."""

    exit_code = 2
