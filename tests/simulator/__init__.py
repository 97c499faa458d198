"""The simulated NPU host; see README.md beside this file."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Any, Dict

FOLDER = Path(__file__).parent
BIN = FOLDER / "bin"
LIB = FOLDER / "lib"
TOOLKIT = FOLDER / "toolkit" / "latest"
PREFIX = "CLIPVAL_SIM_"
MODULES = ("aclruntime", "acl", "simulated_binding", "simulated_acl")
GENERATIONS = ("A", "B-early", "B", "C")  # of aclruntime


def environment(**switches: Any) -> Dict[str, str]:
    """Variables that put the simulated host into effect; update a process's environment with them.

    Args:
        switches: `chip="310P3"`, `fault="busy"`, ...: each becomes `CLIPVAL_SIM_<NAME>`; see README.md.
    """
    # The scripts run `env python3`, which must be the Python that has onnx and onnxruntime.
    python = str(Path(sys.executable).parent)
    found = {
        "PATH": os.pathsep.join([str(BIN), python, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(LIB), os.environ.get("PYTHONPATH", "")])),
        "ASCEND_TOOLKIT_HOME": str(TOOLKIT),
        "ASCEND_HOME_PATH": str(TOOLKIT),
        "ASCEND_OPP_PATH": str(TOOLKIT / "opp"),
    }
    return {**found, **{PREFIX + name.upper(): str(value) for name, value in switches.items()}}


def forget() -> None:
    """Drop the simulated runtime, so that the next import is that of a fresh process with the switches of then."""
    for former in filter(None, map(sys.modules.get, ("aclruntime", "acl"))):
        atexit.unregister(former._static_destructors)
    for name in MODULES:
        sys.modules.pop(name, None)
