"""The ACL runtime under aclruntime: importing it, its words on file descriptor 1, its error codes, its dtypes.

The only module that imports aclruntime, and only when asked to. Source: aclruntime of Ascend/tools and of
ais_bench, `backend/src`; aclError of the ACL headers.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, List, Tuple

from clipval.ascend import atc
from clipval.errors import BackendUnavailable

# ACL data type ids, as tensor_desc.datatype counts them.
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
ADVICE = {
    "100000": "an argument is not valid",
    "100001": "ACL is not initialised, or was finalised already; one process uses it once, start a new one",
    "100002": "ACL was initialised twice; do not use torch_npu or pyACL in the same process",
    "107001": "there is no such device id; see `npu-smi info -m` and ASCEND_RT_VISIBLE_DEVICES",
    "107002": "no ACL context in this thread; use a backend in the thread that opened it",
    "148049": "the operator path is wrong; source set_env.sh, so that ASCEND_OPP_PATH is set",
    "200000": "the device has no memory left; free it, or use a smaller batch size",
    "500002": "the graph engine failed; was the OM compiled for this chip, by a CANN not newer than this host's?",
    "507011": "the model failed while running; was the OM compiled for this chip? See the log in ~/ascend/log",
    "507018": "an operator on the AICPU failed; see the log in ~/ascend/log",
    "507033": "the device cannot be opened; driver and firmware do not match, or the container lacks the device",
}
# Pythons that the wheels of aclruntime 0.0.2 were made for, first and last
WHEELS = ((3, 7), (3, 12))
# Codes that speak of the file, not of the machine.
MODEL_CODES = ("500002",)


def load_runtime() -> Any:
    """The aclruntime module.

    Raises:
        BackendUnavailable: it does not import, with the loader's words; or another ACL user is in this process.
    """
    for other in ("torch_npu", "acl"):
        if other in sys.modules:
            raise BackendUnavailable(
                f"om backend: {other} is loaded in this process, and ACL serves one user; run clipval without it"
            )
    try:
        return importlib.import_module("aclruntime")
    except ImportError as error:
        raise BackendUnavailable(f"om backend: aclruntime does not import: {error}; {_import_advice(error)}") from error


def _import_advice(error: ImportError) -> str:
    if getattr(error, "name", None) == "aclruntime" and isinstance(error, ModuleNotFoundError):
        return wheel_advice()
    if ".so" in str(error):
        return atc.how_to_source()
    return "install the wheel made for this Python and machine (requirements-npu.txt)"


def wheel_advice(python: Tuple[int, int] = sys.version_info[:2]) -> str:
    """Where aclruntime comes from, for a version of Python; where it has no wheel, what does the same."""
    if WHEELS[0] <= python <= WHEELS[1]:
        return "install its wheel (not on PyPI, see requirements-npu.txt)"
    first, last, asked = (".".join(map(str, version)) for version in (*WHEELS, python))
    return (
        f"it has wheels for Python {first} to {last}, none for {asked}: use one of these, build it from its source "
        "(requirements-npu.txt), or run OM files with pyACL, which comes with CANN"
    )


def runtime_version(runtime: Any) -> str:
    """`aclruntime 0.0.2`, by the installed distribution, else by the module's own word."""
    try:
        found = importlib.metadata.version("aclruntime")
    except importlib.metadata.PackageNotFoundError:
        found = str(getattr(runtime, "__version__", "of unknown version"))
    return f"aclruntime {found}"


def stack_version(runtime: Any, root: Path = Path("/")) -> str:
    """Versions of aclruntime, CANN and driver in one line."""
    driver = driver_version(root) or "unknown"
    return f"{runtime_version(runtime)}, CANN {atc.version(root)}, driver {driver}"


def driver_version(root: Path = Path("/")) -> str:
    """Version of the NPU driver from its version.info; empty where there is none."""
    return atc.read_value(root / "usr/local/Ascend/driver/version.info", "Version")


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
    """What to do about an error of ACL, by the codes in its words; empty where it names none that is known."""
    for code in re.findall(r"(?<!\d)\d{6}(?!\d)", text):
        if code in ADVICE:
            return ADVICE[code]
    return ""


class Captured:
    """What was written to file descriptor 1; `text` is filled when the capture ends."""

    text = ""

    def errors(self) -> str:
        """The lines that tell of an error, else the last ones; one line for a message."""
        lines = [" ".join(line.split()) for line in self.text.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"error|fail|\bE[A-Z0-9]\d{4}\b", line, re.IGNORECASE)]
        return "; ".join(_unique(telling or lines[-3:]))[:500]


def _unique(lines: List[str]) -> List[str]:
    return list(dict.fromkeys(lines))


@contextmanager
def captured_stdout() -> Iterator[Captured]:
    """Keep what C++ code prints on file descriptor 1, where aclruntime tells why a model does not load.

    Redirecting `sys.stdout` would miss it. On success everything is written again to where it would have gone.
    """
    captured = Captured()
    with tempfile.TemporaryFile() as file:
        saved = _redirect(file.fileno())
        try:
            yield captured
        except BaseException:
            _restore(saved)
            captured.text = _read(file)
            raise
        _restore(saved)
        captured.text = _read(file)
    if saved >= 0 and captured.text:
        os.write(1, captured.text.encode("utf-8", "replace"))


def _redirect(target: int) -> int:
    """Descriptor that keeps the old stdout; -1 where there is none, as in a daemon."""
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


def _flush() -> None:
    """Empty Python's and C's buffers: C's printf keeps text back as soon as stdout is a file."""
    with suppress(AttributeError, OSError, ValueError):  # no stdout, or a closed one
        sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)


def _read(file: Any) -> str:
    file.seek(0)
    text: str = file.read().decode("utf-8", "replace")
    return text
