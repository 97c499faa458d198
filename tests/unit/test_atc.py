"""Compiling with the simulated atc: flags, verdicts, advice, scratch and log, key."""

import time

import pytest

from clipval.ascend import atc, atc_advice, cann
from clipval.errors import BackendUnavailable, InputError, ToolFailed, UsageError
from clipval.towers import TEXT, VISION
from tests.simulator import environment, tiny

OPTIONS = atc.AtcOptions("Ascend910B4")


@pytest.fixture
def host(monkeypatch):
    def host(**switches):
        for name, value in environment(**switches).items():
            monkeypatch.setenv(name, value)

    host()
    return host


@pytest.fixture(scope="module")
def text_onnx(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("onnx") / "text.onnx", TEXT)


def compiled(onnx, folder, tower=TEXT, options=OPTIONS, name="text_bs8"):
    (folder / "om").mkdir(exist_ok=True)
    return atc.compile_om(onnx, folder / "om", name, tower, 8, options, logs_folder=folder / "logs")


def test_the_recipes_command_lines(tmp_path):
    output = tmp_path / "vit_b_32_vision_bs8"
    assert atc.command(tmp_path / "v.onnx", output, VISION, 8, OPTIONS) == [
        "atc",
        "--framework=5",
        f"--model={tmp_path}/v.onnx",
        f"--output={output}",
        "--input_format=NCHW",
        "--input_shape=image:8,3,224,224",
        "--log=error",
        "--soc_version=Ascend910B4",
    ]
    text = atc.command(tmp_path / "t.onnx", output, TEXT, 64, OPTIONS)
    assert "--input_format=ND" in text
    assert "--input_shape=text:64,77" in text


def test_precision_flags_and_files_of_extra_flags(tmp_path, monkeypatch):
    (tmp_path / "keep.cfg").write_text("OpType::Softmax\n")
    monkeypatch.chdir(tmp_path)
    options = atc.AtcOptions(
        "Ascend310P3", "mixed_float16", "keep.cfg", ("--fusion_switch_file=keep.cfg", "--op_select_implmode=x")
    )
    flags = atc.command(tmp_path / "t.onnx", tmp_path / "t", TEXT, 1, options)
    assert flags[-4:] == [
        "--precision_mode_v2=mixed_float16",
        f"--keep_dtype={tmp_path}/keep.cfg",
        f"--fusion_switch_file={tmp_path}/keep.cfg",
        "--op_select_implmode=x",
    ]
    older = atc.AtcOptions("Ascend310P3", "allow_mix_precision")
    assert (
        atc.command(tmp_path / "t.onnx", tmp_path / "t", TEXT, 1, older)[-1] == "--precision_mode=allow_mix_precision"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision_mode": "fp64"}, "precision mode 'fp64': expected one of"),
        ({"soc_version": "910B4"}, "expected a chip such as Ascend910B4"),
        ({"extra": ("--output=x",)}, "--output: clipval sets it itself"),
        ({"extra": ("--soc_version", "Ascend310P3")}, "--soc_version: clipval sets it itself"),
        ({"extra": ("--precision_mode_v2=origin",)}, "give it as --precision-mode"),
        ({"extra": ("--dynamic_batch_size=1,2",)}, "an OM of one static batch size"),
        ({"extra": ("high_precision",)}, "is not a flag"),
    ],
)
def test_options_that_cannot_be(settings, words):
    with pytest.raises(UsageError, match=words):
        atc.AtcOptions(**{"soc_version": "Ascend910B4", **settings})


def test_keep_dtype_must_exist_and_matter(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        atc.AtcOptions("Ascend910B4", keep_dtype=str(tmp_path / "none.cfg"))
    keep = tmp_path / "keep.cfg"
    keep.write_text("Softmax_1\n")
    with pytest.raises(UsageError, match="no effect"):
        atc.AtcOptions("Ascend910B4", "origin", str(keep))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("", "fp16"), ("force_fp16", "fp16"), ("force_fp32", "fp32"), ("must_keep_origin_dtype", "fp32"), 
     ("origin", "fp32"),     ("allow_mix_precision_bf16", "fp16"), ("cube_fp16in_fp32out", "fp16")],
)  # fmt: skip
def test_precision_class(mode, kind):
    assert atc.precision_class(mode) == kind


@pytest.mark.parametrize("suffix", ["", "1"])
def test_compile_keeps_the_log_and_nothing_else(host, text_onnx, tmp_path, suffix):
    host(om_suffix=suffix)
    made = compiled(text_onnx, tmp_path)
    assert made == tmp_path / "om" / "text_bs8.om"
    kept = sorted(path.name for path in (tmp_path / "om").iterdir())
    assert kept == ["text_bs8.fusion_result.json", "text_bs8.om"], "the scratch directory stayed"
    log = (tmp_path / "logs" / "text_bs8.log").read_text()
    assert "--input_shape=text:8,77" in log
    assert log.index("ATC run success") < log.index("W11001: Op"), "the simulator warns after the success line"
    assert "clipval: W11001: an operator runs on the AICPU" in log


@pytest.mark.parametrize("code", ["E10001", "E16002", "E40000", "EZ9999"])
def test_a_failed_compile_names_advice_and_log(host, text_onnx, tmp_path, code):
    host(fault=f"atc_{code}")
    with pytest.raises(ToolFailed) as caught:
        compiled(text_onnx, tmp_path)
    message = str(caught.value)
    assert f"{code}: {atc_advice.ADVICE[code]}" in message
    assert "text tower, batch size 8: exit code 1" in message
    log = tmp_path / "logs" / "text_bs8.log"
    assert message.endswith(f"Log: {log}")
    assert code in log.read_text()
    assert list((tmp_path / "om").iterdir()) == []


@pytest.mark.parametrize("code", sorted(atc_advice.ADVICE))
def test_each_code_has_advice_that_wins_over_the_inner_error(code):
    log = f"EZ9999: Inner Error!\n{code}: [PID: 123456] words of atc\n"
    advice = atc_advice.advice(log, "source it")
    assert advice.startswith("EZ9999: " if code in atc_advice.INNER else f"{code}: {atc_advice.ADVICE[code]}")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("atc_lies", "reports success, but wrote nothing instead of text_bs8.om"),
        ("atc_no_marker", "exit code 0, but no 'ATC run success'"),
        ("atc_killed", "exit code -9"),
        ("no_hal", "add <toolkit>/<arch>-linux/devlib to LD_LIBRARY_PATH"),
        ("no_set_env", "libge_runner.so is not found; .*set_env.sh"),
        ("atc_E99999", "E99999 .*error code reference"),
    ],
)
def test_other_failures(host, text_onnx, tmp_path, fault, words):
    host(fault=fault)
    with pytest.raises(ToolFailed, match=words):
        compiled(text_onnx, tmp_path)


def test_a_hanging_atc_is_killed(host, text_onnx, tmp_path):
    host(fault="atc_hangs")
    started = time.monotonic()
    with pytest.raises(ToolFailed, match=r"killed after 0.5 s"):
        compiled(text_onnx, tmp_path, options=atc.AtcOptions("Ascend910B4", timeout_seconds=0.5))
    assert time.monotonic() - started < 10
    assert list((tmp_path / "om").iterdir()) == []


def test_workers_of_a_killed_atc_die_too(text_onnx, tmp_path, monkeypatch):
    program = tmp_path / "atc"
    program.write_text(f"#!/bin/sh\n(sleep 1; echo alive > {tmp_path}/alive) &\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ToolFailed, match="killed after"):
        compiled(text_onnx, tmp_path, options=atc.AtcOptions("Ascend910B4", timeout_seconds=0.3))
    time.sleep(1.2)
    assert not (tmp_path / "alive").exists()


def test_real_causes_in_the_model(host, text_onnx, tmp_path):
    with pytest.raises(ToolFailed, match="E10016: the input name is not in the ONNX file"):
        compiled(text_onnx, tmp_path, tower=VISION)
    newer = tiny.write(tmp_path / "newer.onnx", VISION, opset=14, domain="my.domain")
    with pytest.raises(ToolFailed, match=r"E(16002|10041)"):
        compiled(newer, tmp_path, tower=VISION)
    (tmp_path / "cut.onnx").write_bytes(text_onnx.read_bytes()[:1000])
    with pytest.raises(ToolFailed, match="E10041"):
        compiled(tmp_path / "cut.onnx", tmp_path)
    with pytest.raises(ToolFailed, match="unknown command line flag 'no_such_flag'"):
        compiled(text_onnx, tmp_path, options=atc.AtcOptions("Ascend910B4", extra=("--no_such_flag=1",)))


def test_a_missing_package_is_named():
    log = "E40021: Failed to compile Op\nModuleNotFoundError: No module named 'decorator'\n"
    assert atc_advice.advice(log, "source it").startswith("E40021: no Python package 'decorator'")
    assert "command not found (sh: atc.bin: command not found); source it" in atc_advice.advice(
        "sh: atc.bin: command not found\n", "source it"
    ).replace("a command is not found", "command not found")


def test_no_atc_no_onnx(host, text_onnx, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="export it first"):
        compiled(tmp_path / "none.onnx", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"atc: not found on PATH; .*set_env.sh"):
        compiled(text_onnx, tmp_path)


def test_the_key_holds_all_that_matters(host, tmp_path):
    keep = tmp_path / "keep.cfg"
    keep.write_text("Softmax_1\n")

    def key(tower=TEXT, size=8, **settings):
        return atc.key(tower, size, atc.AtcOptions(**{"soc_version": "Ascend910B4", **settings}))

    first = key()
    assert first == key()
    assert first["cann"] == "8.0.RC3.simulated"
    kept = key(keep_dtype=str(keep))
    others = [key(VISION), key(size=4), key(soc_version="Ascend910B3"), key(precision_mode="force_fp16"), kept]
    others.append(key(extra=("--op_select_implmode=high_precision",)))
    keep.write_text("Softmax_2\n")
    others.append(key(keep_dtype=str(keep)))
    assert all(one != first for one in others)
    assert kept != others[-1]


LATEST = "usr/local/Ascend/ascend-toolkit/latest"


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        (f"{LATEST}/aarch64-linux/ascend_toolkit_install.info", "arch=aarch64\nversion=7.0.RC1\n", "7.0.RC1"),
        ("usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info", "Version=8.5.0\ninnerversion=V1\n", "8.5.0"),
        ("usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info", "version=9.1.0\n", "9.1.0"),
        ("usr/local/Ascend/cann-9.0.0/aarch64-linux/ascend_toolkit_install.info", "version=9.0.0\n", "9.0.0"),
        ("usr/local/Ascend/cann/share/info/runtime/version.info", "Version=9.1.0\ntimestamp=2026\n", "9.1.0"),
        (f"{LATEST}/version.cfg", "toolkit_running_version=[7.6.0.1.220:8.0.0]\n", "8.0.0"),
        ("usr/local/Ascend/elsewhere/version.cfg", "toolkit_running_version=[1:2]\n", "unknown"),
    ],
)  # fmt: skip
def test_version_of_every_layout(tmp_path, monkeypatch, path, text, found):
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert cann.version(tmp_path) == found


def test_the_newest_cann_is_found_first(tmp_path, monkeypatch):
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    ascend = tmp_path / "usr/local/Ascend"
    for folder in ("ascend-toolkit", "cann-8.5.0", "cann-10.0.0", "cann-9.1.0"):
        (ascend / folder).mkdir(parents=True)
        (ascend / folder / "set_env.sh").write_text("")
    found = [path.parent.name for path in cann.set_env_files(tmp_path)]
    assert found == ["cann-10.0.0", "cann-9.1.0", "cann-8.5.0", "ascend-toolkit"]
    (ascend / "cann").symlink_to("cann-8.5.0")
    assert cann.how_to_source(tmp_path) == f"run `source {ascend / 'cann' / 'set_env.sh'}` first, in the same shell"


def test_operators_are_a_package_of_their_own_from_8_5_on(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", "/opt/cann")
    assert [cann.needs_operators(version) for version in ("7.0.RC1", "8.3.RC2", "8.5.0", "9.1.0", "unknown")] == [
        *(False, False, True, True, False)
    ]
    assert cann.operators(tmp_path) == ""
    (tmp_path / "opt/cann/aarch64-linux").mkdir(parents=True)
    info = tmp_path / "opt/cann/aarch64-linux/ascend_ops_install.info"
    info.write_text("package_name=Ascend-cann-910b-ops\nversion=9.1.0\n")
    assert cann.operators(tmp_path) == "Ascend-cann-910b-ops 9.1.0"
