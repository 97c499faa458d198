"""Where a result was made: versions, machine, toolchain, git commit. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

PACKAGES = ("torch", "torchvision", "open_clip_torch", "onnx", "onnxruntime", "numpy", "pillow", "ftfy")
RUNNERS = ("aclruntime", "pytest", "pytest-benchmark", "scipy")
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-cann", "onnxruntime-openvino")  # all provide one module
CUDA_PACKAGES = re.compile(r"(nvidia[-_]|cuda[-_]|triton$)")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def version(package: str) -> Optional[str]:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class TorchBuild(NamedTuple):
    """Which torch is installed: its version, the CUDA version it was built for ("" for a CPU build), and CUDA's size.

    `cuda_bytes` is the size of the installed CUDA packages, which a CPU build does not need.
    """

    version: str
    cuda: str
    cuda_bytes: int


def torch_build() -> Optional[TorchBuild]:
    """The installed torch, read from its files without importing it; None if there is none."""
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    try:
        text = Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= '(.*)'$", text, re.MULTILINE))
    cuda = found.get("cuda", "")
    sizes = [_size(one) for one in metadata.distributions() if CUDA_PACKAGES.match(one.metadata["Name"] or "")]
    return TorchBuild(found.get("__version__", torch.version), cuda, sum(sizes) if cuda else 0)


def _size(package: metadata.Distribution) -> int:
    return sum(file.size or 0 for file in package.files or ())


def onnxruntimes() -> List[str]:
    """Installed distributions of onnxruntime, e.g. `onnxruntime-gpu 1.20.1`; two overwrite each other's files."""
    return [f"{name} {found}" for name in ONNXRUNTIMES if (found := version(name))]


def library_versions() -> Dict[str, str]:
    """Versions that artifacts depend on, for their keys."""
    return {name: version(name) or "absent" for name in PACKAGES}


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def release_memory() -> None:
    """Give unused memory back to the system; glibc keeps it once large blocks were freed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def threads_running() -> int:
    """Threads of this process; 0 if unknown."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0


def describe() -> Dict[str, Any]:
    """What a report states about the machine."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in (*PACKAGES, *RUNNERS) if (found := version(name))},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": git_commit(Path(__file__).parent),
    }


def git_commit(folder: Path) -> Optional[str]:
    """Commit of the checkout that contains a folder, with `+` if it has changes; None outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
