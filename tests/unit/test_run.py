"""The account of a run: what is missing, left out or unexpected, and what survives a crash."""

import msgspec
import pytest

from clipval import results, run
from clipval.chain import Chain
from clipval.errors import InputError
from clipval.options import Settings
from clipval.results import Figure
from clipval.run import Account
from clipval.throughput.baseline import Judgement
from tests.unit.runs import throughput


def figure(gate="parity/onnx/vision", verdict="pass"):
    return Figure(gate=gate, metric="m", unit="u", verdict=verdict, measured=0.5)


def test_a_promised_gate_without_a_figure_fails_the_run(tmp_path):
    account = Account(["parity/onnx/vision", "parity/onnx/text"], tmp_path / "r.jsonl")
    account.add([figure()])
    assert account.missing == ["parity/onnx/text"]
    assert account.failed
    account.add([figure("parity/onnx/text")])
    assert not account.failed
    account.add([figure("parity/onnx/text", "fail")])
    assert account.failed


@pytest.mark.parametrize("deliberate", [True, False])
def test_what_a_selection_leaves_out_is_left_out_only_on_purpose(deliberate, tmp_path):
    both = ["parity/onnx/vision", "parity/onnx/text"]
    account = Account(both, tmp_path / "r.jsonl", deliberate, ["-k 'vision'"])
    assert account.missing == both  # as long as nothing was collected
    account.selected = both[:1]
    account.add([figure()])
    assert (account.missing, account.left_out) == (([], both[1:]) if deliberate else (both[1:], []))
    assert account.failed != deliberate
    account.always = both[1:]
    assert account.missing == both[1:]


def test_a_figure_that_no_test_promised_fails_the_run(tmp_path):
    account = Account(["parity/onnx/vision"], tmp_path / "r.jsonl")
    account.add([figure()])
    assert not account.failed
    account.add([figure("parity/onnx/txet")])
    assert account.failed
    (failure,) = account.run(Chain(Settings())).failures
    assert failure.message.startswith("parity/onnx/txet: a figure for a gate that no test promised")
    account.selected = ["parity/onnx/vision", "parity/onnx/txet"]  # a gate of the user's own, named on its test
    assert not account.failed


def test_figures_are_on_the_disk_as_they_come(tmp_path):
    account = Account([], tmp_path / "runs" / "r.jsonl")
    account.add([figure()])
    account.add([figure("recall/onnx/x"), figure("recall/onnx/y")])
    assert results.read(account.file) == account.figures


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    file = tmp_path / "r.jsonl"
    results.append(file, [figure(), figure()])
    file.write_bytes(file.read_bytes()[:-20])
    assert len(results.read(file)) == 1
    file.write_bytes(b"{broken\n" + file.read_bytes())
    with pytest.raises(InputError, match="r.jsonl, line 1"):
        results.read(file)


def test_rows_of_throughput_that_gate_nothing_are_counted(tmp_path):
    account = Account([], tmp_path / "r.jsonl")
    rows = [throughput("onnx", "text", 8, 10.0, verdict) for verdict in ("NOISY", "VALID", "NOISY")]
    account.add([*rows, msgspec.structs.replace(rows[0], verdict="pass"), figure(verdict="info")])
    (line,) = account.run(Chain(Settings())).not_validated[-1:]
    assert line.startswith("throughput: rows (2 NOISY, 1 VALID) are not gated; name --backends")


def test_rows_that_became_faster_suggest_a_new_baseline(tmp_path):
    account = Account([], tmp_path / "r.jsonl")
    standings = [
        throughput("onnx", "text", n, 10.0, standing=Judgement(s, 9.0, 8.0, ""))
        for n, s in ((1, "ok"), (8, "improved"))
    ]
    account.add(standings[:1])
    assert account.run(Chain(Settings())).advice == []
    account.add(standings)
    (line,) = account.run(Chain(Settings())).advice
    assert line.startswith("1 rows are faster than the baseline (e.g. throughput/onnx/text/8)")


def test_figures_travel_as_json():
    assert results.from_json(results.to_json(figure())) == figure()


def test_old_runs_are_cleared_away(tmp_path):
    (tmp_path / "runs").mkdir()
    for n in range(30):
        (tmp_path / "runs" / f"2026010{n:02}.jsonl").touch()
    new = run.results_file(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == run.KEPT_RUNS
    assert not new.exists()
