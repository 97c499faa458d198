"""The second try of a row of throughput: when a loss of speed is believed."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from clipval import baseline, bench, throughput
from clipval.backends import Identity
from clipval.chain import Chain
from clipval.options import Settings
from clipval.throughput import Feed

EXPECTED = 1000.0  # samples/s of every session


class Backend:
    """Calls of no time; what they take is said by the test."""

    identity, tower = Identity("onnx", "1", "cpu", "fp32"), SimpleNamespace(name="text")


class Speeds:
    """Shares of the machine's speed, one a look: two a try."""

    best = 1.0

    def __init__(self, *shares):
        self.shares = list(shares)

    def now(self):
        return self.shares.pop(0)


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Run `second_try` on a row that makes so many samples/s in each try; what it gives, and the tries made."""
    made = []

    def run(speeds, pace, file=True):
        left = iter(speeds)

        def measure(*_, **options):
            row = throughput.summarise([8 / next(left)] * 20, 8, "inference")
            made.append(options)
            return {"inference": (row, "VALID", "")}

        monkeypatch.setattr(bench, "measure", measure)
        monkeypatch.setattr(bench, "baseline_key", lambda *_: {})
        saved = tmp_path / "b.json"
        baseline.save(baseline.Baseline({}, {"onnx/text/8/inference": [EXPECTED] * 5}), saved)
        settings = SimpleNamespace(
            perf_min_time=1.0, perf_max_time=10.0, perf_noise=None, baseline=saved if file else None
        )
        chain = SimpleNamespace(settings=settings, busy=lambda name: "")
        feed = Feed(np.zeros((8, 77), np.int64), 8)
        judged, earlier, share = bench.second_try(chain, Backend(), feed, 8, estimate=0.1, pace=pace)
        assert (share is None) == (pace is None)
        return judged["inference"][0].undisturbed, earlier, made

    return run


TRIES = bench.PATIENCE


def test_a_loss_that_stays_is_believed_of_a_machine_at_its_speed(tried):
    _, earlier, made = tried([800.0] * TRIES, Speeds(*[0.5, 0.5] * (TRIES - 1), 1.0, 0.95))
    assert (earlier.status, len(made)) == ("regressed", TRIES)
    assert made[0]["whole"]


def test_a_loss_that_goes_away_was_the_machine(tried):
    speed, earlier, made = tried([800.0, 1000.0], Speeds(1.0, 1.0, 0.6, 0.6))
    assert (speed, earlier.status, len(made)) == (pytest.approx(1000), "ok", 2)


def test_a_machine_that_stays_slow_allows_no_comparison(tried):
    _, earlier, made = tried([800.0] * TRIES, Speeds(1.0, 0.7, *[0.6, 1.0] * (TRIES - 1)))
    assert (earlier.status, len(made)) == ("slow_machine", TRIES)
    assert "70% of its speed" in earlier.reason


def test_another_device_does_not_wait_for_the_processor(tried):
    _, earlier, made = tried([800.0], None)
    assert (earlier.status, len(made)) == ("regressed", 1)


def test_without_a_baseline_one_try_ends_when_it_is_valid(tried):
    _, earlier, made = tried([800.0], Speeds(0.5, 0.5), file=False)
    assert (earlier, len(made)) == (None, 1)
    assert not made[0]["whole"]


@pytest.mark.parametrize(
    ("looks", "share"),
    [
        ([1.0, 0.5, 0.6, 0.7], 0.6),  # no two looks in a row at its speed
        ([0.5, 0.92, 0.94, 0.5], 0.92),
        ([0.5, 0.5, 0.5, 1.0], 0.5),
    ],
)
def test_a_machine_was_at_its_speed_between_two_looks_that_say_so(looks, share):
    def again(between):
        between()
        between()
        return {}

    assert bench.watched(again, Speeds(*looks), lambda judged, seen: seen == share) == ({}, share)


class Rows:
    """Prepared rows of captions, all different."""

    def __init__(self, count):
        self.ids = tuple(f"{n}_0" for n in range(count))
        self.values = np.arange(count * 77).reshape(count, 77)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return np.ascontiguousarray(self.values[index])


def embed(rows):
    """An embedding of its own for each row, of unit length."""
    turned = np.cos(np.outer(rows[:, 0] / 77 + 1, np.arange(1, 17))).astype(np.float32)
    return turned / np.linalg.norm(turned, axis=1, keepdims=True)


def one_for_all(rows):
    return np.full((len(rows), 16), 0.25, np.float32)


def one_row_off(rows):
    found = embed(rows)
    found[-1] += 0.01
    return found


def kept_result(rows):
    """A backend that has seen these rows before: thousands of times faster."""
    time.sleep(0.0 if rows[0, 0] % (8 * 77) == 0 else 0.02)
    return embed(rows)


@pytest.mark.parametrize(
    ("run", "reference", "said"),
    [
        (embed, embed, ""),
        (one_row_off, embed, "is off pytorch's embedding: cosine"),
        (one_row_off, embed, ", and |difference| 1."),
        (lambda rows: embed(rows)[:-1], embed, "gave (7, 16) for a batch of 8"),
        (one_for_all, one_for_all, "two different inputs give one embedding"),  # nothing to compare pytorch itself with
        (kept_result, embed, "results are kept"),
        (lambda rows: np.full((len(rows), 16), np.nan, np.float32), embed, "is off pytorch's embedding: cosine nan"),
    ],
)
def test_outputs_are_checked_after_timing(run, reference, said):
    rows, tower = Rows(96), SimpleNamespace(name="text", width=16)
    backend = SimpleNamespace(identity=Backend.identity, tower=tower, run=run)
    chain = SimpleNamespace(
        backend=lambda *_: SimpleNamespace(run=reference),
        bounds=lambda _: SimpleNamespace(cosine_min=0.9999999, max_abs=2e-5),
        prepared=SimpleNamespace(rows={"text": rows}),
    )
    found = bench.check_outputs(chain, backend, Feed(rows, 8))
    assert found if said else found == ""
    assert said in found


def judged(*scopes):
    return {scope: (throughput.summarise([8 / EXPECTED] * 20, 8, scope), "VALID", "") for scope in scopes}


@pytest.mark.parametrize(
    ("scopes", "status"),
    [(("inference", "execute"), "ok"), (("inference",), "no_baseline"), (("execute",), "no_baseline")],
)
def test_a_clock_that_is_lost_is_not_made_up_for_by_another(scopes, status, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "baseline_key", lambda *_: {})
    rows = {f"om/text/8/{scope}": [EXPECTED] * 5 for scope in ("inference", "execute")}
    baseline.save(baseline.Baseline({}, rows), tmp_path / "b.json")
    chain = SimpleNamespace(settings=SimpleNamespace(baseline=tmp_path / "b.json"))
    where = Identity("om", "1", "Ascend910B4:0", "fp16")
    found = bench.against_baseline(chain, where, SimpleNamespace(name="text"), 8, judged(*scopes))
    assert found.status == status
    assert (found.expected is None) == (status == "no_baseline")


def test_the_key_tells_om_files_apart(tmp_path):
    def key(backend="om", **chosen):
        chain = Chain(Settings(**chosen))
        chain.weights = SimpleNamespace(sha256="abc")
        return bench.baseline_key(chain, {backend: "identity"})

    (tmp_path / "text_bs8.om").write_bytes(b"one")
    ready = key(om_dir=tmp_path)
    assert ready != key()
    assert key(atc_flags=("--optypelist_for_implmode=Gelu",)) != key()
    assert key("onnx", om_dir=tmp_path) == key("onnx")
    (tmp_path / "text_bs8.om").write_bytes(b"another")
    assert key(om_dir=tmp_path) != ready
