"""One inference of an OM with CANN's dump enabled, in its own process.

The configuration is passed to aclInit, which a process calls once. The process is `python -m clipval.ascend.dumping OM
ROWS.npy DEVICE ACL.json OUT.npy RUNTIME`. Dump files are complete only after ACL is finalised, which both runtimes do
at exit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import numpy as np

from clipval.ascend import aclruntime, cann, pyacl
from clipval.errors import BackendUnavailable, ToolFailed

TIMEOUT_S = 1800
CONTAINER = "dumping is not supported inside containers (CANN 8.5 to 9.2); run it on the host"


def configuration(
    model: str, folder: Path, *, stats: bool = False, layers: Optional[Sequence[str]] = None
) -> Dict[str, object]:
    """The content of acl.json: dump outputs of all operators of a model, or of some layers.

    Args:
        model: file name of the OM up to its last dot.
        stats: statistics instead of tensors.
        layers: names of operators of the OM or of ONNX nodes; None for all (an empty list is refused by CANN).
    """
    listed: Dict[str, object] = {"model_name": model, **({"layer": list(layers)} if layers else {})}
    return {
        "dump": {
            "dump_list": [listed],
            "dump_path": str(folder),
            "dump_mode": "output",
            "dump_level": "op",
            "dump_data": "stats" if stats else "tensor",
        }
    }


def dump(om: Path, rows: np.ndarray, device: int, folder: Path, runtime: str = "aclruntime", **what: Any) -> np.ndarray:
    """Run an OM once in a new process and leave its dump in a folder; returns the embeddings.

    Args:
        rows: a full batch; folder: created here; what: see `configuration`.
        runtime: what runs the OM, a name of `--om-runtime`.

    Raises:
        BackendUnavailable: the process failed, with its last output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, fed, made = folder.with_suffix(".json"), folder.with_suffix(".in.npy"), folder.with_suffix(".out.npy")
    config.write_text(json.dumps(configuration(om.name.rpartition(".")[0], folder, **what)), encoding="utf-8")
    np.save(fed, rows)
    command = [sys.executable, "-m", "clipval.ascend.dumping", str(om), str(fed), str(device), str(config), str(made)]
    try:
        done = subprocess.run([*command, runtime], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BackendUnavailable(f"dump of {om.name} on device {device}: no end after {TIMEOUT_S} s") from error
    if done.returncode or not made.is_file():
        words = " ".join((done.stderr or done.stdout).split())[-400:]
        hint = f"; {CONTAINER}" if in_container() else ""
        ended = f"the process ended with {done.returncode} ({words}){hint}"
        raise BackendUnavailable(f"dump of {om.name} on device {device}: {ended}")
    return np.asarray(np.load(made))


def as_json(om: Path, target: Path) -> Path:
    """An OM's operators as JSON, by `atc --mode=1`, which needs CANN but no NPU.

    Raises:
        BackendUnavailable: there is no atc on PATH.
        ToolFailed: atc failed.
    """
    program = shutil.which("atc")
    if program is None:
        raise BackendUnavailable(f"atc: not found on PATH; {cann.how_to_source()}")
    command = [program, "--mode=1", f"--om={om.resolve()}", f"--json={target.resolve()}"]
    done = subprocess.run(command, cwd=target.parent, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode or not target.is_file():
        words = " ".join((done.stdout + done.stderr).split())[-400:]
        raise ToolFailed(f"atc --mode=1 of {om.name}: ended with {done.returncode} ({words})")
    return target


def in_container() -> bool:
    """Whether this process runs in a container, judged by files."""
    return any(Path(name).exists() for name in ("/.dockerenv", "/run/.containerenv"))


def main(arguments: Sequence[str]) -> int:
    """The new process: one session with the configuration, one run, one output."""
    om, fed, device, config, made, runtime = arguments
    kind = pyacl.Session if runtime == "pyacl" else aclruntime.Session
    session: Union[pyacl.Session, aclruntime.Session] = kind(Path(om).resolve(), int(device), config)
    np.save(made, session.run(np.ascontiguousarray(np.load(fed)), session.outputs[0].name))
    session.free()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
