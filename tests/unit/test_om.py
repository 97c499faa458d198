"""The OM backend on the simulated runtime, of every generation, and what it must refuse."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipval import results
from clipval.ascend import acl, atc, watchdog
from clipval.backends import BackendSettings, Opening, om
from clipval.errors import BackendUnavailable, InputError
from clipval.towers import TEXT, TOWER_NAMES, VISION, towers
from tests.simulator import GENERATIONS, LIB, environment, forget, tiny

ROOT = Path(__file__).parents[2]
TOWERS = towers()


@pytest.fixture
def host(monkeypatch):
    """Switches of the simulated host; a fresh aclruntime is imported afterwards."""
    monkeypatch.syspath_prepend(str(LIB))

    def host(**switches):
        for name, value in environment(**switches).items():
            monkeypatch.setenv(name, value)
        forget()
        om._chip.cache_clear()

    host()
    yield host
    for backend in list(om._alive.values()):
        backend.close()
    om._chip.cache_clear()
    forget()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """OM files by what they were compiled from and under which switches."""
    return tmp_path_factory.mktemp("compiled"), {}


@pytest.fixture
def build(tmp_path, compiled):
    """Compile a tower under the switches of now, once; a copy lies in `tmp_path`, its ONNX file beside it."""
    folder, made = compiled

    def build(tower, batch_size=4, mode="", extra=()):
        key = (tower.name, batch_size, mode, extra, os.environ.get("CLIPVAL_SIM_FAULT"))
        onnx = folder / f"{tower.name}.onnx"
        if not onnx.exists():
            tiny.write(onnx, tower)
        if key not in made:
            options = atc.AtcOptions("Ascend910B4", mode, extra=extra)
            made[key] = atc.compile_om(onnx, folder, f"om{len(made)}", tower, batch_size, options)
        shutil.copy(onnx, tmp_path)
        return Path(shutil.copy(made[key], tmp_path / f"{tower.name}_bs{batch_size}{mode}.om"))

    return build


def expected(onnx, tower, rows):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    return session.run([tower.output_name], {tower.input_name: rows})[0]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", TOWER_NAMES)
def test_embeds_as_the_onnx_file_does(host, build, tmp_path, generation, name):
    host(generation=generation)
    tower = TOWERS[name]
    backend = om.OmBackend(tower, build(tower), batch_size=4)
    rows = tiny.rows(tower, 4)
    asked = rows.copy()
    first = backend.run(rows)
    kept = first.copy()
    backend.run(np.ascontiguousarray(rows[::-1]))
    wanted = expected(tmp_path / f"{name}.onnx", tower, rows)
    cosine = (first * wanted).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.9999
    assert 1e-6 < np.abs(first - wanted).max() < 1e-2, "fp16 arithmetic leaves a trace"
    assert (first.dtype, first.shape, first.flags["C_CONTIGUOUS"]) == (np.float32, (4, 512), True)
    assert np.array_equal(rows, asked)
    assert np.array_equal(first, kept), "run() reused an array that it had handed out"
    seconds = backend.execute_seconds()
    assert len(seconds) == 2
    assert all(0 < one < 5 for one in seconds)
    assert backend.identity.simulated
    assert backend.identity.device == "Ascend910B4:0"
    assert backend.identity.version.startswith("aclruntime 0.0.")
    assert "CANN 8.0.RC3.simulated" in backend.identity.version
    backend.close()
    backend.close()
    assert backend.execute_seconds() == seconds


def test_precision_modes_differ(host, build, tmp_path):
    rows = tiny.rows(VISION, 4)
    found = {}
    for mode in ("force_fp32", "force_fp16", "mixed_bfloat16"):
        backend = om.OmBackend(VISION, build(VISION, mode=mode), batch_size=4, precision=mode)
        assert backend.identity.precision == mode
        found[mode] = np.abs(backend.run(rows) - expected(tmp_path / "vision.onnx", VISION, rows)).max()
    assert found["force_fp32"] < 1e-6 < found["force_fp16"] < found["mixed_bfloat16"]


def test_rows_that_the_runtime_would_scramble(host, build, tmp_path):
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    rows = tiny.rows(TEXT, 4)
    wanted = backend.run(rows)
    wide = np.zeros((4, 154), np.int64)
    wide[:, ::2] = rows
    assert np.array_equal(backend.run(wide[:, ::2]), wanted), "strides"
    assert np.array_equal(backend.run(np.asfortranarray(rows)), wanted), "Fortran order"
    assert np.array_equal(backend.run(rows.astype(np.longlong)), wanted), "long long"
    rows.flags.writeable = False
    assert np.array_equal(backend.run(rows), wanted), "read-only"


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((3, 77), np.int64),
        np.zeros((8, 77), np.int32),  # the very number of bytes
        np.zeros((4, 77), np.float64),
        np.zeros((4, 77), ">i8"),
        np.zeros((77, 4), np.int64),
    ],
)
def test_rows_of_another_shape_or_dtype_are_refused(host, build, bad):
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    with pytest.raises(InputError, match=r"this OM takes 'text' int64\[4, 77\]"):
        backend.run(bad)
    assert backend.execute_seconds() == []


def test_float16_output_is_widened(host, build):
    backend = om.OmBackend(VISION, build(VISION, extra=("--output_type=FP16",)), batch_size=4)
    found = backend.run(tiny.rows(VISION, 4))
    assert found.dtype == np.float32
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 5e-3


def test_wrong_batch_size_names_both(host, build):
    host(fault="wrong_batch")
    with pytest.raises(InputError, match="compiled for batch size 5, asked for 4"):
        om.OmBackend(TEXT, build(TEXT), batch_size=4)


@pytest.mark.parametrize("fault", ["extra_output", "swapped_outputs"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_embedding_is_picked_by_name(host, build, fault, generation):
    """The recipe's own OM has exp(logit_scale) as a second output."""
    host(fault=fault, generation=generation)
    two = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    assert len(two._session.outputs) == 2
    assert two.notes == (
        "OM files give more than the embedding (the recipe's own export adds exp(logit_scale)); it is picked by name",
    )
    rows = tiny.rows(TEXT, 4)
    found = two.run(rows)
    host(fault="", generation=generation)
    one = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    assert one.notes == ()
    assert np.array_equal(one.run(rows), found)


def test_another_tower_or_width_is_refused(host, build):
    file = build(TEXT)
    with pytest.raises(InputError, match=r"its inputs are 'text' int64\[4, 77\], the tower needs 'image' float32"):
        om.OmBackend(VISION, file, batch_size=4)
    with pytest.raises(InputError, match=r"its output is 'normalise:0:text_embed' float32\[4, 512\]"):
        om.OmBackend(replace(TEXT, width=768), file, batch_size=4)
    with pytest.raises(InputError, match=r"the tower needs 'other_embed'"):
        om.OmBackend(replace(TEXT, output_name="other_embed"), file, batch_size=4)
    with pytest.raises(InputError, match="the tower needs 'text' int32"):
        om.OmBackend(replace(TEXT, dtype="int32"), file, batch_size=4)
    assert om._alive == {}


def test_load_errors_come_from_file_descriptor_1(host, build, capfd):
    host(fault="truncated_om")
    file = build(TEXT)
    with pytest.raises(InputError) as caught:
        om.OmBackend(TEXT, file, batch_size=4)
    assert f"load model from file failed, model file is {file}" in str(caught.value)
    assert "[1][ACL: invalid parameter]" in str(caught.value)
    assert "ge result = 145006" in str(caught.value)
    assert "compile it again" in str(caught.value)
    assert "load model" not in capfd.readouterr().out


def test_an_om_of_another_chip(host, build):
    file = build(TEXT)
    host(chip="310P3")
    with pytest.raises(InputError, match=r"500002.*was the OM compiled for this chip"):
        om.OmBackend(TEXT, file, batch_size=4)


def test_words_of_a_call_that_works_go_to_stderr(capfd):
    with acl.telling():
        os.write(1, b"[INFO] load model success\n[WARN] something\n")
    assert capfd.readouterr() == ("", "[WARN] something\n")


def test_device_errors_are_the_machines(host, build):
    file = build(TEXT)
    with pytest.raises(BackendUnavailable, match=r"device 7: there is no such device id.*107001"):
        om.OmBackend(TEXT, file, batch_size=4, device_id=7)
    host(fault="driver_mismatch")
    with pytest.raises(BackendUnavailable, match="driver and firmware do not match"):
        om.OmBackend(TEXT, file, batch_size=4)
    host(fault="hdc_init")
    with pytest.raises(
        BackendUnavailable, match="the driver's channel to the device cannot be opened.*HDC init failed"
    ):
        om.OmBackend(TEXT, file, batch_size=4)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_device_minus_one(host, build, generation):
    host(generation=generation)
    with pytest.raises(BackendUnavailable, match="device -1: there is no such device id"):
        om.OmBackend(TEXT, build(TEXT), batch_size=4, device_id=-1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("device_lost", "507011.*; the model failed while running"),
        ("aicpu_error", "507018.*; an operator on the AICPU failed"),
    ],
)
def test_a_run_that_fails_tells_its_cause(host, build, capfd, fault, words):
    """The runtime's exception is `[-1][ACL: general failure]` for any cause; the rest is on file descriptor 1."""
    host(fault=fault, lose_after=2)
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    rows = tiny.rows(TEXT, 4)
    backend.run(rows)
    backend.run(rows)
    capfd.readouterr()
    with pytest.raises(BackendUnavailable, match=rf"device 0 failed in run 3 .*{words}"):
        backend.run(rows)
    backend.close()
    assert len(backend.execute_seconds()) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_device_memory_that_runs_out(host, build, monkeypatch, generation):
    host(generation=generation)
    file = build(TEXT)
    backend = om.OmBackend(TEXT, file, batch_size=4)
    used = sys.modules["simulated_acl"].device_bytes()
    monkeypatch.setenv("CLIPVAL_SIM_DEVICE_MEMORY", str(used + 1000))
    with pytest.raises(BackendUnavailable, match=r"failed in run 1 .*EL0004.*; the device has no memory left"):
        backend.run(tiny.rows(TEXT, 4))
    monkeypatch.setenv("CLIPVAL_SIM_DEVICE_MEMORY", "1000")
    with pytest.raises(BackendUnavailable, match=r"device 1: the device has no memory left.*EL0004.*207001"):
        om.OmBackend(TEXT, file, batch_size=4, device_id=1)


def test_missing_and_empty_files(host, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        om.OmBackend(TEXT, tmp_path / "none.om", batch_size=4)
    (tmp_path / "empty.om").touch()
    with pytest.raises(InputError, match="empty"):
        om.OmBackend(TEXT, tmp_path / "empty.om", batch_size=4)


def test_import_errors_keep_the_loaders_words(host, build, monkeypatch):
    file = build(TEXT)
    host(fault="no_ascendcl")
    with pytest.raises(BackendUnavailable, match=r"libascendcl.so: cannot open shared object file.*set_env.sh"):
        om.OmBackend(TEXT, file, batch_size=4)
    host(fault="newer_wheel")
    with pytest.raises(
        BackendUnavailable, match=r"undefined symbol: aclmdl\w+; the wheel is newer than this host's CANN"
    ):
        om.OmBackend(TEXT, file, batch_size=4)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(LIB)])
    with pytest.raises(
        BackendUnavailable, match=r"No module named 'aclruntime'; (install its wheel|it has wheels for)"
    ):
        om.OmBackend(TEXT, file, batch_size=4)


def test_no_second_user_of_acl_in_the_process(host, build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    with pytest.raises(BackendUnavailable, match="om backend: torch_npu is in this process"):
        om.OmBackend(TEXT, build(TEXT), batch_size=4)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_one_session_a_device(host, build, generation):
    host(generation=generation)
    file = build(TEXT)
    first = om.OmBackend(TEXT, file, batch_size=4)
    other = om.OmBackend(TEXT, file, batch_size=4, device_id=1)
    second = om.OmBackend(TEXT, file, batch_size=4)
    rows = tiny.rows(TEXT, 4)
    with pytest.raises(BackendUnavailable, match="another OM was opened on device 0"):
        first.run(rows)
    assert np.array_equal(other.run(rows), second.run(rows))
    first.close()
    second.run(rows)
    assert np.array_equal(other.run(rows), second.run(rows))
    assert other.identity.device == "Ascend910B4:1"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_any_number_of_sessions_one_after_another(host, build, tmp_path, generation):
    """Also after loads that failed, each of which leaves its context behind."""
    host(generation=generation)
    good, bad = {tower: build(tower) for tower in (TEXT, VISION)}, tmp_path / "bad.om"
    bad.write_bytes(good[TEXT].read_bytes()[:5000])
    for tower in (TEXT, VISION, TEXT, None, TEXT, VISION):
        if tower is None:
            with pytest.raises(InputError):
                om.OmBackend(TEXT, bad, batch_size=4)
            continue
        backend = om.OmBackend(tower, good[tower], batch_size=4)
        rows = tiny.rows(tower, 4)
        found = backend.run(rows)
        backend.refresh()
        assert np.array_equal(backend.run(rows), found)
        assert np.abs(found - expected(tmp_path / f"{tower.name}.onnx", tower, rows)).max() < 1e-2
    backend.close()
    assert sys.modules["simulated_acl"].device_bytes() == 0, "no device memory is left behind"


def test_without_npu_smi_it_still_runs(host, build, monkeypatch, tmp_path):
    file = build(TEXT)
    monkeypatch.setenv("PATH", str(tmp_path))
    backend = om.OmBackend(TEXT, file, batch_size=4)
    assert backend.identity.device == "Ascend:0"


@pytest.mark.parametrize("generation", ["B", "C"])
def test_a_session_with_a_coarse_clock_is_opened_anew(host, build, generation):
    """Days after a session was opened float32 steps by 32 ms, more than 1 % of any call of this model."""
    days = 400_000
    host(generation=generation, age_seconds=days)
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    rows = tiny.rows(TEXT, 4)
    backend.run(rows)
    session = backend._session
    backend._opened_at -= days
    backend.run(rows)
    assert backend._session is not session
    assert len(backend.execute_seconds()) == 2


def test_durations_do_not_age(host, build):
    host(generation="A")
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    rows = tiny.rows(TEXT, 4)
    backend.run(rows)
    session = backend._session
    backend._opened_at -= 4000
    backend.run(rows)
    assert backend._session is session


def test_refresh_keeps_the_times(host, build):
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    rows = tiny.rows(TEXT, 4)
    backend.run(rows)
    backend.refresh()
    backend.run(rows)
    assert len(backend.execute_seconds()) == 2
    backend.close()
    with pytest.raises(BackendUnavailable, match=r"close\(\) was called"):
        backend.refresh()


def test_an_unknown_way_of_recording_times_is_no_figure(host, build, monkeypatch):
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    backend.run(tiny.rows(TEXT, 4))
    backend._session._native._times.clear()
    with pytest.raises(BackendUnavailable, match="recorded 0 times for 1 runs"):
        backend.execute_seconds()
    monkeypatch.delattr(type(backend._session._native), "sumary")
    with pytest.raises(BackendUnavailable, match="reports no execute times"):
        backend.execute_seconds()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_threads_take_turns(host, build, generation):
    host(generation=generation)
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4)
    rows = tiny.rows(TEXT, 4)
    wanted, found = backend.run(rows), []
    threads = [threading.Thread(target=lambda: found.append(backend.run(rows))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(one, wanted) for one in found)


LIFE = """
import os, sys
from pathlib import Path
from clipval.backends import om
from clipval.towers import TEXT
from tests.simulator import tiny
rows = tiny.rows(TEXT, 4)
backend = om.OmBackend(TEXT, Path(sys.argv[1]), batch_size=4)
backend.run(rows)
{more}
"""
FORK = """
child = os.fork()
if child == 0:
    for use in (lambda: backend.run(rows), lambda: om.OmBackend(TEXT, Path(sys.argv[1]), batch_size=4)):
        try:
            use()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    backend.close()
    del backend
    sys.exit(7)
print("child", os.waitpid(child, 0)[1])
backend.run(rows)
"""


def life(file, more, tmp_path, generation):
    finalized = tmp_path / "finalized"
    variables = {**os.environ, **environment(generation=generation, finalized=finalized)}
    code = LIFE.format(more=more)
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=str(ROOT),
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    lines = finalized.read_text().splitlines() if finalized.exists() else []
    assert all(line.endswith(" 0 bytes, 0 models, 0 host buffers") for line in lines), lines
    return done.stdout, lines


@pytest.mark.parametrize("generation", GENERATIONS)
def test_finalized_once_at_exit(host, build, tmp_path, generation):
    _, lines = life(build(TEXT), "om.OmBackend(TEXT, Path(sys.argv[1]), batch_size=4)", tmp_path, generation)
    assert len(lines) == 1


@pytest.mark.parametrize("generation", GENERATIONS)
def test_finalized_after_every_session_was_closed(host, build, tmp_path, generation):
    output, lines = life(build(TEXT), "backend.close()", tmp_path, generation)
    assert len(lines) == 1
    assert output == ""


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_forked_child_is_refused_and_ends_without_destructors(host, build, tmp_path, generation):
    output, lines = life(build(TEXT), FORK, tmp_path, generation)
    assert output.count("BackendUnavailable om backend: process") == 2
    assert "start workers with spawn" in output
    assert f"child {7 << 8}" in output
    assert len(lines) == 1


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_exit_code_stays_and_nothing_is_printed(host, build, tmp_path, generation):
    variables = {**os.environ, **environment(generation=generation)}
    code = LIFE.format(more="other = om.OmBackend(TEXT, Path(sys.argv[1]), batch_size=4, device_id=1)\nsys.exit(5)")
    command = [sys.executable, "-c", code, str(build(TEXT))]
    done = subprocess.run(command, cwd=str(ROOT), env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (5, "", "")


def test_dtypes_as_enum_or_number():
    assert acl.dtype_name(9) == "int64"
    assert acl.dtype_name("dtype.double") == "float64"
    assert acl.dtype_name(99) == "unknown type 99"


def test_words_of_c_code_are_captured_too(capfd):
    import ctypes

    def load():
        with acl.telling():
            ctypes.CDLL(None).puts(b"[ERROR] EE1001: [PID: 31] 2026-11-25-01:00:00.000.000 the argument is invalid")
            raise RuntimeError("[1]")

    with pytest.raises(acl.Failed, match=r"^\[ERROR\] EE1001: the argument is invalid; \[1\]$"):
        load()
    assert "EE1001" not in capfd.readouterr().out


HANG = """
import sys
from pathlib import Path
from clipval.ascend import watchdog
from clipval.backends import om
from clipval.towers import TEXT
from tests.simulator import tiny
watchdog.tell(results=sys.argv[2], gate="parity/om/text")
backend = om.OmBackend(TEXT, Path(sys.argv[1]), batch_size=4, device_timeout=1)
backend.run(tiny.rows(TEXT, 4))
backend.run(tiny.rows(TEXT, 4))
"""


def test_a_call_that_does_not_come_back_ends_the_run_as_failed(host, build, tmp_path):
    """The runtime keeps Python's lock meanwhile, so nothing in this process could."""
    file, found = build(TEXT), tmp_path / "runs" / "results.jsonl"
    variables = {**os.environ, **environment(fault="device_hangs", lose_after=1, health="Warning")}
    command = [sys.executable, "-c", HANG, str(file), str(found)]
    done = subprocess.run(
        command, cwd=str(ROOT), env=variables, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -9
    assert f"clipval: FAIL: om backend, text tower, {file}: a run: device 0 did not return within 1 s" in done.stderr
    assert "npu-smi reports: Ascend910B4 NPU 0 chip 0, health Warning" in done.stderr
    (figure,) = results.read(found)
    assert (figure.gate, figure.verdict, figure.failure) == ("parity/om/text", "fail", "environment")
    assert "did not return" in figure.message


SUSPENDED = """
import time
from clipval.ascend import watchdog
with watchdog.limit(2, 0, "a call"):
    print("ready", flush=True)
    time.sleep(1)
"""


def test_time_in_which_a_person_suspends_the_run_does_not_count():
    """Ctrl-Z while a call is under way, and `fg` after more than its limit."""
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED], cwd=str(ROOT), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=30) == 0


def test_a_watcher_that_was_killed_is_replaced(host, build):
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4, device_timeout=60)
    backend.run(tiny.rows(TEXT, 4))
    first = watchdog._watcher
    first.kill()
    first.wait()
    backend.run(tiny.rows(TEXT, 4))
    assert watchdog._watcher is not first
    assert watchdog._watcher.poll() is None


def test_a_watcher_that_cannot_run_is_an_error(host, build, monkeypatch):
    monkeypatch.setattr(watchdog, "_page", None)
    monkeypatch.setattr(watchdog, "_watcher", None)
    with monkeypatch.context() as patch:
        patch.setattr(watchdog.sys, "executable", "/bin/false")
        backend = om.OmBackend(TEXT, build(TEXT), batch_size=4, device_timeout=60)
        watchdog._watcher.wait()
        with pytest.raises(BackendUnavailable, match="limits device calls .* ended with exit code 1"):
            backend.run(tiny.rows(TEXT, 4))
    backend._device_timeout = None


def test_a_call_that_comes_back_in_time_is_left_alone(host, build):
    backend = om.OmBackend(TEXT, build(TEXT), batch_size=4, device_timeout=1)
    first = backend.run(tiny.rows(TEXT, 4)).copy()
    for _ in range(3):
        time.sleep(0.6)
        assert np.array_equal(backend.run(tiny.rows(TEXT, 4)), first)


@pytest.mark.parametrize("health", ["Alarm", "Critical", "Unknown"])
def test_a_chip_that_is_not_well_is_not_measured(host, build, health):
    host(health=health)
    made = types.SimpleNamespace(settings=BackendSettings(device_timeout=60))
    asked = Opening(TEXT, build(TEXT), 4, 0)
    with pytest.raises(BackendUnavailable, match=rf"device 0 \(Ascend910B4\) has health {health}.*--allow-health"):
        om.KIND.open(made, asked)
    made.settings = BackendSettings(allow_health=True)
    said = f"device 0 (Ascend910B4) has health {health} according to npu-smi"
    assert om.KIND.open(made, asked).notes == (said,)


def test_a_warning_is_said_and_judged_by_the_figures(host, build):
    host(health="Warning")
    made = types.SimpleNamespace(settings=BackendSettings())
    (note,) = om.KIND.open(made, Opening(TEXT, build(TEXT), 4, 0)).notes
    assert note == "device 0 (Ascend910B4) has health Warning according to npu-smi"
