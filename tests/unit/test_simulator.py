"""The simulated host's own quirks: a simulator that is kinder than the device would prove nothing."""

import ctypes
import importlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from clipval.ascend import npu_smi
from clipval.towers import TEXT, VISION
from tests.simulator import BIN, GENERATIONS, LIB, environment, forget, tiny


@pytest.fixture
def variables(monkeypatch):
    def variables(**switches):
        for name, value in environment(**switches).items():
            monkeypatch.setenv(name, value)

    variables()
    return variables


@pytest.fixture
def runtime(variables, monkeypatch):
    """Import aclruntime of a generation."""
    monkeypatch.syspath_prepend(str(LIB))

    def runtime(**switches):
        variables(**switches)
        forget()
        return importlib.import_module("aclruntime")

    forget()
    yield runtime
    forget()


def atc(folder, *flags, **changed):
    base = {
        "framework": "5",
        "model": folder / "text.onnx",
        "output": folder / "text_bs2",
        "input_format": "ND",
        "input_shape": "text:2,77",
        "log": "error",
        "soc_version": "Ascend910B4",
    }
    values = {**base, **changed}
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return subprocess.run(
        [str(BIN / "atc"), *arguments, *flags], cwd=str(folder), capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path):
    tiny.write(tmp_path / "text.onnx", TEXT)
    return tmp_path


@pytest.fixture
def session(folder, runtime):
    def session(**switches):
        module = runtime(**switches)
        assert atc(folder).returncode == 0
        return module, module.InferenceSession(str(folder / "text_bs2.om"), 0, module.session_options())

    return session


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"soc_version": "Ascend910X"}, "E10001"),
        ({"precision_mode": "fp64"}, "E10001"),
        ({"precision_mode": "force_fp16", "precision_mode_v2": "fp16"}, "E10001"),
        ({"input_shape": "text=2,77"}, "E10002"),
        ({"soc_version": None}, "E10007"),
        ({"input_shape": "tokens:2,77"}, "E10016"),
        ({"input_shape": "text:2,77,1"}, "E10049"),
        ({"input_shape": "text:2,76"}, "E10049"),
        ({"soc_version": ""}, "E10054"),
        ({"model": "none.onnx"}, "E13001"),
        ({"output": "no/such/folder/x"}, "E13001"),
    ],
)
def test_atc_is_strict(variables, folder, changed, code):
    done = atc(folder, **changed)
    assert done.returncode != 0
    assert "ATC run failed, Please check the detail log" in done.stdout
    assert f"{code}: " in done.stdout
    assert not list(folder.glob("*.om"))


def test_atc_knows_no_other_flags(variables, folder):
    assert "unknown command line flag 'batch'" in atc(folder, "--batch=2").stderr


def test_atc_refuses_too_new_an_opset(variables, folder):
    import onnx

    model = onnx.load(str(folder / "text.onnx"))
    model.opset_import[0].version = 19
    onnx.save(model, str(folder / "text.onnx"))
    done = atc(folder)
    assert done.returncode == 1
    assert "E1" in done.stdout


def test_atc_warns_after_success_and_litters(variables, folder):
    variables(om_suffix=1)
    done = atc(folder)
    assert done.returncode == 0
    assert done.stdout.index("ATC run success") < done.stdout.index("W11001")
    assert (folder / "text_bs2_linux_x86_64.om").is_file()
    assert (folder / "kernel_meta").is_dir()


def test_names_shapes_and_bytes(session):
    module, opened = session()
    (text,), (embed,) = opened.get_inputs(), opened.get_outputs()
    assert (text.name, int(text.datatype), text.shape, text.realsize) == ("text", 9, [2, 77], 2 * 616)
    assert (embed.name, int(embed.datatype), embed.shape) == ("normalise:0:text_embed", 0, [2, 512])
    assert module.__simulated__ is True


def test_three_positional_arguments(session):
    module, _ = session()
    with pytest.raises(TypeError):
        module.InferenceSession("x.om")
    with pytest.raises(TypeError):
        module.InferenceSession("x.om", 0, None)
    with pytest.raises(TypeError):
        module.InferenceSession(model_path="x.om", device_id=0, options=module.session_options())


def printed(capfd):
    """What the runtime wrote; like C, it keeps text back where file descriptor 1 is no terminal."""
    ctypes.CDLL(None).fflush(None)
    return capfd.readouterr().out


def at(module, rows):
    return module.BaseTensor(rows.__array_interface__["data"][0], rows.nbytes)


def on_device(module, rows):
    tensor = module.Tensor(rows)
    tensor.to_device(0)
    return tensor


def test_only_bytes_are_compared(session, capfd):
    module, opened = session()
    name = opened.get_outputs()[0].name
    rows = tiny.rows(TEXT, 2)
    right = opened.run([name], [on_device(module, rows)])[0]
    with pytest.raises(RuntimeError, match="tensor is in npu"):
        np.array(right)
    right.to_host()
    wrong = opened.run([name], [on_device(module, rows.view(np.float64))])[0]
    wrong.to_host()
    assert np.array_equal(np.array(right), np.array(wrong)), "the same bytes under another dtype pass"
    with pytest.raises(RuntimeError, match=r"^\[-1\]\[ACL: general failure\] $"):
        opened.run([name], [on_device(module, rows.astype(np.int32))])
    assert "in size:616 needsize:1232 not match" in printed(capfd)


def test_strides_and_long_long_are_misread(session):
    module, _ = session()
    rows = np.arange(8, dtype=np.int64).reshape(2, 4)
    assert np.array_equal(np.array(module.Tensor(rows)), rows)
    assert not np.array_equal(np.array(module.Tensor(rows[:, ::2])), rows[:, ::2])
    assert not np.array_equal(np.array(module.Tensor(np.asfortranarray(rows))), rows)
    assert module.Tensor(rows.astype(np.longlong)).dtype == module.dtype.uint8


def test_feeds_and_outnames(session):
    module, opened = session()
    rows = tiny.rows(TEXT, 2)
    tensor = on_device(module, rows)
    assert opened.run([], [tensor]) == []
    name = opened.get_outputs()[0].name
    for names, feeds in ((None, [tensor]), ([name], {"text": rows}), ([name], [rows])):
        with pytest.raises(TypeError):
            opened.run(names, feeds)
    with pytest.raises(RuntimeError):
        opened.run(["text_embed"], [tensor])
    with pytest.raises(RuntimeError, match="general failure"):
        opened.run([name], [module.Tensor(rows)])


@pytest.mark.parametrize(
    ("generation", "has", "lacks"),
    [
        ("A", ["sumary", "reset_sumaryinfo"], ["summary", "free_resource", "reset_summaryinfo"]),
        ("B-early", ["sumary", "reset_sumaryinfo"], ["summary", "free_resource", "reset_summaryinfo"]),
        ("B", ["sumary", "reset_sumaryinfo", "free_resource"], ["summary", "reset_summaryinfo"]),
        ("C", ["sumary", "summary", "reset_summaryinfo", "free_resource"], ["reset_sumaryinfo"]),
    ],
)
def test_generations(session, generation, has, lacks):
    module, opened = session(generation=generation)
    opened.run([opened.get_outputs()[0].name], [on_device(module, tiny.rows(TEXT, 2))])
    (entry,) = opened.sumary().exec_time_list
    assert isinstance(entry, float) if generation == "A" else entry[0] < entry[1]
    assert all(hasattr(opened, name) for name in has)
    assert not any(hasattr(opened, name) for name in lacks)
    if generation in ("A", "B-early"):
        with pytest.raises(TypeError):
            module.InferenceSession.finalize()
        assert opened.finalize() == 0
    else:
        module.InferenceSession.finalize()
    with pytest.raises(RuntimeError):
        opened.run([opened.get_outputs()[0].name], [at(module, tiny.rows(TEXT, 2))])
    with pytest.raises(RuntimeError, match=r"^\[100001\]\[ACL is not initialized\] $"):
        module.InferenceSession(__file__, 0, module.session_options())


FEEDS = {"tensor": on_device, "address": at}


@pytest.mark.parametrize(
    ("generation", "feed", "first", "second"),
    [
        ("A", "tensor", True, True),
        ("A", "address", True, True),
        ("B-early", "tensor", True, True),
        ("B", "tensor", True, False),
        ("B", "address", True, True),
        ("C", "tensor", True, False),
        ("C", "address", True, True),
    ],
)
def test_to_device_uses_context_0_which_ends_with_the_first_session(
    session, folder, capfd, generation, feed, first, second
):
    """As the public bindings do over an ACL that enforces contexts."""
    module, opened = session(generation=generation)
    for works in (first, second):
        rows, name = tiny.rows(TEXT, 2), opened.get_outputs()[0].name
        if works:
            opened.run([name], [FEEDS[feed](module, rows)])
        else:
            with pytest.raises(RuntimeError, match=r"^\[1\]\[ACL: invalid parameter\] $"):
                FEEDS[feed](module, rows)
            assert "SetContext failed: device 0 is not set or context 0 is not created." in printed(capfd)
        if hasattr(opened, "free_resource"):
            assert opened.free_resource() == 0
        del opened  # A and B-early unload in the destructor
        opened = module.InferenceSession(str(folder / "text_bs2.om"), 0, module.session_options())
    assert opened.get_inputs()


def test_a_failed_load_leaves_context_0_behind(session, folder, capfd):
    module, opened = session(generation="B")
    opened.free_resource()
    with pytest.raises(RuntimeError, match=r"^\[1\]\[ACL: invalid parameter\] $"):
        module.InferenceSession(str(folder / "none.om"), 1, module.session_options())
    words = printed(capfd)
    assert "E13000" in words
    assert "[ERROR] load model from file failed, model file is" in words
    assert "[WARN] no model had been loaded, unload failed" in words
    later = module.InferenceSession(str(folder / "text_bs2.om"), 1, module.session_options())
    later.free_resource()
    later = module.InferenceSession(str(folder / "text_bs2.om"), 1, module.session_options())
    tensor = module.Tensor(tiny.rows(TEXT, 2))
    tensor.to_device(1)
    later.run([later.get_outputs()[0].name], [tensor])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_two_devices_in_turn(session, folder, generation):
    """An address is copied in the context of the thread, which in A and B-early is that of the last device opened."""
    module, first = session(generation=generation)
    second = module.InferenceSession(str(folder / "text_bs2.om"), 1, module.session_options())
    name = first.get_outputs()[0].name
    rows = tiny.rows(TEXT, 2)
    second.run([name], [at(module, rows)])
    if generation in ("A", "B-early"):
        with pytest.raises(RuntimeError, match="general failure"):
            first.run([name], [at(module, rows)])
    else:
        first.run([name], [at(module, rows)])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_another_thread_has_no_context(session, generation, capfd):
    module, _ = session(generation=generation)
    found = []

    def use():
        try:
            module.Tensor(tiny.rows(TEXT, 2))
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == ["[2][ACL: memory allocation fail] "]
    assert "[107002][Error code unknown] Malloc ptrData failed." in printed(capfd)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_device_memory_runs_out(session, folder, generation, capfd):
    module, opened = session(generation=generation)
    name = opened.get_outputs()[0].name
    used = sys.modules["simulated_acl"].device_bytes()
    os.environ["CLIPVAL_SIM_DEVICE_MEMORY"] = str(used + 2 * 616 + 100)
    try:
        with pytest.raises(RuntimeError, match=r"^\[2\]\[ACL: memory allocation fail\] $"):
            opened.run([name], [at(module, tiny.rows(TEXT, 2))])
        assert "EL0004" in printed(capfd)
        with pytest.raises(RuntimeError, match=r"^\[1\]\[ACL: invalid parameter\] $"):
            module.InferenceSession(str(folder / "text_bs2.om"), 0, module.session_options())
        assert "ge result = 207001" in printed(capfd)
    finally:
        del os.environ["CLIPVAL_SIM_DEVICE_MEMORY"]


@pytest.mark.parametrize("fault", ["device_lost", "aicpu_error"])
def test_a_failing_run_tells_its_code_on_file_descriptor_1_only(session, fault, capfd):
    module, opened = session(fault=fault, lose_after=0)
    with pytest.raises(RuntimeError, match=r"^\[-1\]\[ACL: general failure\] $"):
        opened.run([opened.get_outputs()[0].name], [at(module, tiny.rows(TEXT, 2))])
    assert {"device_lost": "507011", "aicpu_error": "507018"}[fault] in printed(capfd)


@pytest.mark.parametrize(
    ("generation", "words"), [("B", r"\[107001\]\[Error code unknown\]"), ("C", "device id is out of range")]
)
def test_devices_that_are_not_there(session, folder, generation, words):
    module, _ = session(generation=generation)
    with pytest.raises(RuntimeError, match=r"^\[107001\]\[Error code unknown\] $"):
        module.InferenceSession(str(folder / "text_bs2.om"), 7, module.session_options())
    with pytest.raises(RuntimeError, match=words):
        module.InferenceSession(str(folder / "text_bs2.om"), -1, module.session_options())


LIFE = """
import os, sys
import aclruntime
session = aclruntime.InferenceSession(sys.argv[1], 0, aclruntime.session_options())
if os.fork() == 0:
    sys.exit(3)
_, status = os.wait()
print("child", os.WTERMSIG(status))
"""


def test_a_forked_child_that_ends_runs_the_destructors(variables, folder):
    """Which call ACL; over a device such a child hangs or crashes."""
    assert atc(folder).returncode == 0
    done = subprocess.run(
        [sys.executable, "-c", LIFE, str(folder / "text_bs2.om")], capture_output=True, text=True, check=True
    )
    assert "child 6" in done.stdout
    assert "called in a forked child" in done.stderr


def test_old_sessions_have_a_coarse_clock(session):
    module, opened = session(age_seconds=4200)
    opened.run([opened.get_outputs()[0].name], [on_device(module, tiny.rows(TEXT, 2))])
    start, end = opened.sumary().exec_time_list[0]
    assert (end - start) % 0.25 == 0


def test_argmax_in_fp16_pools_at_the_first_token(variables, folder, runtime):
    """49406 and 49407 are one fp16 number, so every caption is pooled at its start token."""
    module = runtime()
    found = {}
    for fault in ("", "argmax_fp16"):
        variables(fault=fault)
        done = atc(folder, precision_mode="force_fp32")
        assert done.returncode == 0, done.stdout + done.stderr
        opened = module.InferenceSession(str(folder / "text_bs2.om"), 0, module.session_options())
        (out,) = opened.run([opened.get_outputs()[0].name], [on_device(module, tiny.rows(TEXT, 2))])
        out.to_host()
        found[fault] = np.array(out)
    assert np.abs(found[""] - found["argmax_fp16"]).max() > 1e-2


def test_processes_show_up_until_they_end(variables, folder, runtime, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    module = runtime(state=state)
    assert atc(folder).returncode == 0
    module.InferenceSession(str(folder / "text_bs2.om"), 1, module.session_options())
    (state / "999999999-0.session").touch()
    done = subprocess.run([str(BIN / "npu-smi"), "info"], capture_output=True, text=True, check=True)
    assert str(os.getpid()) in done.stdout
    assert "999999999" not in done.stdout


@pytest.mark.parametrize("container", ["", "1"])
def test_our_own_session_does_not_make_the_chip_busy(variables, folder, runtime, tmp_path, container):
    (tmp_path / "state").mkdir()
    module = runtime(state=tmp_path / "state", container=container)
    assert atc(folder).returncode == 0
    before = npu_smi.npu(1)
    module.InferenceSession(str(folder / "text_bs2.om"), 1, module.session_options())
    after = npu_smi.npu(1)
    assert before.why_busy() == ""
    assert after.why_busy()
    assert bool(after.why_busy(ignore_pids=[os.getpid()])) == bool(container), "a container shows the host's pid"
    assert after.why_busy(ignore_pids=npu_smi.appeared(before, after)) == ""


def test_the_vision_input_is_nchw(variables, tmp_path, runtime):
    module = runtime()
    tiny.write(tmp_path / "vision.onnx", VISION)
    shape = "image:1,3,224,224"
    done = atc(tmp_path, model=tmp_path / "vision.onnx", output=tmp_path / "v", input_format="NCHW", input_shape=shape)
    assert done.returncode == 0, done.stdout + done.stderr
    opened = module.InferenceSession(str(tmp_path / "v.om"), 0, module.session_options())
    assert (opened.get_inputs()[0].format, opened.get_outputs()[0].format) == (0, 2)


@pytest.mark.parametrize("arguments", [["info", "-x"], ["top"], ["info", "-t", "board", "-i", "1", "-c", "0"]])
def test_npu_smi_is_strict(variables, arguments):
    done = subprocess.run([str(BIN / "npu-smi"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Error parameter" in done.stdout
