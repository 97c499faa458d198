"""The errors that clipval raises on purpose, by what has to be fixed.

ClipvalError
  UsageError          the command or its options are wrong              -> fix the command
  InputError          a file or a value in it is wrong or missing       -> fix the input
  BackendUnavailable  a runtime, provider or device cannot be used      -> fix the machine
  ToolFailed          an outside program (atc, npu-smi) did not succeed -> read its log

Each message is one line: where, what was found, what was expected, what to do.
"""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"


class ClipvalError(Exception):
    """Base of all errors that are shown without a traceback; `kind` is the class of failure in reports."""

    kind = "input"


class UsageError(ClipvalError):
    """The command line or an option is wrong."""

    kind = "usage"


class InputError(ClipvalError):
    """A data set, checkpoint, spec, array or artifact is missing or invalid."""


class BackendUnavailable(ClipvalError):
    """A backend that was asked for cannot run on this machine."""

    kind = "environment"


class ToolFailed(ClipvalError):
    """An outside program failed; the message names its log."""

    kind = "environment"


def one_line(error: BaseException, limit: int = 200) -> str:
    """A library's message on one line of at most `limit` characters; the error's class if it has no message."""
    text = " ".join(str(error).split())
    return f"{text[:limit]} ..." if len(text) > limit else text or type(error).__name__


def lfs_pointer(file: Path) -> str:
    """The message for a file that is a git-lfs pointer; "" for any other file, or if there is none."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(512)
    except OSError:
        return ""
    if not head.startswith(LFS):
        return ""
    size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
    held = f" of {int(size[1]) / 1e6:.3g} MB" if size else ""
    return f"a git-lfs pointer to a file{held}, not the file itself. Run 'git lfs pull' in its repository"


def disk_full(error: OSError) -> bool:
    """The disk or quota is full; numpy reports a short write ("requested and written") without an errno."""
    short_write = error.errno is None and "requested and" in str(error)
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or short_write


def os_cause(error: OSError) -> str:
    """What happened and what to do, by errno; an error without one is not about a file.

    `requests` and `urllib` raise OSErrors too, for connections, proxies and hubs.
    """
    where = error.filename or "the output or a file"
    if disk_full(error):
        return f"{where}: disk full; free some space or write to another place"
    if isinstance(error, (ConnectionError, socket.timeout, socket.gaierror)) or error.errno is None:
        return f"{one_line(error)}; the network or host cannot be reached"
    what = error.strerror or one_line(error)
    return f"{where}: {what}; {_ADVICE.get(error.errno, 'check it')}"


_ADVICE = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file is where a folder must be; check the path",
    errno.EEXIST: "it already exists and is something else; check the path",
    errno.EISDIR: "it is a folder, not a file; give a file",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "it cannot be written; give another place",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EFBIG: "the system limits the size of files; raise the limit (ulimit -f)",
    errno.EIO: "check the disk or network share",
}
