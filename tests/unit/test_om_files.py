"""Where OM files come from: a folder of ready ones, or the store, once for each ONNX with all its weights."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from clipval import cli
from clipval.ascend import atc, om_files
from clipval.errors import InputError, ToolFailed
from clipval.store import Store
from clipval.towers import TEXT, VISION
from tests import small
from tests.simulator import environment, tiny

OPTIONS = atc.AtcOptions("Ascend910B4")


def test_the_weights_beside_an_onnx_file_count(tmp_path, monkeypatch):
    """Of a tower over 2 GiB the ONNX file itself is the same whatever the weights are."""
    compiled = []

    def compile_om(onnx, folder, name, *arguments, **more):
        compiled.append(name)
        (folder / f"{name}.om").write_bytes(b"om")

    monkeypatch.setattr(atc, "compile_om", compile_om)
    kept = Store(tmp_path)

    def om(weights):
        def build(folder):
            (folder / "text.onnx").write_bytes(b"graph")
            (folder / "text.onnx.data").write_bytes(weights)

        onnx = kept.get("onnx", {"weights": weights.decode()}, build) / "text.onnx"
        return om_files.compiled(kept, onnx, TEXT, 8, OPTIONS)

    first = om(b"1")
    assert om(b"1") == first
    assert om(b"2") != first
    assert compiled == ["text_bs8", "text_bs8"]


def test_ready_files_are_found_by_the_recipes_names(tmp_path):
    (tmp_path / "vit_b_32_text_bs8.om").write_bytes(b"om")
    assert om_files.ready(tmp_path, TEXT, 8).name == "vit_b_32_text_bs8.om"
    with pytest.raises(InputError, match=r"expected one file \*text_bs1.om, found vit_b_32_text_bs8.om"):
        om_files.ready(tmp_path, TEXT, 1)
    (tmp_path / "other_text_bs8.om").write_bytes(b"om")
    with pytest.raises(InputError, match="found other_text_bs8.om, vit_b_32_text_bs8.om"):
        om_files.ready(tmp_path, TEXT, 8)


def test_files_are_compiled_side_by_side_and_a_failure_stops_no_other(tmp_path):
    both = threading.Barrier(2)

    def good():
        both.wait(timeout=60)  # passes only if the other one runs at the same time
        return tmp_path

    def bad():
        both.wait(timeout=60)
        raise ToolFailed("atc: exit code 1")

    made = om_files.side_by_side([bad, good, lambda: tmp_path], jobs=2)
    assert [str(one) for one in made] == ["atc: exit code 1", str(tmp_path), str(tmp_path)]
    assert made[0].kind == ToolFailed.kind


def test_the_command_compiles_what_it_can_and_reports_a_failure_once(tmp_path, monkeypatch, capsys):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    tiny.write(tmp_path / "b_vision.onnx", VISION)
    tiny.write(tmp_path / "b_text.onnx", TEXT, domain="unknown")
    arguments = ["--onnx-prefix", str(tmp_path / "b"), "--batch-sizes", "1,2", "--soc-version", "Ascend910B4"]
    assert cli.main(["compile", *arguments, "--jobs", "2"]) == 2
    assert sorted(path.name for path in tmp_path.glob("*.om")) == ["b_vision_bs1.om", "b_vision_bs2.om"]
    logs = [f"b_{tower}_bs{size}.log" for tower in ("text", "vision") for size in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.log")) == logs
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipval compile: ")]
    assert len(lines) == 2
    assert all(f"text tower, batch size {size}" in line for size, line in zip((1, 2), lines))


def test_an_interrupt_ends_every_compiler(tmp_path):
    """Each atc has a session of its own, so that the terminal's signal does not reach it."""
    program = tmp_path / "bin" / "atc"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 600\n", encoding="utf-8")
    program.chmod(0o755)
    tiny.write(tmp_path / "b_text.onnx", TEXT)
    arguments = ["--model", str(tmp_path / "b_text.onnx"), "--batch-sizes", "1,2,4", "--soc-version", "Ascend910B4"]
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    run = subprocess.Popen(
        [sys.executable, "-m", "clipval", "compile", *arguments, "--jobs", "2"],
        env={**os.environ, "PATH": path}, stderr=subprocess.DEVNULL, preexec_fn=small.hear_interrupts,
    )  # fmt: skip
    pids = tmp_path / "pids"
    _until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) != 0
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    _until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in started))


def _until(true):
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_ready_files_are_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "text_bs8.om").write_bytes(b"om")
    first = om_files.origin(tmp_path, None, ())
    monkeypatch.setattr(om_files.store, "sha256", lambda file: pytest.fail(f"{file} is hashed again"))
    assert om_files.origin(tmp_path, None, ()) == first


def test_batch_sizes_are_those_of_the_files_that_are_there(tmp_path):
    for name in ("vit_b_32_vision_bs1", "vit_b_32_vision_bs16_linux_x86_64", "vit_b_32_text_bs1", "vit_b_32_text_bs16"):
        (tmp_path / f"{name}.om").touch()
    (tmp_path / "vit_b_32_text_bs4.om").touch()
    (tmp_path / "vit_b_32_text_bs8.onnx").touch()
    assert om_files.sizes(tmp_path, [VISION, TEXT]) == (1, 16)
    assert om_files.ready(tmp_path, VISION, 16).name == "vit_b_32_vision_bs16_linux_x86_64.om"
    with pytest.raises(InputError, match=r"expected one file \*vision_bs4.om, found vit_b_32_text_bs1.om, "):
        om_files.ready(tmp_path, VISION, 4)
    (tmp_path / "other_text_bs1.om").touch()
    with pytest.raises(InputError, match=r"expected one file \*text_bs1.om, found other_text_bs1.om, vit_b_32_text"):
        om_files.ready(tmp_path, TEXT, 1)
    with pytest.raises(InputError, match=r"no such folder"):
        om_files.sizes(tmp_path / "none", [VISION, TEXT])


def test_files_of_different_batch_sizes_measure_nothing(tmp_path):
    (tmp_path / "a_vision_bs1.om").touch()
    (tmp_path / "a_text_bs4.om").touch()
    with pytest.raises(
        InputError, match=r"\*vision_bs<N>.om and \*text_bs<N>.om of one batch size, found a_text_bs4.om"
    ):
        om_files.sizes(tmp_path, [VISION, TEXT])
