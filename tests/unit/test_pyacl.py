"""OM files through pyACL on the simulated host: the same figures as through aclruntime, and nothing left behind."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from clipval import cli
from clipval.ascend import acl, atc, pyacl
from clipval.backends import om
from clipval.errors import BackendUnavailable, InputError
from clipval.towers import TEXT, TOWER_NAMES, VISION, towers
from tests.simulator import LIB, environment, forget, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def host(monkeypatch):
    """Switches of the simulated host; a fresh acl is imported afterwards."""
    monkeypatch.syspath_prepend(str(LIB))

    def host(**switches):
        for name, value in environment(**switches).items():
            monkeypatch.setenv(name, value)
        forget()
        monkeypatch.setattr(pyacl, "_initialised_in", 0)
        om._chip.cache_clear()

    host()
    yield host
    for backend in list(om._alive.values()):
        backend.close()
    forget()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An OM file of each tower for batches of 4, and the ONNX file beside it."""
    folder = tmp_path_factory.mktemp("pyacl")
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        for tower in (VISION, TEXT):
            onnx = tiny.write(folder / f"{tower.name}.onnx", tower)
            atc.compile_om(onnx, folder, tower.name, tower, 4, atc.AtcOptions("Ascend910B4"))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder


def opened(files, tower, **more):
    return om.OmBackend(tower, files / f"{tower.name}.om", batch_size=4, runtime="pyacl", **more)


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_the_same_figures_as_through_aclruntime(host, files, name):
    tower = towers()[name]
    rows = tiny.rows(tower, 4)
    backend = opened(files, tower)
    found = backend.run(rows)
    assert np.array_equal(backend.run(rows), found)
    assert backend.identity.version.startswith("pyACL, CANN 8.0.RC3.simulated")
    assert backend.identity.simulated
    execute, copies = backend.execute_seconds(), backend.copy_seconds()
    assert len(execute) == len(copies["to_device"]) == len(copies["from_device"]) == 2
    assert all(0 < one < 5 for times in (execute, *copies.values()) for one in times)
    backend.close()
    assert sys.modules["simulated_acl"].device_bytes() == 0
    assert sys.modules["acl"]._handles == {}
    host()
    other = om.OmBackend(tower, files / f"{name}.om", batch_size=4)
    assert np.array_equal(other.run(rows), found)
    assert other.copy_seconds() is None


def test_any_number_of_sessions_also_after_loads_that_failed(host, files, tmp_path):
    (tmp_path / "bad.om").write_bytes((files / "text.om").read_bytes()[:5000])
    rows = {tower.name: tiny.rows(tower, 4) for tower in (VISION, TEXT)}
    wanted = {tower.name: opened(files, tower).run(rows[tower.name]) for tower in (VISION, TEXT)}
    other = opened(files, VISION, device_id=1)
    for tower in (TEXT, VISION, None, TEXT):
        if tower is None:
            with pytest.raises(InputError, match=r"E19999.*acl.mdl.load_from_file returned 145006"):
                om.OmBackend(TEXT, tmp_path / "bad.om", batch_size=4, runtime="pyacl")
            continue
        backend = opened(files, tower)
        assert np.array_equal(backend.run(rows[tower.name]), wanted[tower.name])
        backend.refresh()
        assert np.array_equal(backend.run(rows[tower.name]), wanted[tower.name])
        assert np.array_equal(other.run(rows["vision"]), wanted["vision"])
    other.close()
    backend.close()
    assert sys.modules["acl"]._handles == {}


def test_rows_that_lie_apart_or_are_of_another_kind(host, files):
    backend = opened(files, TEXT)
    rows = tiny.rows(TEXT, 4)
    wanted = backend.run(rows)
    wide = np.zeros((4, 154), np.int64)
    wide[:, ::2] = rows
    assert np.array_equal(backend.run(wide[:, ::2]), wanted)
    with pytest.raises(InputError, match=r"this OM takes 'text' int64\[4, 77\]"):
        backend.run(rows.astype(np.int32))
    with pytest.raises(acl.Failed, match="the batch has 1232 bytes, the model takes 2464"):
        backend._session.run(rows[:2], "normalise:0:text_embed")


@pytest.mark.parametrize("fault", ["extra_output", "swapped_outputs"])
def test_the_embedding_is_picked_by_name(host, files, tmp_path, fault):
    host(fault=fault)
    two = atc.compile_om(files / "text.onnx", tmp_path, "two", TEXT, 4, atc.AtcOptions("Ascend910B4"))
    rows = tiny.rows(TEXT, 4)
    found = om.OmBackend(TEXT, two, batch_size=4, runtime="pyacl").run(rows)
    assert np.array_equal(found, opened(files, TEXT).run(rows))


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"fault": "driver_mismatch"}, "driver and firmware do not match.*acl.rt.set_device returned 507033"),
        ({"fault": "hdc_init"}, "the driver's channel to the device cannot be opened.*acl.init returned 507899"),
        ({"device_memory": 1000}, "the device has no memory left.*EL0004.*acl.mdl.load_from_file returned 207001"),
        ({"npus": 0}, "there is no such device id.*returned 107001"),
        ({"fault": "no_ascendcl"}, r"pyACL \(module acl\) does not import: libascendcl.so.*set_env.sh"),
    ],
)
def test_what_keeps_a_file_from_loading_is_told(host, files, switches, words):
    host(**switches)
    with pytest.raises(BackendUnavailable, match=words):
        opened(files, TEXT)


@pytest.mark.parametrize(("fault", "code"), [("device_lost", 507011), ("aicpu_error", 507018)])
def test_a_run_that_fails_tells_its_cause(host, files, fault, code):
    host(fault=fault, lose_after=1)
    backend = opened(files, TEXT)
    backend.run(tiny.rows(TEXT, 4))
    with pytest.raises(BackendUnavailable, match=rf"failed in run 2 .*EZ9999.*synchronize_stream returned {code}"):
        backend.run(tiny.rows(TEXT, 4))
    backend.close()
    assert len(backend.execute_seconds()) == 1


def test_other_threads_run_while_the_device_is_waited_for(host, files, monkeypatch):
    backend = opened(files, TEXT)
    monkeypatch.setenv("CLIPVAL_SIM_FAULT", "device_hangs")
    monkeypatch.setenv("CLIPVAL_SIM_LOSE_AFTER", "0")
    monkeypatch.setattr(time, "sleep", lambda seconds: meanwhile.wait(20))
    meanwhile = threading.Event()
    thread = threading.Thread(target=backend.run, args=(tiny.rows(TEXT, 4),))
    thread.start()
    meanwhile.set()  # this thread gets its turn while the other one waits in synchronize_stream
    thread.join(20)
    assert not thread.is_alive()


def test_threads_take_turns(host, files):
    backend = opened(files, TEXT)
    rows = tiny.rows(TEXT, 4)
    wanted, found = backend.run(rows), []
    threads = [threading.Thread(target=lambda: found.append(backend.run(rows))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(one, wanted) for one in found)


def test_acl_that_somebody_else_initialised_is_used_and_left(host, files):
    import acl as module

    assert module.init() == 0
    backend = opened(files, TEXT)
    backend.run(tiny.rows(TEXT, 4))
    backend.close()
    pyacl._finalize()
    assert sys.modules["simulated_acl"].ready()


def test_bench_tells_three_scopes_apart(host, files, tmp_path, capsys):
    quick = ["--perf-min-time", "0.05", "--perf-max-time", "0.1", "--workdir", str(tmp_path)]
    model = ["--model", str(files / "text.om"), "--batchsize", "4"]
    cli.main(["bench", *model, *quick, "--om-runtime", "pyacl", "--allow-simulated"])
    said = capsys.readouterr().out
    assert re.search(r"om/text/4/inference +\d.*\nom/text/4/execute +\d", said), said
    assert re.search(r"copies: to_device \d\.\d{3} ms per call, from_device \d\.\d{3} ms per call", said), said


LIFE = """
import os, sys
from pathlib import Path
from clipval.backends import om
from clipval.towers import TEXT, VISION
from tests.simulator import tiny
folder = Path(sys.argv[1])
backend = om.OmBackend(TEXT, folder / "text.om", batch_size=4, runtime="pyacl")
other = om.OmBackend(VISION, folder / "vision.om", batch_size=4, runtime="pyacl", device_id=1)
backend.run(tiny.rows(TEXT, 4))
child = os.fork()
if child == 0:
    try:
        backend.run(tiny.rows(TEXT, 4))
    except Exception as error:
        print(type(error).__name__, flush=True)
    backend.close()
    sys.exit(7)
print("child", os.waitpid(child, 0)[1])
other.run(tiny.rows(VISION, 4))
sys.exit(5)
"""


def test_exit_and_fork(host, files, tmp_path):
    finalized = tmp_path / "finalized"
    variables = {**os.environ, **environment(finalized=finalized)}
    done = subprocess.run(
        [sys.executable, "-c", LIFE, str(files)],
        cwd=str(ROOT),
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout == f"BackendUnavailable\nchild {7 << 8}\n"
    (line,) = finalized.read_text().splitlines()
    assert line.endswith(" 0 bytes, 0 models, 0 host buffers"), "and no handles"


def test_the_simulated_module_is_as_strict_as_the_real_one(host, files):
    import acl as module

    assert module.rt.set_device(0) == 100001
    assert module.init() == 0
    assert module.init() == 100002
    assert module.mdl.load_from_file(str(files / "text.om"))[1] == 107002, "no context yet"
    assert module.rt.set_device(0) == 0
    for call in (
        lambda: module.rt.malloc(np.int64(64), 0),
        lambda: module.rt.malloc(size=64, policy=0),
        lambda: module.mdl.load_from_file(files / "text.om"),
        lambda: module.rt.malloc(64),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="expected bytes"):
        module.util.bytes_to_ptr(bytearray(4))
    address, code = module.rt.malloc(64, 0)
    assert code == 0
    assert module.rt.memcpy(address, 32, address, 64, 3) == 107000
    assert "count > destMax" in module.get_recent_err_msg()
    assert module.get_recent_err_msg() is None
    assert module.rt.free(address) == 0
    assert module.rt.free(address) == 107000
    number, code = module.mdl.load_from_file(str(files / "text.om"))
    other, code = module.rt.create_context(0)
    assert module.mdl.execute(number, 1, 2) == 100000
    desc = module.mdl.create_desc()
    assert module.mdl.get_desc(desc, number) == 0
    assert module.mdl.get_input_dims(desc, 5) == ({}, 100000)
    assert module.mdl.get_input_size_by_index(desc, 0) == 2464
    assert module.rt.destroy_context(other) == 0
    assert module.mdl.unload(number) == 107002, "its context is no longer this thread's"
