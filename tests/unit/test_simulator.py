"""The simulated host's own quirks: a simulator that is kinder than the device would prove nothing."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

from clipval.ascend import npu_smi
from clipval.towers import TEXT, VISION
from tests.simulator import BIN, LIB, environment, tiny


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
    before = sys.modules.pop("aclruntime", None)

    def runtime(**switches):
        variables(**switches)
        sys.modules.pop("aclruntime", None)
        return importlib.import_module("aclruntime")

    yield runtime
    sys.modules.pop("aclruntime", None)
    if before is not None:
        sys.modules["aclruntime"] = before


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
    with pytest.raises(RuntimeError, match=r"^\[1\]\[ACL: invalid parameter\]$"):
        opened.run([name], [on_device(module, rows.astype(np.int32))])
    assert "in size:616 needsize:1232 not match" in capfd.readouterr().out


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
    with pytest.raises(RuntimeError, match="not on the device"):
        opened.run([name], [module.Tensor(rows)])


@pytest.mark.parametrize(
    ("generation", "has", "lacks"),
    [
        ("A", ["sumary", "reset_sumaryinfo"], ["summary", "free_resource", "reset_summaryinfo"]),
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
    if generation == "A":
        with pytest.raises(TypeError):
            module.InferenceSession.finalize()
        opened.finalize()
    else:
        module.InferenceSession.finalize()
    for use in (opened.get_inputs, opened.sumary, module.InferenceSession.finalize):
        with pytest.raises((RuntimeError, TypeError)):
            use()
    with pytest.raises(RuntimeError, match="100001"):
        module.InferenceSession("x.om", 0, module.session_options())


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
