"""Everything that clipval raises on purpose, by who must act.

ClipvalError
  UsageError          the command or its options are wrong              -> fix the command
  InputError          a file or a value in it is wrong or missing       -> fix the input
  BackendUnavailable  a runtime, provider or device cannot be used      -> fix the machine
  ToolFailed          an outside program (atc, npu-smi) did not succeed -> read its log

Each message is one line for a person: where, what was found, what was expected, what to do.
"""

from __future__ import annotations


class ClipvalError(Exception):
    """Base of all errors for a person; `kind` names the class of failure in reports."""

    kind = "input"


class UsageError(ClipvalError):
    """The command line or an option is wrong."""

    kind = "usage"


class InputError(ClipvalError):
    """A data set, checkpoint, spec, array or artifact is missing or not what it must be."""


class BackendUnavailable(ClipvalError):
    """A backend that was asked for cannot run on this machine."""

    kind = "environment"


class ToolFailed(ClipvalError):
    """An outside program failed; the message names its log."""

    kind = "environment"


def one_line(error: BaseException, limit: int = 200) -> str:
    """A library's message on one line of at most `limit` characters; its class where it has no message."""
    text = " ".join(str(error).split())
    return f"{text[:limit]} ..." if len(text) > limit else text or type(error).__name__
