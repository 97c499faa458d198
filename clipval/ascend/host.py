"""What an NPU host has and lacks, line by line. Lines are independent: a missing piece hides no other one."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

from clipval import environment
from clipval.ascend import acl, aclruntime, cann, npu_smi, pyacl
from clipval.errors import ClipvalError

# Distribution with another module named `ais_bench`; source: setup.py of github.com/AISBench/benchmark.
LANGUAGE_EVALUATOR = "ais_bench_benchmark"
# Packages that CANN's operator compiler imports; without them atc fails with E40000 or E40021.
TBE_PACKAGES = ("decorator", "attr", "psutil", "numpy", "scipy", "sympy", "cffi")


class Finding(NamedTuple):
    """One line of the check.

    Attributes:
        name: of the piece.
        ok: it is present and usable.
        required: without it no OM can be compiled or run here.
        detail: what was found.
        advice: what to do; empty when ok.
    """

    name: str
    ok: bool
    required: bool
    detail: str
    advice: str


class _Missing(Exception):
    """A missing or unusable piece: what was found, and what to do."""


_Check = Callable[[int, Path], str]


def check_host(device_id: int = 0, root: Path = Path("/"), runtime: str = "aclruntime") -> List[Finding]:
    """Check every piece of an NPU host. Raises nothing.

    Args:
        device_id: ACL's device id of the NPU to check.
        root: the host's file system; programs and modules are always this process's.
        runtime: what is to run OM files, `aclruntime` or `pyacl`; the other one is not required.
    """
    checks = (*_TOOLKIT, *_RUNTIMES[runtime], *_DEVICE)
    return [_look(name, required, check, device_id, root) for name, required, check in checks]


def _look(name: str, required: bool, check: _Check, device_id: int, root: Path) -> Finding:
    try:
        return Finding(name, True, required, check(device_id, root), "")
    except _Missing as missing:
        return Finding(name, False, required, *missing.args)
    except ClipvalError as error:
        detail, _, advice = str(error).partition("; ")
        return Finding(name, False, required, detail, advice or "see the line above")
    except Exception as error:  # a broken piece must not hide the other lines
        return Finding(name, False, required, f"{type(error).__name__}: {error}", "repair or reinstall it")


def _driver(device_id: int, root: Path) -> str:
    file = root / "usr/local/Ascend/driver/version.info"
    version = acl.driver_version(root)
    if not version:
        raise _Missing(
            f"no version in {file}" if file.exists() else f"no {file}",
            "install the NPU driver and firmware; in a container mount /usr/local/Ascend/driver",
        )
    return version


def _device_files(device_id: int, root: Path) -> str:
    found = sorted(path.name for path in (root / "dev").glob("davinci[0-9]*"))
    advice = "load the driver; in a container pass it in with --device"
    if not found:
        raise _Missing(f"no {root / 'dev'}/davinci<N>", advice)
    if not (root / "dev" / "davinci_manager").exists():
        raise _Missing(f"{', '.join(found)}, but no {root / 'dev'}/davinci_manager", advice)
    locked = [name for name in found if not os.access(str(root / "dev" / name), os.R_OK | os.W_OK)]
    if len(locked) == len(found):
        raise _Missing(f"no permission to use {', '.join(locked)}", "add this user to the group HwHiAiUser")
    return ", ".join(found)


def _cann(device_id: int, root: Path) -> str:
    version = cann.version(root)
    if version == "unknown":
        folders = ", ".join(str(path) for path in cann.toolkit_folders(root))
        raise _Missing(f"no version file of CANN in {folders}", "install the CANN toolkit, 7.0.RC1 or newer")
    return version


def _operators(device_id: int, root: Path) -> str:
    found, toolkit = cann.operators(root), cann.version(root)
    if not found and cann.needs_operators(toolkit):
        raise _Missing(
            f"CANN {toolkit} has no operator package, without which atc cannot compile",
            "install the Ascend-cann-<chip>-ops package of the same version, or use OM files compiled on another host",
        )
    return found or "part of the toolkit"


def _set_env(device_id: int, root: Path) -> str:
    found = cann.set_env_files(root)
    where = str(found[0]) if found else "no set_env.sh in the usual places"
    homes = [os.environ.get(name, "") for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")]
    home = next((value for value in homes if value), "")
    if not home:
        source = f"source {found[0]}" if found else "install CANN, then source its set_env.sh"
        raise _Missing(f"{where}, not sourced", f"{source} in the shell that starts clipval")
    if not cann.under(root, Path(home)).is_dir():
        raise _Missing(f"sourced, but its folder {home} is gone", "source the set_env.sh of an installed CANN")
    if not os.environ.get("ASCEND_OPP_PATH"):
        raise _Missing(f"{where}, sourced in part: ASCEND_OPP_PATH is not set", "source set_env.sh again")
    return f"{where}, sourced ({home})"


def _atc(device_id: int, root: Path) -> str:
    program = shutil.which("atc")
    if program is None:
        raise _Missing("not found on PATH", cann.how_to_source(root))
    return program


def _tbe_packages(device_id: int, root: Path) -> str:
    missing = [name for name in TBE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise _Missing(f"this Python lacks {', '.join(missing)}", "pip install -r requirements-npu.txt")
    return "all there"


def _aclruntime(device_id: int, root: Path) -> str:
    return aclruntime.version(aclruntime.load())


def _aclruntime_beside(device_id: int, root: Path) -> str:
    spec = importlib.util.find_spec("aclruntime")
    return f"{spec.origin or 'there'}, not used" if spec else "not installed; --om-runtime pyacl does not need it"


def _pyacl(device_id: int, root: Path) -> str:
    return f"imports, {pyacl.load().__file__}"


def _pyacl_beside(device_id: int, root: Path) -> str:
    spec = importlib.util.find_spec("acl")
    if spec is None:
        raise _Missing("no module acl", "it comes with CANN and needs no wheel: source its set_env.sh")
    return f"{spec.origin or 'there'}, runs OM files too (--om-runtime pyacl), with any Python that CANN supports"


def _ais_bench(device_id: int, root: Path) -> str:
    """Two projects share this module name: the inference tool, and AISBench's evaluator of language models."""
    spec = importlib.util.find_spec("ais_bench")
    if spec is None:
        return "not installed; clipval does not need it"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    evaluator = environment.version(LANGUAGE_EVALUATOR)
    if evaluator or any((folder / "benchmark").is_dir() for folder in folders):
        also = (
            ", which has overwritten the inference tool"
            if any((folder / "infer").is_dir() for folder in folders)
            else ""
        )
        raise _Missing(
            f"this is {LANGUAGE_EVALUATOR} {evaluator or ''}".rstrip() + f", which evaluates language models{also}",
            f"keep {LANGUAGE_EVALUATOR} in a separate environment; the inference tool is the wheel ais_bench 0.0.2 "
            "(requirements-npu.txt)",
        )
    if not any((folder / "infer").is_dir() for folder in folders):
        where = ", ".join(map(str, folders)) or spec.origin
        advice = "install the wheel ais_bench 0.0.2 (requirements-npu.txt)"
        raise _Missing(f"a module of this name without the inference tool, in {where}", advice)
    return f"the inference tool, {environment.version('ais_bench') or 'of unknown version'}"


def _npu_smi(device_id: int, root: Path) -> str:
    return f"{npu_smi.version()} ({shutil.which('npu-smi')})"


def _chip(device_id: int, root: Path) -> str:
    npu = npu_smi.npu(device_id)
    detail = f"{npu.soc_version}, NPU {npu.npu_id} chip {npu.chip_id} is device {device_id}, health {npu.health}"
    if npu.health.lower() not in ("ok", "warning", "alarm"):  # 310B boards report Alarm and work
        raise _Missing(detail, "see `npu-smi info -t health`, then reset or replace the NPU")
    return detail


def _idle(device_id: int, root: Path) -> str:
    npu = npu_smi.npu(device_id)
    why = npu.why_busy()
    if why:
        raise _Missing(why, "stop what uses it before throughput is measured, or use another --device-id")
    return f"{npu.memory_used_mb} of {npu.memory_total_mb} MB in use, no process"


_TOOLKIT: Tuple[Tuple[str, bool, _Check], ...] = (
    ("driver", True, _driver),
    ("device files", True, _device_files),
    ("CANN", True, _cann),
    ("CANN's operators", False, _operators),
    ("set_env.sh", True, _set_env),
    ("atc", True, _atc),
    ("atc's Python packages", False, _tbe_packages),
)
# One process imports one of them: each would initialise ACL.
_RUNTIMES: Dict[str, Tuple[Tuple[str, bool, _Check], ...]] = {
    "aclruntime": (("aclruntime", True, _aclruntime), ("pyACL", False, _pyacl_beside)),
    "pyacl": (("pyACL", True, _pyacl), ("aclruntime", False, _aclruntime_beside)),
}
_DEVICE: Tuple[Tuple[str, bool, _Check], ...] = (
    ("ais_bench", False, _ais_bench),
    ("npu-smi", True, _npu_smi),
    ("chip", True, _chip),
    ("idle", False, _idle),
)
