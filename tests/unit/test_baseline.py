"""Baselines: no false alarm between equal sessions, and a real loss is seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipval.errors import InputError
from clipval.throughput import baseline
from clipval.throughput.noise import of_row, pooled
from clipval.throughput.statistics import summarise

KEY = {"cpu": "x", "torch": "2"}
NAMES = [
    baseline.row_name(b, t, n, "inference") for b in ("pytorch", "onnx") for t in ("vision", "text") for n in range(6)
]
SPEEDS = np.geomspace(50, 5000, len(NAMES))


def session(rng, noise=0.015, slow=()):
    """One session; noise is the standard deviation of log samples/s, of all rows or of each."""
    drawn = SPEEDS * np.exp(rng.normal(0, noise, len(NAMES)))
    return {name: [float(value * (0.9 if name in slow else 1))] for name, value in zip(NAMES, drawn)}


def rate(rng, tries, *, noise, sessions=5, slow=()):
    """Share of judgements that are `regressed`: of rows named slow, or of all where none is."""
    found = [statuses(made(rng, sessions, noise), session(rng, noise, slow)) for _ in range(tries)]
    lost = [one[name] == "regressed" for one in found for name in slow or NAMES]
    return sum(lost) / len(lost)


def made(rng, sessions=5, noise=0.015):
    return baseline.merge([baseline.Baseline(KEY, session(rng, noise)) for _ in range(sessions)])


def statuses(base, rows):
    return {name: baseline.judge(base, KEY, name, values[0]).status for name, values in rows.items()}


def test_a_neighbour_in_one_session_does_not_hide_a_loss():
    """Four rows of one session 5 to 9 % slower, as seen on a shared host: bounds stay, the median does not move."""
    rng = np.random.default_rng(10)
    rows = made(rng, 6, 0.01).rows
    for name, lost in zip(NAMES, (0.05, 0.09, 0.07, 0.06)):
        rows[name][2] *= 1 - lost
    base = baseline.Baseline(KEY, rows)
    assert pooled(base.rows) < 0.0125
    found = statuses(base, session(rng, 0.01, slow=NAMES[:8]))
    assert [name for name, status in found.items() if status == "regressed"] == NAMES[:8]


def test_equal_sessions_raise_no_alarm_in_20_tries():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert "regressed" not in statuses(made(rng), session(rng)).values()


@pytest.mark.proof
@pytest.mark.parametrize("noise", [0.01, 0.015, 0.03])
def test_false_alarms_are_as_rare_as_said(noise):
    assert rate(np.random.default_rng(1), 40, noise=noise) <= 3 / 960  # at most 0.3 are expected


@pytest.mark.proof
def test_rows_that_scatter_differently_do_not_share_one_noise():
    """Every sixth row is four times as noisy as the others; one noise for all gives 0.03 false alarms in those."""
    noise = np.where(np.arange(len(NAMES)) % 6 == 0, 0.03, 0.008)
    rng = np.random.default_rng(2)
    assert rate(rng, 40, noise=noise, sessions=10) <= 2e-3
    base = made(rng, 10, noise)
    wide, narrow = (of_row(base.rows, NAMES[n])[0] for n in (0, 1))
    assert wide > 0.015 > narrow
    quiet = tuple(name for name, spread in zip(NAMES, noise) if spread < 0.01)
    assert rate(rng, 20, noise=noise, sessions=10, slow=quiet) >= 0.99


def test_rows_that_scatter_alike_share_their_noise():
    base = made(np.random.default_rng(3), noise=0.015)
    found = {of_row(base.rows, name) for name in NAMES}
    assert found == {(pooled(base.rows), 4.0 * len(NAMES))}
    assert pooled(base.rows) == pytest.approx(0.015, rel=0.2)


@pytest.mark.parametrize(("noise", "sessions"), [(0.01, 5), (0.015, 10)])
def test_a_slowdown_of_ten_percent_is_caught_in_20_of_20(noise, sessions):
    rng = np.random.default_rng(4)
    for slow in NAMES[:20]:
        assert statuses(made(rng, sessions, noise), session(rng, noise, [slow]))[slow] == "regressed"


@pytest.mark.proof
def test_how_often_a_slowdown_is_caught():
    rng = np.random.default_rng(5)
    assert rate(rng, 30, noise=0.015, sessions=5, slow=NAMES) >= 0.985
    assert rate(rng, 30, noise=0.015, sessions=10, slow=NAMES) >= 0.995


@pytest.mark.parametrize(
    ("noise", "bound"),
    [
        (0.003, 1 - baseline.FLOORS["undisturbed"]),  # a quiet device: less than the floor is no loss
        (0.01, 1 - baseline.REACH),  # room between the rare limit and the usual one
        (0.02, None),  # a noisy host: the prediction limit itself
    ],
)
def test_where_the_bound_lies(noise, bound):
    base = made(np.random.default_rng(6), 10, noise)
    found = baseline.judge(base, KEY, NAMES[0], 1e9)
    share = found.bound / found.expected
    assert share == pytest.approx(bound) if bound else 0.90 < share < 0.94


def test_sessions_that_agree_to_the_last_digit_leave_the_floor():
    base = baseline.Baseline(KEY, {name: [100.0] * 5 for name in NAMES})
    assert baseline.judge(base, KEY, NAMES[0], 97.1).status == "ok"
    assert baseline.judge(base, KEY, NAMES[0], 96.9).status == "regressed"
    mixed = baseline.Baseline(KEY, {**made(np.random.default_rng(7)).rows, NAMES[0]: [100.0] * 5})
    assert baseline.judge(mixed, KEY, NAMES[0], 70.0).status == "regressed"


def test_a_baseline_of_one_row_is_judged_by_its_own_noise():
    values = [100.0, 101.0, 99.0, 100.5, 99.5]
    base = baseline.Baseline(KEY, {NAMES[0]: values})
    assert of_row(base.rows, NAMES[0]) == (pytest.approx(np.log(values).std(ddof=1)), 4.0)
    assert baseline.judge(base, KEY, NAMES[0], 95.0).status == "ok"  # four degrees of freedom: 10 % is needed
    assert baseline.judge(base, KEY, NAMES[0], 85.0).status == "regressed"


def test_faster_never_fails_and_asks_for_a_new_baseline():
    rng = np.random.default_rng(3)
    base = made(rng)
    found = baseline.judge(base, KEY, NAMES[0], SPEEDS[0] * 1.3)
    assert found.status == "improved"
    assert "recording a new baseline" in found.reason


@pytest.mark.parametrize("measured", [float("nan"), 0.0, -1.0])
def test_what_is_no_speed_is_a_loss(measured):
    assert baseline.judge(made(np.random.default_rng(4)), KEY, NAMES[0], measured).status == "regressed"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1, 1e5), min_size=5, max_size=12), st.floats(0.1, 1e6))
def test_a_judgement_holds_together(values, measured):
    base = baseline.Baseline(KEY, {NAMES[0]: values, NAMES[1]: values[:1]})
    found = baseline.judge(base, KEY, NAMES[0], measured)
    assert 0 <= found.bound <= found.expected * (1 - baseline.FLOORS["undisturbed"]) * (1 + 1e-9)
    assert (found.status == "regressed") == (measured < found.bound)
    assert baseline.judge(base, KEY, NAMES[0], measured * 2).status != "regressed" or found.status == "regressed"


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


def test_merging_keeps_every_session():
    rng = np.random.default_rng(9)
    first, second = made(rng, 5), made(rng, 3)
    assert baseline.merge([first, second]).rows[NAMES[0]] == first.rows[NAMES[0]] + second.rows[NAMES[0]]


def test_sessions_of_other_settings_do_not_merge():
    rows = session(np.random.default_rng(8))
    with pytest.raises(InputError, match="sessions differ"):
        baseline.merge([baseline.Baseline(KEY, rows), baseline.Baseline({"cpu": "y"}, rows)])
    with pytest.raises(InputError, match="other rows"):
        baseline.merge([baseline.Baseline(KEY, rows), baseline.Baseline(KEY, {NAMES[0]: [1.0]})])
    with pytest.raises(InputError, match="no sessions"):
        baseline.merge([])


def test_the_key_names_what_matters():
    described = {"packages": {"torch": "2"}, "cpu": "c", "usable_cores": 4, "python": "3.11.7"}
    key = baseline.key_of(described, "abc", None, {"om": "om on Ascend910B4"})
    assert key["backend om"] == "om on Ascend910B4"
    assert (key["python"], key["onnxruntime"], key["model"]) == ("3.11", "absent", "abc")
    assert key["OMP_NUM_THREADS"] == "unset"
    other = baseline.key_of({**described, "variables": {"OMP_NUM_THREADS": "1"}}, "abc", None, {})
    assert baseline.differences(baseline.Baseline(key, {}), other) == ["OMP_NUM_THREADS: baseline unset, now 1"]


def test_a_loss_that_the_machine_shows_too_is_no_comparison():
    found = baseline.judge(made(np.random.default_rng(0)), KEY, NAMES[0], 1.0)
    assert found.status == "regressed"
    slow = baseline.on_slow_machine(found, 0.5)
    assert slow.status == "slow_machine"
    assert "the machine itself reached only 50% of its speed" in slow.reason
    assert baseline.on_slow_machine(found, 0.95) == found
    fine = baseline.judge(made(np.random.default_rng(0)), KEY, NAMES[0], 1e9)
    assert baseline.on_slow_machine(fine, 0.5) == fine


def test_sessions_keep_the_machines_best():
    sessions = [baseline.Baseline(KEY, {"a": [1.0]}, machine) for machine in (5.5e4, 6e4, 5.8e4)]
    assert baseline.merge(sessions).machine == 6e4


def test_a_session_of_a_slow_machine_is_not_merged():
    sessions = [baseline.Baseline(KEY, {"a": [1.0]}, machine) for machine in (6e4, 3.6e4, 6e4)]
    with pytest.raises(InputError, match="slow in session 2; record it when"):
        baseline.merge(sessions)


def made_of(rng, sessions=5, noise=0.01):
    """A baseline whose medians and means are 2 and 4 % slower than what is undisturbed, and noisier."""
    found = []
    for _ in range(sessions):
        rows = session(rng, noise)
        medians = {name: [values[0] * 0.98 * np.exp(rng.normal(0, 0.03))] for name, values in rows.items()}
        means = {name: [values[0] * 0.96 * np.exp(rng.normal(0, 0.04))] for name, values in rows.items()}
        found.append(baseline.Baseline(KEY, rows, medians=medians, means=means))
    return baseline.merge(found)


def timed(row, slow=0.0, by=2.0, noise=0.01, seed=0, count=200):
    """The timing of a row, a share of whose calls take `by` times as long."""
    rng = np.random.default_rng(seed)
    seconds = 8 / SPEEDS[row] * np.exp(np.abs(rng.normal(0, noise, count)))
    seconds[: round(slow * count)] *= by
    return summarise(rng.permutation(seconds), 8, "inference")


def stands(base, timing, row=0):
    return baseline.standing(base, KEY, {"inference": NAMES[row]}, {"inference": timing})


@pytest.mark.parametrize(
    ("slow", "by", "figure"),
    [(0.9, 2, "median"), (0.9, 1.4, "median"), (0.6, 3, "median"), (0.1, 10, "mean"), (0.3, 4, "mean")],
)
def test_most_calls_slow_while_the_fastest_are_what_they_were(slow, by, figure):
    base, timing = made_of(np.random.default_rng(11)), timed(0, slow, by)
    assert baseline.judge(base, KEY, NAMES[0], timing.undisturbed).status == "ok"
    found = stands(base, timing)
    assert (found.status, found.figure) == ("regressed", figure)
    assert f"samples/s by the {figure} of the calls" in found.reason


def test_medians_and_means_of_equal_sessions_raise_no_alarm():
    rng = np.random.default_rng(12)
    for n in range(8):
        base = made_of(rng)
        for row in range(len(NAMES)):
            found = stands(base, timed(row, slow=0.05, by=1.5, noise=0.03, seed=1000 * n + row), row)
            assert found.status in ("ok", "improved")


def test_a_median_that_other_processes_moved_is_no_loss():
    base = made_of(np.random.default_rng(13))
    found = stands(base, timed(0, 0.9, 2))
    busy = baseline.on_busy_host(found, "other processes kept 1.5 cores busy, allowed 0.5")
    assert busy.status == "slow_machine"
    assert busy.reason.startswith("other processes kept 1.5 cores busy")
    assert baseline.on_busy_host(found, "") == found
    lost = stands(base, timed(0, 1.0, 2))
    assert lost.figure == "undisturbed"
    assert baseline.on_busy_host(lost, "other processes") == lost
