"""The command that makes a baseline of several processes."""

import argparse
import subprocess
from pathlib import Path

import pytest

from clipval.commands.speed import COMMANDS
from clipval.errors import InputError
from clipval.throughput import baseline


@pytest.fixture
def sessions(monkeypatch):
    """Processes that end with the given exit codes, on a machine of given speeds; of each, the arguments."""
    codes, machines, started = [], [], []

    def run(command, **_):
        started.append(command)
        code = codes.pop(0) if codes else 0
        if code == 0:
            rows = {"onnx/text/8/inference": [100.0 + len(started)]}
            machine = machines.pop(0) if machines else 6e4
            baseline.save(baseline.Baseline({"cpu": "x"}, rows, machine), Path(command[-1]))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    return codes, machines, started


def make(file):
    given = ["baseline", "--save", str(file), "--sessions=5", "--batch-sizes", "8"]
    return COMMANDS["baseline"].run(argparse.Namespace(save=file, sessions=5, given=given))


def test_a_baseline_is_made_of_fresh_processes(sessions, tmp_path, capsys):
    assert make(tmp_path / "b.json") == 0
    _, _, started = sessions
    assert len({command[-1] for command in started}) == 5
    assert all("--sessions=5" not in command and "--batch-sizes" in command for command in started)
    assert baseline.load(tmp_path / "b.json").rows == {"onnx/text/8/inference": [101.0, 102.0, 103.0, 104.0, 105.0]}
    assert "1 rows, 5 sessions" in capsys.readouterr().out


def test_a_session_that_was_disturbed_is_made_a_second_time(sessions, tmp_path, capsys):
    codes, _, started = sessions
    codes.extend([0, 1, 0, 0, 1])
    assert make(tmp_path / "b.json") == 0
    assert len(started) == 7
    assert capsys.readouterr().err.count("once more") == 2


def test_a_session_of_a_slow_machine_is_made_a_second_time(sessions, tmp_path, capsys):
    _, machines, started = sessions
    machines.extend([3.6e4, 6e4, 6e4, 6e4, 6e4])
    assert make(tmp_path / "b.json") == 0
    assert len(started) == 6
    assert "session 1 of 5, once more" in capsys.readouterr().err
    assert baseline.load(tmp_path / "b.json").rows["onnx/text/8/inference"][0] == 106.0


def test_a_machine_that_is_slow_again_makes_no_baseline(sessions, tmp_path):
    _, machines, _ = sessions
    machines.extend([3.6e4, 6e4, 6e4, 6e4, 6e4, 3.6e4])
    with pytest.raises(InputError, match="the machine was slow in session 1"):
        make(tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(("ended", "tries"), [([0, 1, 1], 3), ([2], 1)])
def test_a_session_that_fails_is_no_baseline(sessions, tmp_path, ended, tries):
    codes, _, started = sessions
    codes.extend(ended)
    with pytest.raises(InputError, match=f"exit code {ended[-1]}, see above"):
        make(tmp_path / "b.json")
    assert len(started) == tries
    assert not (tmp_path / "b.json").exists()
