"""What a machine has and lacks, line by line: the CPU backends' packages and, if requested, an NPU host."""

from __future__ import annotations

import platform
import sys
from typing import List, Optional, Sequence

from clipval import environment, library
from clipval.ascend.host import Finding
from clipval.backends import BackendSettings, kind, names
from clipval.errors import ClipvalError

INSTALL = "pip install -r requirements.txt"


def check(backends: Optional[Sequence[str]], asked: BackendSettings) -> List[Finding]:
    """Findings in the order in which to fix them.

    Args:
        backends: those whose hosts are checked, e.g. an NPU host for `om`. None checks everything.
        asked: settings that a host is checked for: the device, what runs OM files.
    """
    supported = (3, 8) <= sys.version_info[:2] <= (3, 13)
    python = ".".join(map(str, sys.version_info[:3]))
    found = [Finding("python", supported, True, python, "use Python 3.8 to 3.13")]
    for package in (*environment.PACKAGES, "scipy"):
        if package == "onnxruntime":
            found.append(_onnxruntime())
            continue
        version = environment.version(package)
        found.append(Finding(package, version is not None, True, version or "not installed", INSTALL))
    found += [*_torch_build(), _open_clip()]
    for name in names() if backends is None else backends:
        found += kind(name).host(asked)
    return found


def _onnxruntime() -> Finding:
    found = environment.onnxruntimes()
    advice = INSTALL
    if len(found) > 1:
        advice = "they overwrite each other's files: uninstall all of them, then install the one that you need"
    return Finding("onnxruntime", len(found) == 1, True, ", ".join(found) or "not installed", advice)


def _torch_build() -> List[Finding]:
    build = environment.torch_build()
    if build is None:
        return []
    detail = f"{build.version}, for {'CUDA ' + build.cuda if build.cuda else 'CPU'} on {platform.machine()}"
    if build.cuda_bytes:
        detail += f"; without a GPU a CPU build frees {build.cuda_bytes / 1e9:.1f} GB (README, Environments)"
    return [Finding("torch build", True, False, detail, "")]


def _open_clip() -> Finding:
    try:
        library.import_open_clip()
    except ClipvalError as error:
        detail, _, advice = str(error).rpartition("; ")
        return Finding("open_clip", False, True, detail, advice)
    return Finding("open_clip", True, True, "imports", "")
