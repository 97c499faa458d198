"""Reading the tables of npu-smi: text in, values out.

They differ by chip family and driver, so they are read by their headers and separators, never by column widths.
Source: npu_info_print.c of the Ascend driver (npu-smi), and outputs that users posted.
"""

from __future__ import annotations

import re
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

_PAIR = re.compile(r"(\d+|NA|-+)\s*/\s*(\d+|NA|-+)", re.IGNORECASE)
_MAPPING_COLUMN = re.compile(r"Chip Logic ID|(?:Chip )?Phy-?\s?ID|NPU ID|Chip ID|Chip Name", re.IGNORECASE)


class Process(NamedTuple):
    """One row of the process table. `name` is empty in a container, where `pid` is the host's."""

    pid: int
    name: str
    memory_mb: int


class Chip(NamedTuple):
    """Two rows of the table of `npu-smi info`. `device` is the Device column of 310 and 310P, else None."""

    npu_id: int
    chip_id: int
    device: Optional[int]
    name: str
    health: str
    used_mb: Optional[int]
    total_mb: Optional[int]
    processes: Tuple[Process, ...]


def parse_info(text: str) -> List[Chip]:
    """Chips and their processes from `npu-smi info`, in the order of the table; empty where it has none."""
    chips: List[Chip] = []
    processes: Dict[Tuple[int, Optional[int]], List[Process]] = {}
    lower_header: List[str] = []
    upper: Optional[List[str]] = None
    in_processes = False
    for cells in _table_rows(text):
        if any(cell.lower().startswith("process id") for cell in cells):
            in_processes = True
        elif _is_header(cells):
            in_processes = False
            lower_header = cells if cells[0].lower().startswith("chip") else lower_header
            upper = None
        elif in_processes:
            _add_process(cells, processes)
        elif upper is None or _is_upper(cells, upper):
            upper = cells if re.match(r"\d+\s+\S", cells[0]) and len(cells) > 2 else None
        elif re.match(r"\d+", cells[0]):
            chips.append(_chip(upper, cells, lower_header))
            upper = None
    return [chip._replace(processes=_of(chip, processes)) for chip in chips]


def _table_rows(text: str) -> Iterator[List[str]]:
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("|"):  # a long process name can push the last bar away
            inner = stripped[1:-1] if stripped.endswith("|") and len(stripped) > 1 else stripped[1:]
            yield [cell.strip() for cell in inner.split("|")]


def _is_header(cells: List[str]) -> bool:
    return bool(re.match(r"(NPU|Chip)\b", cells[0], re.IGNORECASE)) and len(cells) > 2


def _is_upper(cells: List[str], upper: List[str]) -> bool:
    """A second upper row in a chip's place: the lower row before it is missing. A bus id marks a lower row."""
    if len(cells) < 3 or ":" in cells[1]:
        return False
    words = cells[0].split(None, 1)
    return len(words) == 2 and not words[1].isdigit() and cells[1].isalpha() and len(cells) == len(upper)


def _chip(upper: List[str], lower: List[str], lower_header: List[str]) -> Chip:
    npu_id, name = upper[0].split(None, 1)
    numbers = [int(part) for part in lower[0].split() if part.isdigit()]
    headings = lower_header[0].lower() if lower_header else ""
    device = numbers[1] if "device" in headings and len(numbers) > 1 else None
    used, total = _memory(lower, lower_header)
    return Chip(int(npu_id), numbers[0], device, name.strip(), upper[1], used, total, ())


def _memory(lower: List[str], lower_header: List[str]) -> Tuple[Optional[int], Optional[int]]:
    """Used and total MB: of HBM where the header has it and the chip fills it in, else the first memory column."""
    headings = re.findall(r"[\w-]*Usage\s*\(MB\)", " ".join(lower_header), re.IGNORECASE)
    pairs = _PAIR.findall(" ".join(lower[2:]))
    found = dict(zip((heading.lower() for heading in headings), pairs))
    if not headings and pairs:
        found = {"memory": pairs[-1]}
    for _, (used, total) in sorted(found.items(), key=lambda item: "hbm" not in item[0]):
        if used.isdigit() and total.isdigit() and int(total) > 0:
            return int(used), int(total)
    return None, None


def _add_process(cells: List[str], processes: Dict[Tuple[int, Optional[int]], List[Process]]) -> None:
    numbers = [int(part) for part in cells[0].split() if part.isdigit()]
    if not numbers or len(cells) < 3 or not cells[1].isdigit():
        return  # "No running processes found in NPU 0"
    memory = re.match(r"\d+", cells[-1])
    process = Process(int(cells[1]), " ".join(cells[2:-1]).strip(), int(memory.group()) if memory else 0)
    processes.setdefault((numbers[0], numbers[1] if len(numbers) > 1 else None), []).append(process)


def _of(chip: Chip, processes: Dict[Tuple[int, Optional[int]], List[Process]]) -> Tuple[Process, ...]:
    """Processes of a chip; a row without a chip id counts for every chip of its card."""
    own = processes.get((chip.npu_id, chip.chip_id), [])
    return (*own, *processes.get((chip.npu_id, None), []))


def parse_mapping(text: str) -> Dict[Tuple[int, int], int]:
    """(npu id, chip id) -> logic id from `npu-smi info -m`; rows of the Mcu, without a logic id, are left out."""
    columns: List[str] = []
    found: Dict[Tuple[int, int], int] = {}
    for line in text.splitlines():
        headings = [heading.lower() for heading in _MAPPING_COLUMN.findall(line)]
        if "npu id" in headings:
            columns = headings
            continue
        row = dict(zip(columns, _mapping_cells(line, columns)))
        numbers = [row.get(name, "") for name in ("npu id", "chip id", "chip logic id")]
        if all(number.isdigit() for number in numbers):
            found[int(numbers[0]), int(numbers[1])] = int(numbers[2])
    return found


def _mapping_cells(line: str, columns: List[str]) -> List[str]:
    """Cells of a row. The chip name holds a blank (`Ascend 310P3`), every other cell is one word."""
    words = line.split()
    if "chip name" not in columns or len(words) < len(columns):
        return words
    name = columns.index("chip name")
    behind = len(columns) - 1 - name
    end = len(words) - behind
    return [*words[:name], " ".join(words[name:end]), *words[end:]]


def parse_board(text: str) -> str:
    """`<Chip Name>_<NPU Name>` from `npu-smi info -t board`; empty where one of them is missing."""
    values = dict(_pairs(text))
    chip, npu_name = values.get("chip name", ""), values.get("npu name", "")
    if not chip or not npu_name or {chip, npu_name} & {"-", "NA", "N/A"}:
        return ""
    return f"{with_prefix(chip)}_{npu_name.replace(' ', '')}"


def _pairs(text: str) -> Iterator[Tuple[str, str]]:
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            yield " ".join(key.split()).lower(), value.strip()


def with_prefix(name: str) -> str:
    """A chip's name with `Ascend` in front, once, and without blanks."""
    plain = name.replace(" ", "")
    return plain if plain.lower().startswith("ascend") else f"Ascend{plain}"
