"""Everything that clipval raises on purpose, by who must act.

ClipvalError
  UsageError          the command or its options are wrong              -> fix the command
  InputError          a file or a value in it is wrong or missing       -> fix the input
  BackendUnavailable  a runtime, provider or device cannot be used      -> fix the machine
  ToolFailed          an outside program (atc, npu-smi) did not succeed -> read its log

Each message is one line for a person: where, what was found, what was expected, what to do.
"""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"


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


def lfs_pointer(file: Path) -> str:
    """What to say of a file that is git-lfs' pointer to another one; "" for any other file and for none."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(512)
    except OSError:
        return ""
    if not head.startswith(LFS):
        return ""
    size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
    held = f" of {int(size[1]) / 1e6:.0f} MB" if size else ""
    return f"a git-lfs pointer to a file{held}, not the file itself. Run 'git lfs pull' in its repository"


def disk_full(error: OSError) -> bool:
    """The disk, or the quota on it; numpy's own "requested and written" has no number, and is a short write."""
    short_write = error.errno is None and "requested and" in str(error)
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or short_write


def os_cause(error: OSError) -> str:
    """What happened and what to do, by the system's own number; an error without one is no file's.

    Connections, proxies and hubs raise OSErrors too, as `requests` and `urllib` do.
    """
    where = error.filename or "a file"
    if disk_full(error):
        return f"{where}: disk full; free some space or write to another place"
    if isinstance(error, (ConnectionError, socket.timeout, socket.gaierror)) or error.errno is None:
        return f"{one_line(error)}; what it needed cannot be reached"
    what = error.strerror or one_line(error)
    return f"{where}: {what}; {_ADVICE.get(error.errno, 'check it')}"


_ADVICE = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file is where a folder must be; check the path",
    errno.EEXIST: "it is there already, as something else; check the path",
    errno.EISDIR: "it is a folder; give a file",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "its file system cannot be written; give another place",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EIO: "its disk or network share fails",
}
