"""npu-smi's information on the NPUs: chip, soc_version, device ids, idle or busy. The only module that runs npu-smi.

Source: npu_info_print.c of the Ascend driver (npu-smi), and outputs that users posted; see `npu_tables`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Dict, FrozenSet, Iterable, List, Mapping, Optional, Tuple

from clipval.ascend.npu_tables import (
    Chip,
    Process,
    parse_board,
    parse_container_pids,
    parse_info,
    parse_mapping,
    with_prefix,
)
from clipval.errors import BackendUnavailable, ToolFailed

TIMEOUT_SECONDS = 60
VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
# An idle NPU uses about 2900 of 32768 MB (910B4) or 3400 of 65536 MB (910B). The limit is 750 to 900 MB above both; a
# smaller model of another process is detected only by its process row.
IDLE_BASE_MB = 3000
IDLE_SHARE = 0.02
# Families whose table shows one name for several chips; `-t board` distinguishes them.
_SHARED_NAME = re.compile(r"Ascend\s*910$|(?:Ascend\s*)?950\w*$", re.IGNORECASE)


@dataclass(frozen=True)
class Npu:
    """One chip.

    Attributes:
        npu_id: of the card; not contiguous (0, 32, 32768 all occur).
        chip_id: on its card.
        logic_id: ACL's device id, before `ASCEND_RT_VISIBLE_DEVICES`.
        name: from the table: `310P3`, `910B4`, `Ascend910`.
        board: `<Chip Name>_<NPU Name>` of `-t board`; only if `name` does not identify the chip, else empty.
        health: `OK`, `Warning`, `Alarm`, ...
        memory_used_mb, memory_total_mb: HBM if the chip has it, else DDR; None if the table shows no number.
        processes: that use the chip.
        container_pids: pid in `processes` -> pid inside its container, if npu-smi (26 on) shows it.
    """

    npu_id: int
    chip_id: int
    logic_id: int
    name: str
    health: str
    memory_used_mb: Optional[int]
    memory_total_mb: Optional[int]
    processes: Tuple[Process, ...] = ()
    board: str = ""
    container_pids: Mapping[int, int] = field(default_factory=dict)

    @property
    def soc_version(self) -> str:
        """The value for atc's `--soc_version`: `Ascend` + name, or `<Chip Name>_<NPU Name>` on A3 and 950.

        Raises:
            ToolFailed: several chips share the table's name and `-t board` did not identify the chip.
        """
        if not _SHARED_NAME.match(self.name):
            return with_prefix(self.name)
        if not self.board:
            raise ToolFailed(
                f"npu-smi info -t board -i {self.npu_id}: no Chip Name and NPU Name of chip {self.chip_id}, and "
                f"{self.name!r} alone does not identify the chip; give --soc-version"
            )
        return self.board

    def why_busy(self, ignore_pids: Iterable[int] = ()) -> str:
        """Why the chip is not idle; empty if it is.

        Judged by process rows and memory in use, never by AICore(%), which is 0 between two kernels.

        Args:
            ignore_pids: our own processes, which do not count, nor does their memory. In a container npu-smi shows the
                host's pids; see `appeared`.
        """
        ignored = set(ignore_pids)
        own = [process for process in self.processes if process.pid in ignored]
        others = [process for process in self.processes if process.pid not in ignored]
        where = f"NPU {self.npu_id} chip {self.chip_id} (device {self.logic_id})"
        if others:
            rows = ", ".join(f"{one.pid} ({one.name or 'no name'}, {_megabytes(one)})" for one in others[:3])
            return f"{where}: {len(others)} process(es) on it: {rows}"
        if self.memory_used_mb is None or self.memory_total_mb is None:
            return f"{where}: npu-smi shows no memory in use, so it is not known to be idle"
        unknown = [process.pid for process in own if process.memory_mb is None]
        if unknown:
            return (
                f"{where}: npu-smi shows no memory of our own process {unknown[0]}, so the memory of others is unknown"
            )
        limit = int(IDLE_BASE_MB + IDLE_SHARE * self.memory_total_mb)
        used = self.memory_used_mb - sum(process.memory_mb or 0 for process in own)
        if used > limit:
            return f"{where}: {used} of {self.memory_total_mb} MB in use, an idle one has at most {limit} MB"
        return ""


def _megabytes(process: Process) -> str:
    return "memory not shown" if process.memory_mb is None else f"{process.memory_mb} MB"


def appeared(before: Npu, after: Npu) -> FrozenSet[int]:
    """This process's pids on the chip, as npu-smi shows them; for `why_busy`.

    They appeared while our first session was opened. In a container npu-smi shows the host's pids, so `os.getpid()`
    alone is not enough: another process may have that number. The pid inside the container decides if it is shown, then
    our own pid, then that only one process appeared. Empty if several appeared and none of these identifies ours: then
    all count as others.
    """
    came = frozenset(one.pid for one in after.processes) - frozenset(one.pid for one in before.processes)
    inside = frozenset(pid for pid in came if after.container_pids.get(pid) == os.getpid())
    shown = came & {os.getpid()}
    if inside or shown:
        return inside or shown
    unsaid = frozenset(pid for pid in came if pid not in after.container_pids)
    return unsaid if len(unsaid) == 1 else frozenset()


def list_npus() -> List[Npu]:
    """Every chip of this host, by logic id.

    Raises:
        BackendUnavailable: there is no npu-smi or no NPU.
        ToolFailed: npu-smi hangs, fails, or its output cannot be read.
    """
    text = _run("info")
    chips = parse_info(text)
    if not chips:
        _refuse(text)
    inside = parse_container_pids(text)
    found = [_npu(chip, logic_id, inside) for chip, logic_id in zip(chips, _logic_ids(chips))]
    return sorted(found, key=lambda npu: npu.logic_id)


def _logic_ids(chips: List[Chip]) -> List[int]:
    """ACL's device id of each chip: by `npu-smi info -m`, else by the table's Device column, else by its order.

    950 has neither column; cards are in the order of their ids, which is ACL's order according to the driver's source.
    """
    try:
        mapping = _mapping(str(shutil.which("npu-smi")), tuple((chip.npu_id, chip.chip_id) for chip in chips))
    except ToolFailed:
        mapping = {}
    if mapping:
        missing = [chip for chip in chips if (chip.npu_id, chip.chip_id) not in mapping]
        if missing:
            raise ToolFailed(
                f"npu-smi info -m: no Chip Logic ID of NPU {missing[0].npu_id} chip {missing[0].chip_id}, which "
                "`npu-smi info` lists; run both by hand and repair the driver"
            )
        return [mapping[chip.npu_id, chip.chip_id] for chip in chips]
    return [order if chip.device is None else chip.device for order, chip in enumerate(chips)]


@lru_cache(maxsize=None)
def _mapping(program: str, chips: Tuple[Tuple[int, int], ...]) -> Dict[Tuple[int, int], int]:
    """Logic ids by NPU id and chip id. They stay while the driver is loaded, and a run looks at its NPU 40 times.

    Args:
        program: path of npu-smi; chips: the ids that `npu-smi info` lists.
    """
    return parse_mapping(_run("info", "-m"))


def npu(device_id: int) -> Npu:
    """The chip that is ACL's device `device_id` in this process.

    Raises:
        BackendUnavailable: no such device, or see `list_npus`.
        ToolFailed: see `list_npus`.
    """
    npus = list_npus()
    visible = visible_devices()
    if visible is not None and device_id >= len(visible):
        raise BackendUnavailable(
            f"device {device_id}: {VISIBLE_DEVICES}={','.join(map(str, visible))} leaves devices 0 to "
            f"{len(visible) - 1}; give another --device-id or change the variable"
        )
    logic_id = device_id if visible is None else visible[device_id]
    for found in npus:
        if found.logic_id == logic_id:
            return found
    listed = ", ".join(str(found.logic_id) for found in npus)
    raise BackendUnavailable(f"device {device_id}: no NPU has logic id {logic_id}, npu-smi shows {listed}")


def visible_devices() -> Optional[List[int]]:
    """Logic ids in `ASCEND_RT_VISIBLE_DEVICES`, in their new order; None if it is not set.

    Raises:
        BackendUnavailable: the variable is not a list of numbers.
    """
    text = os.environ.get(VISIBLE_DEVICES, "").strip()
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise BackendUnavailable(f"{VISIBLE_DEVICES}={text!r}: expected logic ids such as 2,3; correct or unset it")
    return [int(part) for part in parts]


def version() -> str:
    """Version of npu-smi, which is the driver's. Raises like `list_npus`."""
    match = re.search(r"version:\s*(\S+)", _run("-v"), re.IGNORECASE)
    if match is None:
        match = re.search(r"\bVersion:\s*(\S+)", _run("info"))
    return match.group(1) if match else "unknown"


def _npu(chip: Chip, logic_id: int, inside: Dict[int, int]) -> Npu:
    return Npu(
        npu_id=chip.npu_id,
        chip_id=chip.chip_id,
        logic_id=logic_id,
        name=chip.name,
        health=chip.health,
        memory_used_mb=chip.used_mb,
        memory_total_mb=chip.total_mb,
        processes=chip.processes,
        board=_board(chip) if _SHARED_NAME.match(chip.name) else "",
        container_pids={one.pid: inside[one.pid] for one in chip.processes if one.pid in inside},
    )


def _board(chip: Chip) -> str:
    """Output of `-t board` for a chip. On 950 it accepts no `-c`, elsewhere it needs it."""
    card = ("info", "-t", "board", "-i", str(chip.npu_id))
    for arguments in ((*card, "-c", str(chip.chip_id)), card):
        try:
            board = parse_board(_run(*arguments))
        except ToolFailed:
            board = ""  # reported when the soc_version is needed
        if board:
            return board
    return ""


def _refuse(text: str) -> None:
    words = " ".join(text.split())[:200]
    if re.search(r"no NPU card|no davinci|dcmi", text, re.IGNORECASE):
        raise BackendUnavailable(
            f"npu-smi info: {words}. Install the card's driver and firmware; in a container pass /dev/davinci* in"
        )
    raise ToolFailed(f"npu-smi info: no NPU in its output ({words or 'empty'}); run it by hand and repair the driver")


def _run(*arguments: str) -> str:
    """Output of npu-smi, stdout and stderr together. A table is used even if the exit code is not 0."""
    command = " ".join(("npu-smi", *arguments))
    program = shutil.which("npu-smi")
    if program is None:
        raise BackendUnavailable(
            "npu-smi: not found on PATH. Install the NPU driver, or add the folder of npu-smi to PATH (cron and "
            "containers have a short one), or give --soc-version to compile only"
        )
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(f"{command}: no answer in {TIMEOUT_SECONDS} s; the driver hangs, reset the NPU") from error
    except OSError as error:
        raise BackendUnavailable(
            f"{command}: {program} cannot be started ({error.strerror}); repair the driver"
        ) from error
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0 and "|" not in text and not re.search("no NPU card|dcmi", text, re.IGNORECASE):
        words = " ".join(text.split())[:200]
        raise ToolFailed(f"{command}: exit code {done.returncode} ({words or 'no output'}); run it by hand")
    return text
