"""Error codes of atc -> one line of advice. Source: error_codes of the graph engine's (GE) user guide."""

from __future__ import annotations

import re
from typing import List

_TBE = (
    "its operator compiler cannot import a Python package; install decorator, attrs, psutil, numpy, scipy, sympy, "
    "cffi and the like for the python3 that atc runs (requirements-npu.txt), with a version that this CANN supports"
)
_KERNEL = (
    "this chip has no kernel for an operator or its dtype; check --soc-version, and that the ops package is installed"
)
_PARSER = "an operator has no ONNX parser in this CANN; export with an older opset (11 to 18), or install a newer CANN"
_INNER = "an internal error; read the lines above it in the log, and try a newer CANN and driver"
_FILE = "a file or folder cannot be found or read; check paths, rights and free space"

ADVICE = {
    "E10001": "a flag has a value that this atc does not accept; check --soc-version, --precision-mode and --atc-flags",
    "E10002": "--input_shape cannot be read; the tower's input name and row shape must be right",
    "E10005": "a flag takes only true or false; check --atc-flags",
    "E10007": "a required flag is missing; check --atc-flags and the version of CANN",
    "E10016": "the input name is not in the ONNX file; export it again, its input must be `image` or `text`",
    "E10041": "the ONNX file cannot be loaded; it is damaged or not an ONNX file, export it again",
    "E10049": "the input has another number of dimensions than the ONNX file says; export it again",
    "E10054": "a required value is empty, usually because of missing quotes; check --atc-flags",
    "E10501": "an operator is not registered, usually because ASCEND_OPP_PATH is not set; source set_env.sh",
    "E13001": _FILE,
    "E13003": _FILE,
    "E13005": _FILE,
    "E16001": "the graph has no input or output node; export the ONNX file again",
    "E16002": _PARSER,
    "E19010": _PARSER,
    "E16005": "the ONNX file names several opset versions; export it again with one",
    "EZ3002": _KERNEL,
    "EZ3003": _KERNEL,
    "E40000": _TBE,
    "E40021": _TBE,
    "E19999": _INNER,
    "EZ9999": _INNER,
    "E39999": _INNER,
}
INNER = ("E19999", "EZ9999", "E39999")  # they accompany the code of the cause
_CODE = re.compile(r"\b(?:E[0-9]{5}|E[A-Z][0-9]{4})\b")
_MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
_MISSING_PACKAGE = re.compile(r"No module named '?([\w.]+)")


def advice(log: str, how_to_source: str) -> str:
    """Why atc failed and what to do, from its output; one clause, with atc's own words.

    Args:
        how_to_source: the command that puts CANN into the environment.
    """
    library = _MISSING_LIBRARY.search(log)
    if library and library.group(1).startswith("libascend_hal"):
        return (
            "libascend_hal.so is missing: this host has no driver; add <toolkit>/<arch>-linux/devlib to "
            "LD_LIBRARY_PATH to compile without an NPU"
        )
    if library:
        return f"{library.group(1)} is not found; {how_to_source}"
    if "command not found" in log:
        return f"a command is not found ({_line(log, 'command not found')}); {how_to_source}"
    codes = list(dict.fromkeys(_CODE.findall(log)))
    causes = [code for code in codes if code not in INNER] or codes
    told = [code for code in causes if code in ADVICE]
    package = _MISSING_PACKAGE.search(log)
    if package and (not told or told[0] in (*INNER, "E40000", "E40021")):
        code = f"{told[0]}: " if told else ""
        missing = f"no Python package {package.group(1)!r} for the python3 that atc runs"
        return f"{code}{missing}; {how_to_source}, or pip install it"
    if told:
        return f"{told[0]}: {ADVICE[told[0]]} ({_line(log, told[0])})"
    if causes:
        return f"{causes[0]} ({_line(log, causes[0])}); look it up in the CANN error code reference"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"no error code in its output (last line: {lines[-1][:200] if lines else 'none'}); run it by hand"


def notes(log: str) -> List[str]:
    """Warnings of a successful run that the user should know."""
    if "W11001" in log:
        return ["W11001: an operator runs on the AICPU (usually because of int64); this costs speed, not accuracy"]
    return []


def _line(log: str, word: str) -> str:
    line = next(line for line in log.splitlines() if word in line)
    return " ".join(line.split())[:200]
