"""Parse the tables of npu-smi.

They differ by chip family and driver, so every column is found by its heading, never by width or position. A line that
does not fit the headings above it is an error that shows the line: a missed chip or process would make a busy NPU look
idle.
Source: npu_info_print.c of the Ascend driver (hicann/driver, 2026-07), and outputs of drivers 21.0 to 26.0 that users
posted.
"""

from __future__ import annotations

import re
from typing import Dict, Iterator, List, NamedTuple, NoReturn, Optional, Tuple

from clipval.errors import ToolFailed

_UNKNOWN = r"NA|N/A|-+"  # for npu-smi's missing values
_PAIR = re.compile(rf"(\d+|{_UNKNOWN})\s*/\s*(\d+|{_UNKNOWN})", re.IGNORECASE)
_VALUE = re.compile(rf"{_PAIR.pattern}|\S+", re.IGNORECASE)
# A heading has a unit or is one of these words; a cell can hold several: `NPU     Name`, `AICore(%)  HBM-Usage(MB)`.
_HEADING = re.compile(
    r"[A-Za-z][\w-]*(?: [A-Za-z][\w-]*)?\s?\([^)]*\)"
    r"|NPU ID|Process id in container|Process id|Process name|NPU|Name|Health|Chip|Device|Phy-?ID|Bus-Id",
    re.IGNORECASE,
)
_MAPPING_COLUMN = re.compile(r"Chip Logic ID|(?:Chip )?Phy-?\s?ID|NPU ID|Slot ID|Chip ID|Chip Name", re.IGNORECASE)
_BUS_ID = re.compile(rf"[0-9A-F]{{4}}:[0-9A-F]{{2}}:\S+|{_UNKNOWN}", re.IGNORECASE)

_Row = Dict[str, str]
_Header = List[Tuple[str, ...]]


class Process(NamedTuple):
    """One row of the process table: at most 8 per chip. `name` is empty in a container, where `pid` is the host's;
    `memory_mb` is None if the table has no number."""

    pid: int
    name: str
    memory_mb: Optional[int]


class Chip(NamedTuple):
    """Two rows of the table of `npu-smi info`. `device` is the Device column of 310 and 310P, else None; `chip_id` is 0
    on 950, whose cards have one chip and whose table has no column for it."""

    npu_id: int
    chip_id: int
    device: Optional[int]
    name: str
    health: str
    used_mb: Optional[int]
    total_mb: Optional[int]
    processes: Tuple[Process, ...]


class _Owned(NamedTuple):
    """A process with its chip, and its pid inside its container if the table has that column."""

    npu_id: int
    chip_id: Optional[int]
    process: Process
    container_pid: Optional[int]
    line: str


def parse_info(text: str) -> List[Chip]:
    """Chips and their processes from `npu-smi info`, in the order of the table; empty if there are none.

    Raises:
        ToolFailed: a line of the table has another layout than its headings, or a process's chip is not in the table.
    """
    chips, owned = _read(text)
    places: Dict[Tuple[int, int], List[Process]] = {(chip.npu_id, chip.chip_id): [] for chip in chips}
    for row in owned:
        on = [place for place in places if place[0] == row.npu_id and row.chip_id in (None, place[1])]
        if len(on) != 1:
            _refuse(row.line, "its process is on no chip of the table above, or on several")
        places[on[0]].append(row.process)
    return [chip._replace(processes=tuple(places[chip.npu_id, chip.chip_id])) for chip in chips]


def parse_container_pids(text: str) -> Dict[int, int]:
    """Pid in the table -> pid inside the container, for rows that have both (npu-smi 26)."""
    return {row.process.pid: row.container_pid for row in _read(text)[1] if row.container_pid is not None}


def _read(text: str) -> Tuple[List[Chip], List[_Owned]]:
    """Chips without their processes, and the processes."""
    chips: List[Chip] = []
    owned: List[_Owned] = []
    header: _Header = []
    upper_header: _Header = []
    upper: Optional[_Row] = None
    line = ""
    for line, cells in _table_rows(text):
        if len(cells) == 1:
            if cells[0] and not re.match(r"npu-smi |No running process", cells[0], re.IGNORECASE):
                _refuse(line)
        elif _is_header(cells):
            if upper is not None:
                _refuse(line, "the chip above it lacks its second row")
            header = [_headings(cell, line) for cell in cells]
            upper_header = header if _has(header, "health") else upper_header
        elif _has(header, "process id"):
            _add_process(cells, header, line, owned)
        elif not _has(header, "bus-id"):
            _refuse(line, "no known heading is above it")
        elif upper is None:
            upper = _upper(_fields(cells, upper_header, line), line)
        else:
            chips.append(_chip(upper, _fields(cells, header, line), line))
            upper = None
    if upper is not None:
        _refuse(line, "this chip lacks its second row")
    return chips, owned


def _table_rows(text: str) -> Iterator[Tuple[str, List[str]]]:
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("|"):
            yield stripped, _cells(stripped)


def _cells(line: str, bar: str = r"\|") -> List[str]:
    """The cells of a row; a long process name can overwrite the last bar."""
    inner = line[1:-1] if line.endswith("|") and len(line) > 1 else line[1:]
    return [cell.strip() for cell in re.split(bar, inner)]


def _is_header(cells: List[str]) -> bool:
    words = {cell.lower() for cell in cells}
    return not cells[0][:1].isdigit() and bool(words & {"health", "bus-id", "process id"})


def _has(header: _Header, heading: str) -> bool:
    return any(heading in headings for headings in header)


def _headings(cell: str, line: str) -> Tuple[str, ...]:
    if _HEADING.sub("", cell).strip() and len(_HEADING.findall(cell)) > 0:
        _refuse(line, f"{cell!r} has an unknown heading")
    found = tuple(re.sub(r"\s+", " ", heading).replace(" (", "(").lower() for heading in _HEADING.findall(cell))
    return tuple(name.replace("phyid", "phy-id") for name in found) or (cell.lower(),)


def _fields(cells: List[str], header: _Header, line: str) -> _Row:
    """Heading -> value. Other cells may have any content."""
    if len(cells) != len(header):
        _refuse(line, f"it has {len(cells)} cells under {len(header)} headings")
    row: _Row = {}
    for headings, cell in zip(header, cells):
        if cell and headings == ("",):
            _refuse(line, f"{cell!r} has no heading")
        if len(headings) == 1:
            row[headings[0]] = cell
        elif "name" in headings:  # the last one, which may contain blanks
            row.update(zip(headings, cell.split(None, len(headings) - 1)))
        else:
            values = [match.group() for match in _VALUE.finditer(cell)]
            if len(values) == len(headings):
                row.update(zip(headings, values))
    return row


def _upper(row: _Row, line: str) -> _Row:
    """The first row of a chip: its card, name and health."""
    row["npu"] = row.get("npu", row.get("npu id", ""))
    if not row["npu"].isdigit() or not row.get("name"):
        _refuse(line, "expected the number of an NPU and its name")
    if not re.fullmatch(r"(?!NA$)[A-Za-z][A-Za-z ]*", row.get("health", "")):
        _refuse(line, "expected a health such as OK")
    return row


def _chip(upper: _Row, row: _Row, line: str) -> Chip:
    """A chip from its two rows. If a card has one chip (950), the second row has a blank instead of a chip id."""
    chip = row.get("chip", "0")
    device = row.get("device", "")
    if not chip.isdigit() or ("device" in row and not device.isdigit()):
        _refuse(line, "expected the number of a chip")
    if not _BUS_ID.fullmatch(row["bus-id"]):
        _refuse(line, "expected a bus id")
    used, total = _memory(row, line)
    return Chip(
        int(upper["npu"]), int(chip), int(device) if device else None, upper["name"], upper["health"], used, total, ()
    )


def _memory(row: _Row, line: str) -> Tuple[Optional[int], Optional[int]]:
    """Used and total MB: of HBM if the table has a value, else of DDR."""
    columns = [name for name in ("hbm-usage(mb)", "memory-usage(mb)") if name in row]
    if not columns:
        _refuse(line, "expected memory in use as Memory-Usage(MB) or HBM-Usage(MB)")
    unknown = [name for name in row if re.search(r"\([mg]i?b\)$", name) and name not in columns]
    if unknown:  # HBM under another heading: DDR beside it would pass for the memory in use
        _refuse(line, f"its column {unknown[0]} is memory of a kind that is not known")
    for name in columns:
        pair = _PAIR.fullmatch(row[name])
        if pair is None and not re.fullmatch(_UNKNOWN, row[name], re.IGNORECASE):
            _refuse(line, f"expected {name} as used / total")
        if pair is not None and pair.group(1).isdigit() and pair.group(2).isdigit() and int(pair.group(2)) > 0:
            return int(pair.group(1)), int(pair.group(2))
    return None, None


def _add_process(cells: List[str], header: _Header, line: str, owned: List[_Owned]) -> None:
    """One row of the process table. A name can continue in the next row, whose other cells are blank."""
    name = next((n for n, headings in enumerate(header) if "process name" in headings), -1)
    if name < 0:
        _refuse(line, "its table has no Process name")
    if len(cells) > len(header):
        cells = _cells(line, r"\|(?=\s|$)")  # a bar inside a name has no blank after it
    if owned and cells[name:] and not "".join(cells[:name] + cells[name + 1 :]):
        last = owned[-1].process
        owned[-1] = owned[-1]._replace(process=last._replace(name=last.name + cells[name]))
        return
    row = _fields(cells, header, line)
    npu, chip = row.get("npu", row.get("npu id", "")), row.get("chip")
    pid, memory = row["process id"], row.get("process memory(mb)", "")
    if not (npu.isdigit() and pid.isdigit()) or ("npu" in row and not (chip or "").isdigit()):
        _refuse(line, "expected the numbers of an NPU, its chip and a process")
    if not re.fullmatch(rf"\d+|{_UNKNOWN}", memory, re.IGNORECASE):
        _refuse(line, "expected the memory of a process in MB")
    process = Process(int(pid), row["process name"], int(memory) if memory.isdigit() else None)
    inside = row.get("process id in container", "")
    owned.append(
        _Owned(int(npu), int(chip) if chip else None, process, int(inside) if inside.isdigit() else None, line)
    )


def _refuse(line: str, why: str = "") -> NoReturn:
    """Raise for a line that cannot be read."""
    reason = f" ({why})" if why else ""
    raise ToolFailed(
        f"npu-smi info: cannot read the line {' '.join(line.split())!r}{reason}; this layout is unknown; report it "
        "with the output of `npu-smi -v`"
    )


def parse_mapping(text: str) -> Dict[Tuple[int, int], int]:
    """(npu id, chip id) -> logic id from `npu-smi info -m`; rows of the Mcu, which have no logic id, are skipped.

    Empty on 950, whose mapping has a Slot ID and a Chip Phy-ID, but no logic id.
    """
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
    """Cells of a row. The chip name may contain a blank (`Ascend 310P3`), every other cell is one word."""
    words = line.split()
    if "chip name" not in columns or len(words) < len(columns):
        return words
    name = columns.index("chip name")
    behind = len(columns) - 1 - name
    end = len(words) - behind
    return [*words[:name], " ".join(words[name:end]), *words[end:]]


def parse_board(text: str) -> str:
    """`<Chip Name>_<NPU Name>` from `npu-smi info -t board`; empty if one of them is missing."""
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
    """A chip's name with the prefix `Ascend` and without blanks."""
    plain = name.replace(" ", "")
    return plain if plain.lower().startswith("ascend") else f"Ascend{plain}"
