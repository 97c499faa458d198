"""Baselines: no false alarm between equal sessions, and a real loss is seen."""

import numpy as np
import pytest

from clipval import baseline
from clipval.errors import InputError

KEY = {"cpu": "x", "torch": "2"}
NAMES = [
    baseline.row_name(b, t, n, "inference") for b in ("pytorch", "onnx") for t in ("vision", "text") for n in range(6)
]
SPEEDS = np.geomspace(50, 5000, len(NAMES))


def session(rng, noise=0.015, slow=()):
    drawn = SPEEDS * np.exp(rng.normal(0, noise, len(NAMES)))
    return {name: [float(value * (0.9 if name in slow else 1))] for name, value in zip(NAMES, drawn)}


def made(rng, sessions=5, noise=0.015):
    return baseline.merge([baseline.Baseline(KEY, session(rng, noise)) for _ in range(sessions)])


def statuses(base, rows):
    return {name: baseline.judge(base, KEY, name, values[0]).status for name, values in rows.items()}


def test_equal_sessions_raise_no_alarm_in_20_tries():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert "regressed" not in statuses(made(rng), session(rng)).values()


def test_false_alarms_are_as_rare_as_said():
    rng = np.random.default_rng(1)
    found = [status for _ in range(200) for status in statuses(made(rng), session(rng)).values()]
    assert found.count("regressed") <= 5  # of 4800; 0.5 are expected


def test_a_slowdown_of_ten_percent_is_caught_in_20_of_20():
    rng = np.random.default_rng(2)
    for _ in range(20):
        slow = set(NAMES[:3])
        found = statuses(made(rng, noise=0.01), session(rng, noise=0.01, slow=slow))
        assert {name for name, status in found.items() if status == "regressed"} == slow


def test_faster_never_fails_and_asks_for_a_new_baseline():
    rng = np.random.default_rng(3)
    base = made(rng)
    found = baseline.judge(base, KEY, NAMES[0], SPEEDS[0] * 1.3)
    assert found.status == "improved"
    assert "make a new baseline" in found.reason


def test_nan_is_a_loss():
    assert baseline.judge(made(np.random.default_rng(4)), KEY, NAMES[0], float("nan")).status == "regressed"


def test_another_setting_is_not_comparable():
    found = baseline.judge(made(np.random.default_rng(5)), {**KEY, "torch": "3"}, NAMES[0], 1.0)
    assert found.status == "not_comparable"
    assert "torch: baseline 2, now 3" in found.reason


def test_too_few_sessions_and_unknown_rows():
    base = made(np.random.default_rng(6), sessions=4)
    assert baseline.judge(base, KEY, NAMES[0], 1.0).status == "no_baseline"
    assert baseline.judge(base, KEY, "om/text/1/execute", 1.0).status == "no_baseline"


def test_files_come_back(tmp_path):
    base = made(np.random.default_rng(7))
    baseline.save(base, tmp_path / "new" / "b.json")
    assert baseline.load(tmp_path / "new" / "b.json") == base


@pytest.mark.parametrize("content", ["", "{}", '{"key": {}, "rows": {}}', '{"key": {}, "rows": {"a": [0]}}'])
def test_bad_files_are_one_line(tmp_path, content):
    (tmp_path / "b.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="b.json"):
        baseline.load(tmp_path / "b.json")
    with pytest.raises(InputError, match="clipval baseline --save"):
        baseline.load(tmp_path / "none.json")


def test_sessions_of_other_settings_do_not_merge():
    rows = session(np.random.default_rng(8))
    with pytest.raises(InputError, match="sessions differ"):
        baseline.merge([baseline.Baseline(KEY, rows), baseline.Baseline({"cpu": "y"}, rows)])
    with pytest.raises(InputError, match="no sessions"):
        baseline.merge([])


def test_the_key_names_what_matters():
    described = {"packages": {"torch": "2"}, "cpu": "c", "usable_cores": 4, "python": "3.11.7"}
    key = baseline.key_of(described, "abc", None, {"om": "om on Ascend910B4"})
    assert key["backend om"] == "om on Ascend910B4"
    assert (key["python"], key["onnxruntime"], key["model"]) == ("3.11", "absent", "abc")
