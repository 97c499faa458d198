"""Tables of npu-smi by family and driver, each with what a person reads in it.

The texts under `npu_smi/` have made-up numbers in the layouts of npu_info_print.c and of what users posted.
"""

from contextlib import suppress
from pathlib import Path

import pytest

from clipval.ascend.npu_tables import parse_board, parse_container_pids, parse_info, parse_mapping
from clipval.errors import ToolFailed

FOLDER = Path(__file__).parent / "npu_smi"
# npu id, chip id, device, name, health, used MB, total MB, then pid, name and MB of each process
TABLES = {
    "310-21.0": [
        (2, 0, 1, "310", "OK", 2603, 8192),
        (2, 1, 0, "310", "Warning", None, None),
    ],
    "310p-23.0": [
        (24, 0, 0, "310P3", "OK", 1811, 21527),
        (32800, 0, 1, "310P3", "OK", 19377, 21527, (40917, "serve|worker", 17344), (40951, "", 61)),
    ],
    "310p-duo-25.5": [
        (1, 0, 0, "310P3", "OK", 1466, 44278),
        (1, 1, 1, "310P3", "Alarm", 9731, 43693, (8801, "python3", 8120)),
        (2, 0, 2, "310P3", "OK", 1391, 44278),
        (2, 1, 3, "310P3", "OK", 1402, 43693),
    ],
    "310b-23.0": [(0, 0, 0, "310B4", "Alarm", 3412, 15609)],
    "910-21.0": [
        (1, 0, None, "910A", "OK", 2, 32768),
        (4, 0, None, "910A", "OK", 0, 32768),
    ],
    "910b-23.0-container": [
        (2, 0, None, "910B3", "OK", 41077, 65536, (1333912, "", 37688), (1333913, "", 132)),
        (5, 0, None, "910B3", "Critical", None, None),
    ],
    "910b-26.0": [
        (0, 0, None, "910B4", "OK", 2874, 32768),
        (3, 0, None, "910B4", "OK", 17911, 32768, (485901, "pytest", 15002), (485944, "a_name_of_many_letters", 9)),
    ],
    "a3-25.2": [
        (0, 0, None, "Ascend910", "OK", 53704, 65536, (3325901, "", 50121), (3328302, "", 133)),
        (0, 1, None, "Ascend910", "OK", 53011, 65536, (3328302, "", 50117)),
        (1, 0, None, "Ascend910", "OK", 3417, 65536),
        (1, 1, None, "Ascend910", "OK", 3190, 65536),
    ],
    "a3-26.0": [
        (0, 0, None, "Ascend910", "OK", 15511, 65536, (692301, "python3", 12411)),
        (0, 1, None, "Ascend910", "OK", 15240, 65536, (692301, "python3", 12360)),
        (7, 0, None, "Ascend910", "Warning", 3140, 65536),
        (7, 1, None, "Ascend910", "OK", 2879, 65536),
    ],
    "a3-26.0-container": [
        (0, 0, None, "Ascend910", "OK", 15511, 65536, (77001, "", 9000), (77344, "", 3111), (78002, "", 120)),
        (0, 1, None, "Ascend910", "OK", 2879, 65536),
    ],
    "950pr-25.7": [
        (0, 0, None, "Ascend950PR", "Alarm", 90611, 114688, (846702, "", 85002)),
        (2, 0, None, "Ascend950PR", "OK", 5409, 131072),
    ],
    "950dt-25.6": [
        (0, 0, None, "Ascend950DT", "OK", 4761, 98304),
        (
            *(6, 0, None, "Ascend950DT", "OK", 66402, 98304),
            *((3621001, "a_worker_whose_name_goes_on_in_a_row", 40000), (3624801, "python", 21004)),
        ),
    ],
}
CHIP_CELLS = 7


def read(name):
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def shown(text):
    return [(*chip[:CHIP_CELLS], *chip.processes) for chip in parse_info(text)]


def chip_rows(text):
    """Numbers of the lines that are a chip's first or second row."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if "Bus-Id" in line) + 1
    last = next((n for n, line in enumerate(lines) if "Process id" in line), len(lines))
    return [n for n in range(first, last) if lines[n].startswith("|")]


def test_every_text_is_read():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_layout_is_read_as_a_person_reads_it(name):
    assert shown(read(name)) == TABLES[name]


@pytest.mark.parametrize("name", TABLES)
def test_frames_do_not_matter(name):
    """Line ends, an indented copy, blanks squeezed, no rules between the rows."""
    text = read(name)
    assert shown(text.replace("\n", "\r\n")) == TABLES[name]
    assert shown("".join(f"    {line} \n" for line in text.splitlines())) == TABLES[name]
    assert shown("".join(line + "\n" for line in text.splitlines() if line.startswith("|"))) == TABLES[name]


@pytest.mark.parametrize("name", TABLES)
def test_half_a_chip_is_an_error_and_no_shorter_list(name):
    lines = read(name).splitlines()
    for number in chip_rows(read(name)):
        with pytest.raises(ToolFailed, match="cannot read the line '.*this layout is unknown"):
            parse_info("\n".join(lines[:number] + lines[number + 1 :]))


@pytest.mark.parametrize("name", TABLES)
def test_a_column_more_or_less_changes_nothing_or_is_an_error(name):
    """Never another number: of each row, one cell is added and one is taken away."""
    lines = read(name).splitlines()
    refused = 0
    for number, line in enumerate(lines):
        cells = line.split("|")
        if len(cells) < 4:
            continue
        for changed in ([*cells[:-2], "   ", *cells[-2:]], cells[:-2] + cells[-1:]):
            mangled = "\n".join([*lines[:number], "|".join(changed), *lines[number + 1 :]])
            with suppress(ToolFailed):
                assert shown(mangled) == TABLES[name], line
                continue
            refused += 1
    assert refused >= len(chip_rows(read(name)))


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("910b-26.0", "| pytest   ", "| py | test", "cells under 5 headings"),
        ("910b-26.0", "2874 / 32768", "2874 of 32768", "expected memory in use"),
        ("910b-26.0", "| Chip        ", "| Chip  Die   ", "has an unknown heading"),
        ("910b-26.0", "0000:C1:00.0", "somewhere   ", "expected a bus id"),
        ("910b-26.0", "| 3       0  ", "| 3          ", "expected the numbers of an NPU, its chip"),
        ("910b-26.0", "| 3       0  ", "| 4       0  ", "on no chip of the table"),
        ("910b-26.0", "| 15002 ", "| 15 GB ", "memory of a process in MB"),
        ("910b-26.0", "| 485901        |", "| pid 485901    |", "expected the numbers"),
        ("910b-26.0", "| No running processes found in NPU 0", "| Nobody knows what runs on NPU 0    ", "Nobody knows"),
        ("950dt-25.6", "|        |                  | NA", "| 0      |                  | NA", "has no heading"),
        ("310p-23.0", "| 24      310P3", "| x24     310P3", "cannot read the line"),
        ("310p-23.0", "| Chip    Device ", "| Chip    Serial ", "has an unknown heading"),
        ("910b-26.0", "HBM-Usage(MB)", "Fast-Usage(MB)", r"its column fast-usage\(mb\) is memory of a kind"),
        ("910-21.0", "HBM-Usage(MB)", "HBMs-Used(GB)", r"its column hbms-used\(gb\) is memory of a kind"),
    ],
)
def test_what_does_not_fit_is_shown(name, old, new, words):
    text = read(name)
    assert old in text
    with pytest.raises(ToolFailed, match=words) as caught:
        parse_info(text.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_a_process_of_a_card_with_two_chips_must_name_one():
    text = read("a3-26.0").replace("NPU     Chip  ", "NPU ID        ", 1).replace("| 0       0   ", "| 0           ")
    with pytest.raises(ToolFailed, match="or on several"):
        parse_info(text.replace("| 0       1   ", "| 0           "))


def test_memory_without_a_number():
    text = read("910b-26.0").replace("| 15002 ", "| NA    ")
    assert parse_info(text)[1].processes[0] == (485901, "pytest", None)


def test_pids_inside_a_container():
    assert parse_container_pids(read("a3-26.0-container")) == {77001: 231, 77344: 57}
    assert parse_container_pids(read("a3-25.2")) == {}


def test_nothing_but_words_is_no_table():
    assert parse_info("There is no NPU card on this server.\n") == []


def test_mapping_of_950_has_no_logic_id():
    mapping = "\tNPU ID   Slot ID   Chip ID   Chip Phy-ID   Chip Name\n\t3        4         0         2   Ascend950PR\n"
    assert parse_mapping(mapping) == {}


def test_board_of_950():
    board = "\tNPU ID      : 0\n\tProduct Name : -\n\tNPU Name    : 9579\n\tChip Name   : Ascend950PR\n"
    assert parse_board(board) == "Ascend950PR_9579"
