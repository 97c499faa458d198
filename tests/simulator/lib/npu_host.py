"""What `atc`, `npu-smi` and `aclruntime` of the simulated host share: switches, chips, and the OM container."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Set, Tuple

MAGIC = b"CLIPVAL-SIMULATED-OM-1\n"
PAGE = 4096


class Chip(NamedTuple):
    """One kind of chip: what npu-smi shows, and how much memory an idle one has in use."""

    layout: str
    table_name: str
    soc: str
    idle_mb: int
    total_mb: int


CHIPS = {
    "310P3": Chip("310P", "310P3", "Ascend310P3", 1600, 21534),
    "910A": Chip("910", "910A", "Ascend910A", 2432, 15571),
    "910B3": Chip("910", "910B3", "Ascend910B3", 3400, 65536),
    "910B4": Chip("910", "910B4", "Ascend910B4", 2900, 32768),
    "910_9392": Chip("A3", "Ascend910", "Ascend910_9392", 3108, 65536),
    "950PR_9579": Chip("950", "Ascend950PR", "Ascend950PR_9579", 3300, 131072),
}


def switch(name: str, default: str = "") -> str:
    """Value of `CLIPVAL_SIM_<NAME>`."""
    return os.environ.get(f"CLIPVAL_SIM_{name}", default)


def faults() -> Set[str]:
    """Faults that are switched on."""
    return {name.strip() for name in switch("FAULT").split(",") if name.strip()}


def chip() -> Chip:
    """The chip of this host."""
    return CHIPS[switch("CHIP", "910B4")]


def npus() -> int:
    """How many chips this host has."""
    return int(switch("NPUS", "2"))


def device_memory() -> int:
    """Bytes of device memory that are free before anything of this process is on it."""
    return int(switch("DEVICE_MEMORY", str((chip().total_mb - chip().idle_mb) << 20)))


def users() -> List[Tuple[int, int]]:
    """(pid, device id) of live processes that opened a session, where `CLIPVAL_SIM_STATE` names a folder."""
    found = []
    if switch("STATE"):
        for path in Path(switch("STATE")).glob("*.session"):
            pid, device = (int(part) for part in path.stem.split("-"))
            if Path(f"/proc/{pid}").exists():
                found.append((pid, device))
    return sorted(found)


def note_user(device_id: int) -> None:
    """Make this process show up in npu-smi until it ends."""
    if switch("STATE"):
        (Path(switch("STATE")) / f"{os.getpid()}-{device_id}.session").touch()


def write_om(path: Path, header: Dict[str, Any], model: bytes) -> None:
    """Write the container: magic, length of the header, header, ONNX model of a fixed batch size."""
    text = json.dumps({**header, "model_bytes": len(model)}).encode()
    path.write_bytes(MAGIC + struct.pack("<Q", len(text)) + text + model)


def read_om(path: str) -> Tuple[Dict[str, Any], bytes]:
    """Read the container. Raises ValueError where it is not one, or is cut short."""
    data = Path(path).read_bytes()
    start = len(MAGIC) + 8
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise ValueError("not an OM")
    (length,) = struct.unpack("<Q", data[len(MAGIC) : start])
    header = json.loads(data[start : start + length])
    model = data[start + length :]
    if len(model) != header["model_bytes"]:
        raise ValueError("cut short")
    return header, model
