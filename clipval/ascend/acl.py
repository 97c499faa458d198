"""Common to all users of ACL in this process: its owner, its messages on file descriptor 1, its codes and dtypes.

Source: aclError of the public ACL headers and documents (CANN 8 and 9), and what the public aclruntime prints.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

from clipval.ascend import cann, process
from clipval.errors import BackendUnavailable, one_line

# ACL data type ids, as in tensor_desc.datatype.
DTYPES = {
    0: "float32",
    1: "float16",
    2: "int8",
    3: "int32",
    4: "uint8",
    6: "int16",
    7: "uint16",
    8: "uint32",
    9: "int64",
    10: "uint64",
    11: "float64",
    12: "bool",
}
MEMORY = (
    "the device has no memory left; `npu-smi info` shows who uses it. Free it, use another --device-id or smaller "
    "--batch-sizes"
)
HDC = (
    "the driver's channel to the device cannot be opened; in a container pass /dev/davinci_manager, /dev/devmm_svm and "
    "/dev/hisi_hdc, else restart the driver"
)
# Words that are more specific than the code next to them, which may be from a higher layer.
WORDS = (
    (re.compile(r"EL0004|failed to allocate memory|out of memory", re.IGNORECASE), MEMORY),
    (re.compile(r"\bHDC\b", re.IGNORECASE), HDC),
    (re.compile(r"device id is out of range"), "there is no such device id; see `npu-smi info -m`"),
)
ADVICE = {
    "100000": "an argument is not valid",
    "100001": "ACL is not initialised, or already finalised; a process can use it only once, start a new one",
    "100002": "ACL was initialised twice; do not use torch_npu or pyACL in the same process",
    "107001": "there is no such device id; see `npu-smi info -m` and ASCEND_RT_VISIBLE_DEVICES",
    "107002": "no ACL context in this thread; use a backend in the thread that opened it",
    "145021": MEMORY,
    "148049": "the operator path is wrong; source set_env.sh, so that ASCEND_OPP_PATH is set",
    "200000": MEMORY,
    "207001": MEMORY,
    "245000": MEMORY,
    "500002": "the graph engine failed; was the OM compiled for this chip, by a CANN not newer than this host's?",
    "507011": "the model failed while running; was the OM compiled for this chip? See the log in ~/ascend/log",
    "507018": "an operator on the AICPU failed; see the log in ~/ascend/log",
    "507033": "the device cannot be opened; driver and firmware do not match, or the container lacks the device",
    "507899": "the driver failed; see the log in ~/ascend/log and dmesg, and restart the driver",
}
# Codes about the file, not the machine.
MODEL_CODES = ("500002",)
STAMP = re.compile(r"\[PID: \d+\] [\d.:-]+ ")

_owner: Optional[int] = None  # the process that initialised ACL


class Node(NamedTuple):
    """An input or output of a model.

    Attributes:
        size: bytes that the runtime expects.
    """

    name: str
    dtype: str
    shape: Tuple[int, ...]
    size: int


class Failed(Exception):
    """A call of the runtime failed.

    Attributes:
        words: its whole output, of which the message is an excerpt.
    """

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(message)
        self.words = words or message


def begin(finalize: Callable[[], None], natives: Callable[[], List[object]]) -> None:
    """Record that this process is about to initialise ACL; only the first call counts.

    Args:
        finalize: called once, at this process's exit; never in a forked child.
        natives: returns the objects whose destructors call ACL. A forked child has no device, and ACL calls there hang
            or crash, so it runs neither these destructors nor those of the C++ libraries at its exit.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
        atexit.register(_at_exit, finalize)
        os.register_at_fork(after_in_child=lambda: _spare(natives()))


def mine() -> bool:
    """Whether ACL belongs to this process."""
    return _owner == os.getpid()


def refuse_fork() -> None:
    """Raises: BackendUnavailable: this process was forked from one that uses ACL."""
    if _owner not in (None, os.getpid()):
        raise BackendUnavailable(
            f"om backend: process {os.getpid()} was forked from {_owner}, which uses ACL; start workers with spawn"
        )


def refuse_others(*modules: str) -> None:
    """Claim ACL for the om backend. Raises: BackendUnavailable: another user of ACL is in this process."""
    process.claim("om backend", *(name for name in process.MODULES if name not in modules))


def _at_exit(finalize: Callable[[], None]) -> None:
    if mine():
        finalize()


def _spare(natives: List[object]) -> None:
    """In a forked child: run no ACL destructors. It exits through `_exit` with the same status."""
    for native in natives:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))
    library = ctypes.CDLL(None)
    with suppress(AttributeError):  # on_exit is glibc's, which CANN needs
        library.on_exit(library._exit, None)


def stack_version(runtime: str, root: Path = Path("/")) -> str:
    """Versions of the runtime (`aclruntime 0.0.2`), CANN and driver in one line."""
    driver = driver_version(root) or "unknown"
    return f"{runtime}, CANN {cann.version(root)}, driver {driver}"


def driver_version(root: Path = Path("/")) -> str:
    """Version of the NPU driver from its version.info; empty if there is none."""
    return cann.read_value(root / "usr/local/Ascend/driver/version.info", "Version")


def dtype_name(value: Any) -> str:
    """numpy's name for a data type of aclruntime: an enum that prints as `dtype.float32`, or a plain id."""
    word = str(value).rsplit(".", 1)[-1].lower()
    aliases = {"double": "float64", "float": "float32", "bool_": "bool"}
    word = aliases.get(word, word)
    if word in DTYPES.values():
        return word
    try:
        return DTYPES.get(int(value), f"unknown type {value}")
    except (TypeError, ValueError):
        return f"unknown type {value}"


def advice(text: str) -> str:
    """What to do about an ACL error, by its words and codes; empty if none of them is known."""
    for pattern, found in WORDS:
        if pattern.search(text):
            return found
    for code in re.findall(r"(?<!\d)\d{6}(?!\d)", text):
        if code in ADVICE:
            return ADVICE[code]
    return ""


def failure(said: str, words: str) -> Failed:
    """A failed call: what it returned or raised, and what the runtime wrote."""
    captured = Captured()
    captured.text = words
    message = "; ".join(part for part in (captured.errors(), said) if part)
    return Failed(message, f"{words}\n{said}")


class Captured:
    """Output on file descriptor 1; `text` is set when the capture ends."""

    text = ""

    def errors(self) -> str:
        """The error lines, else the last ones, on one line."""
        lines = [" ".join(STAMP.sub("", line).split()) for line in self.text.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"error|fail|\bE[A-Z0-9]\d{4}\b", line, re.IGNORECASE)]
        return "; ".join(dict.fromkeys(telling or lines[-3:]))[:500]

    def pass_on(self) -> None:
        """Write everything but errors and progress lines to file descriptor 2."""
        lines = [line for line in self.text.splitlines() if not re.match(r"\[(info|debug)\]|\s*$", line, re.IGNORECASE)]
        if lines:
            os.write(2, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


@contextmanager
def telling() -> Iterator[None]:
    """Run calls of the runtime; if one fails, include what it wrote to file descriptor 1.

    The reason is there: its exceptions only report a general failure (`[-1]`) or an invalid parameter (`[1]`).

    Raises:
        Failed: a call raised.
    """
    words = Captured()
    try:
        with captured() as words:
            yield
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        # without its frames, which would keep device tensors alive
        raise failure(one_line(error, 300), words.text) from error.with_traceback(None)
    words.pass_on()


@contextmanager
def captured() -> Iterator[Captured]:
    """Capture what C++ code prints on file descriptor 1, which is C's stdio, not `sys.stdout`.

    Costs some 10 microseconds.
    """
    words = Captured()
    file = _scratch(os.getpid())
    saved = _redirect(file)
    try:
        yield words
    finally:
        _restore(saved)
        size = os.fstat(file).st_size
        if size:
            words.text = os.pread(file, size, 0).decode("utf-8", "replace")
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)


@functools.lru_cache(maxsize=1)
def _scratch(pid: int) -> int:
    """Descriptor of this process's unnamed file, whose offset a forked child must not share."""
    descriptor, name = tempfile.mkstemp(prefix="clipval-acl-")
    os.unlink(name)
    return descriptor


def _redirect(target: int) -> int:
    """Descriptor of the previous stdout; -1 if there is none, e.g. in a daemon."""
    _flush()
    try:
        saved = os.dup(1)
    except OSError:
        return -1
    os.dup2(target, 1)
    return saved


def _restore(saved: int) -> None:
    if saved >= 0:
        _flush()
        os.dup2(saved, 1)
        os.close(saved)


@functools.lru_cache(maxsize=1)
def _stdio() -> Any:
    return ctypes.CDLL(None)


def _flush() -> None:
    """Flush Python's and C's buffers: C's printf buffers text when stdout is a file."""
    with suppress(AttributeError, OSError, ValueError):  # no stdout, or a closed one
        sys.stdout.flush()
    _stdio().fflush(None)
