"""Outputs of npu-smi as the families print them, written after its source and after what users posted."""

import os
import stat
from pathlib import Path

import pytest

from clipval.ascend import npu_smi
from clipval.errors import BackendUnavailable, ToolFailed
from tests.simulator import environment

TABLES = Path(__file__).parent / "npu_smi"

INFO_310P = """
+--------------------------------------------------------------------------------------------------------+
| npu-smi 23.0.rc3                                 Version: 23.0.rc3                                     |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 32      310P3                 | OK              | NA           47                0     / 0             |
| 0       1                     | 0000:02:00.0    | 0            1600 / 21534                            |
+-------------------------------+-----------------+------------------------------------------------------+
| 32      310P3                 | Warning         | NA           49                0     / 0             |
| 1       0                     | 0000:02:00.0    | 85           9374 / 21534                            |
+===============================+=================+======================================================+
| 32768   310P3                 | OK              | NA           44                15    / 15            |
| 0       2                     | 0000:82:00.0    | 0            1694 / 44280                            |
+===============================+=================+======================================================+
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Chip                  | Process id      | Process name             | Process memory(MB)        |
+===============================+=================+======================================================+
| No running processes found in NPU 32                                                                   |
+===============================+=================+======================================================+
| 32768   0                     | 4711            | my program               | 62                        |
+===============================+=================+======================================================+
"""
INFO_910B = """
[WARNING]The driver package may not be completely installed.
+------------------------------------------------------------------------------------------------+
| npu-smi 23.0.0                   Version: 23.0.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 86.5        34                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          2866 / 32768         |
+===========================+===============+====================================================+
| 3     910B4               | OK            | 92.1        36                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          31052/ 32768         |
+===========================+===============+====================================================+
| 6     910B4               | Alarm         | NA          NA                NA   / NA            |
| 0                         | NA            | NA          NA   / NA         NA   / NA            |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
| 3       0                 | 2120534       |                          | 28197                   |
| 3       0                 | 2120535       |                          | 103                     |
+===========================+===============+====================================================+
| No running processes found in NPU 6                                                            |
+===========================+===============+====================================================+
"""
INFO_A3 = """
+------------------------------------------------------------------------------------------------+
| npu-smi 25.0.rc1.1               Version: 25.0.rc1.1                                           |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 165.5       36                0    / 0             |
| 0     4                   | 0000:9D:00.0  | 0           0    / 0          3108 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     5                   | 0000:9F:00.0  | 0           0    / 0          2872 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""
INFO_310 = """
+------------------------------------------------------------------------------+
| npu-smi 21.0.2                       Version: 21.0.2                         |
+-------------------+-----------------+----------------------------------------+
| NPU     Name      | Health          | Power(W)          Temp(C)              |
| Chip    Device    | Bus-Id          | AICore(%)         Memory-Usage(MB)     |
+===================+=================+========================================+
| 1       310       | OK              | 12.8              45                   |
| 0       0         | 0000:05:00.0    | 0                 2457 / 8192          |
+-------------------+-----------------+----------------------------------------+
| 1       310       | OK              | 12.8              45                   |
| 1       1         | 0000:06:00.0    | 0                 2457 / 8192          |
+===================+=================+========================================+
"""
MAPPING_A3 = """
	NPU ID                  Chip ID                 Chip Logic ID           Chip Phy-ID             Chip Name
	0                       0                       0                       4                       Ascend 910
	0                       1                       1                       5                       Ascend 910
	0                       2                       -                       -                       Mcu
"""


@pytest.fixture
def say(tmp_path, monkeypatch):
    """An npu-smi that prints given texts by its arguments, and fails on any other."""

    def say(code=0, **texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        program = tmp_path / "npu-smi"
        program.write_text(
            f"""#!/bin/sh
cat "{tmp_path}/$(echo "$*" | tr -d " -").txt" 2>/dev/null || exit 3
exit {code}
"""
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
        monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)

    return say


def test_310p_two_chips_and_far_npu_ids(say):
    say(info=INFO_310P)
    npus = npu_smi.list_npus()
    assert [(one.npu_id, one.chip_id, one.logic_id) for one in npus] == [(32, 1, 0), (32, 0, 1), (32768, 0, 2)]
    assert {one.soc_version for one in npus} == {"Ascend310P3"}
    assert [(one.memory_used_mb, one.memory_total_mb) for one in npus] == [(9374, 21534), (1600, 21534), (1694, 44280)]
    assert [bool(one.why_busy()) for one in npus] == [True, False, True]
    assert npus[2].processes == (npu_smi.Process(4711, "my program", 62),)
    assert npus[0].health == "Warning"


def test_910b_blank_names_warning_and_touching_slash(say):
    say(info=INFO_910B)
    first, second, dead = npu_smi.list_npus()
    assert first.why_busy() == ""
    assert first.soc_version == "Ascend910B4"
    assert second.memory_used_mb == 31052
    assert [process.pid for process in second.processes] == [2120534, 2120535]
    assert "2 process(es) on it: 2120534 (no name, 28197 MB)" in second.why_busy()
    assert dead.health == "Alarm"
    assert "no memory in use" in dead.why_busy()


def test_ignored_processes_take_their_memory_with_them(say):
    say(info=INFO_910B)
    second = npu_smi.npu(1)
    assert "2120535" in second.why_busy(ignore_pids=[2120534])
    assert second.why_busy(ignore_pids=[2120534, 2120535]) == ""


def test_high_memory_without_a_process_row_is_busy(say):
    say(info=INFO_910B.replace("2866 / 32768", "3900 / 32768"))
    assert "3900 of 32768 MB in use, an idle one has at most 3655 MB" in npu_smi.npu(0).why_busy()


def test_a3_logic_ids_are_not_phy_ids(say):
    board = "\tNPU ID : 0\n\tChip Name                      : Ascend910\n\tNPU Name                       : 9392\n"
    say(info=INFO_A3, infom=MAPPING_A3, infotboardi0c0=board, infotboardi0c1=board)
    npus = npu_smi.list_npus()
    assert [one.logic_id for one in npus] == [0, 1]
    assert {one.soc_version for one in npus} == {"Ascend910_9392"}


def test_a3_without_a_board_lists_but_names_no_soc(say):
    say(info=INFO_A3)
    npu = npu_smi.npu(1)
    assert npu.why_busy() == ""
    with pytest.raises(ToolFailed, match="give --soc-version"):
        assert npu.soc_version


def test_310_and_a_name_of_digits_only(say):
    say(info=INFO_310)
    assert [(one.soc_version, one.logic_id) for one in npu_smi.list_npus()] == [("Ascend310", 0), ("Ascend310", 1)]


def test_310b_without_a_bus_id(say):
    table = INFO_310.replace(" 310  ", " 310B4").replace("0000:05:00.0", "NA          ").replace("OK   ", "Alarm")
    say(info=table.replace("0000:06:00.0", "NA          "))
    npus = npu_smi.list_npus()
    assert [(one.soc_version, one.chip_id, one.health) for one in npus] == [
        ("Ascend310B4", 0, "Alarm"),
        ("Ascend310B4", 1, "Alarm"),
    ]


def test_a_chip_without_its_second_row_is_an_error(say):
    lines = INFO_910B.splitlines(keepends=True)
    say(info="".join(line for line in lines if "0000:C1:00.0" not in line))
    with pytest.raises(ToolFailed, match=r"cannot read the line '\| 3 910B4 .*layout is unknown"):
        npu_smi.list_npus()


def test_long_process_names_break_the_frame(say):
    say(info=INFO_910B.replace("|                          | 28197                   |", f"| {'x' * 40} | 28197"))
    assert npu_smi.npu(1).processes[0] == npu_smi.Process(2120534, "x" * 40, 28197)


def test_windows_line_ends_and_old_910(say):
    say(info=INFO_910B.replace("910B4", "910  ").replace("\n", "\r\n"))
    assert npu_smi.npu(0).soc_version == "Ascend910"


def test_910a_keeps_its_system_in_ddr(say):
    say(info=INFO_910B.replace("0    / 0          2866 / 32768", "2432 / 15571      0    / 32768"))
    assert (npu_smi.npu(0).memory_used_mb, npu_smi.npu(0).memory_total_mb) == (0, 32768)


def test_mapping_wins_over_the_order(say):
    header = "NPU ID  Chip ID  Chip Logic ID  Chip Name"
    mapping = f"{header}\n0 0 1 Ascend 910B4\n0 1 - Mcu\n3 0 0 Ascend 910B4\n6 0 2 Ascend 910B4\n"
    say(info=INFO_910B, infom=mapping)
    assert npu_smi.npu(0).npu_id == 3
    assert npu_smi.npu(1).npu_id == 0


def test_visible_devices_are_numbered_anew(say, monkeypatch):
    say(info=INFO_910B)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,0")
    assert [npu_smi.npu(device).npu_id for device in (0, 1)] == [6, 0]
    with pytest.raises(BackendUnavailable, match=r"leaves devices 0 to 1"):
        npu_smi.npu(2)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "two")
    with pytest.raises(BackendUnavailable, match="expected logic ids"):
        npu_smi.npu(0)


def test_a_device_that_is_not_there(say):
    say(info=INFO_910B)
    with pytest.raises(BackendUnavailable, match="no NPU has logic id 7, npu-smi shows 0, 1, 2"):
        npu_smi.npu(7)


@pytest.mark.parametrize(
    ("code", "text", "error", "words"),
    [
        (1, "There is no NPU card on this server.\n", BackendUnavailable, "no NPU card"),
        (0, "dcmi module initialize failed. ret is -8005\n", BackendUnavailable, "driver"),
        (1, "segmentation fault\n", ToolFailed, "exit code 1"),
        (0, "", ToolFailed, "empty"),
    ],
)
def test_outputs_without_an_npu(say, code, text, error, words):
    say(code, info=text)
    with pytest.raises(error, match=words):
        npu_smi.list_npus()


def test_a_table_counts_even_with_a_bad_exit_code(say):
    say(1, info=INFO_910B)
    assert len(npu_smi.list_npus()) == 3


def test_missing_hanging_and_broken_programs(say, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match="not found on PATH"):
        npu_smi.list_npus()
    say(info=INFO_910B)
    (tmp_path / "npu-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(npu_smi, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(ToolFailed, match="hangs"):
        npu_smi.list_npus()
    (tmp_path / "npu-smi").write_text("#!/nowhere/sh\n")
    with pytest.raises(BackendUnavailable, match="cannot be started"):
        npu_smi.list_npus()


def with_processes(npu, *processes, container_pids=()):
    rows = tuple(npu_smi.Process(*process) for process in processes)
    return npu_smi.Npu(**{**vars(npu), "processes": rows, "container_pids": dict(container_pids)})


OTHER, OURS, THIRD = (77001, "", 9000), (77344, "", 3111), (78002, "", 120)


@pytest.fixture
def chip(say):
    say(info=INFO_910B)
    return npu_smi.npu(1)


def test_own_pids_are_those_that_appeared(chip):
    before, after = with_processes(chip, OTHER), with_processes(chip, OTHER, OURS)
    assert npu_smi.appeared(before, after) == {OURS[0]}
    assert npu_smi.appeared(after, after) == frozenset(), "what was there before is somebody else's"


def test_a_process_that_came_with_ours_is_not_ours(chip):
    """Three ways to tell them apart; without any, none counts as ours."""
    before = with_processes(chip)
    mine = (os.getpid(), "python3", 400)
    assert npu_smi.appeared(before, with_processes(chip, mine, THIRD)) == {os.getpid()}
    inside = {OURS[0]: os.getpid(), OTHER[0]: os.getpid() + 1}
    assert npu_smi.appeared(before, with_processes(chip, OURS, OTHER, THIRD, container_pids=inside)) == {OURS[0]}
    assert npu_smi.appeared(before, with_processes(chip, OTHER, container_pids=inside)) == frozenset()
    both = with_processes(chip, OURS, THIRD)
    assert npu_smi.appeared(before, both) == frozenset()
    assert "2 process(es) on it" in both.why_busy(ignore_pids=npu_smi.appeared(before, both))


def test_our_own_number_can_be_another_process_in_a_container(chip):
    stranger = (os.getpid(), "", 9000)
    before, after = with_processes(chip, stranger), with_processes(chip, stranger, OURS)
    own = npu_smi.appeared(before, after)
    assert own == {OURS[0]}
    assert str(os.getpid()) in after.why_busy(ignore_pids=own)


def test_own_memory_on_one_chip_is_not_subtracted_from_another(say):
    text = (TABLES / "a3-26.0.txt").read_text(encoding="utf-8")
    say(info=text)
    first, second = npu_smi.npu(0), npu_smi.npu(1)
    assert (first.why_busy([692301]), second.why_busy([692301])) == ("", "")
    say(info=text.replace("15240/ 65536", "19240/ 65536"))
    assert npu_smi.npu(0).why_busy([692301]) == ""
    assert "6880 of 65536 MB in use" in npu_smi.npu(1).why_busy([692301])


def test_own_memory_that_is_not_shown_leaves_the_rest_unknown(chip):
    assert "no memory of our own process 5" in with_processes(chip, (5, "", None)).why_busy(ignore_pids=[5])
    assert "5 (no name, memory not shown)" in with_processes(chip, (5, "", None)).why_busy()


def test_950_has_no_chip_in_its_table_and_its_board_takes_none(say):
    board = "\tNPU ID : 2\n\tNPU Name : 9579\n\tChip Name : Ascend950PR\n"
    mapping = "NPU ID  Slot ID  Chip ID  Chip Phy-ID  Chip Name\n0  1  0  0  Ascend950PR\n2  2  0  2  Ascend950PR\n"
    text = (TABLES / "950pr-25.7.txt").read_text(encoding="utf-8")
    say(info=text, infom=mapping, infotboardi0="Error parameter of -c\n", infotboardi2=board)
    first, second = npu_smi.list_npus()
    assert (first.logic_id, second.logic_id, second.npu_id, second.chip_id) == (0, 1, 2, 0)
    assert second.soc_version == "Ascend950PR_9579"
    assert second.why_busy() == ""
    with pytest.raises(ToolFailed, match="npu-smi info -t board -i 0: no Chip Name and NPU Name of chip 0"):
        assert first.soc_version


def test_a_mapping_that_lacks_a_chip_is_an_error(say):
    mapping = "NPU ID  Chip ID  Chip Logic ID  Chip Name\n0 0 1 Ascend 910B4\n3 0 0 Ascend 910B4\n"
    say(info=INFO_910B, infom=mapping)
    with pytest.raises(ToolFailed, match="no Chip Logic ID of NPU 6 chip 0"):
        npu_smi.list_npus()


@pytest.mark.parametrize(
    ("chip", "soc"),
    [
        ("310P3", "Ascend310P3"),
        ("910A", "Ascend910A"),
        ("910B4", "Ascend910B4"),
        ("910_9392", "Ascend910_9392"),
        ("950PR_9579", "Ascend950PR_9579"),
    ],
)
def test_every_simulated_family(monkeypatch, chip, soc):
    for name, value in environment(chip=chip, npus=3, fault="busy,driver_warning", container=1).items():
        monkeypatch.setenv(name, value)
    npus = npu_smi.list_npus()
    assert [one.logic_id for one in npus] == [0, 1, 2]
    assert {one.soc_version for one in npus} == {soc}
    assert [bool(one.why_busy()) for one in npus] == [True, False, False]
    assert npu_smi.version() == "23.0.3"
