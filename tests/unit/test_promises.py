"""What was asked for is done, or found at the start to be impossible: comparisons, files to write, timing, gates."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clipval import promise
from clipval.chain import Chain
from clipval.datasets import shapes
from clipval.errors import InputError
from clipval.options import Settings
from clipval.throughput import baseline
from tests import small

from .conftest import CONFIG


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "b.json"
    baseline.save(baseline.Baseline({}, {"onnx/text/8/inference": [100.0] * 5}), file)
    return file


def run(file, tmp_path, *arguments):
    return small.run("shapes", tmp_path / "work", f"--baseline={file}", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "accuracy"], "--baseline compares throughput, which -m leaves out; add perf to it"),
        (["-m", "perf", "-n", "2"], "throughput cannot be measured by several workers at once"),
        (["-n", "2"], "throughput cannot be measured by several workers at once"),
    ],
)
def test_a_run_without_throughput_takes_no_baseline(arguments, said, saved, tmp_path):
    ended = run(saved, tmp_path, *arguments)
    assert ended.code == 4
    assert said in ended.output


def test_a_baseline_is_read_before_anything_is_measured(tmp_path):
    ended = run(tmp_path / "none.json", tmp_path, "-m", "perf")
    assert ended.code == 4
    assert "No such file or directory; record it with clipval baseline --save" in ended.output


def test_a_selection_that_leaves_the_comparison_out_fails(saved, tmp_path):
    ended = run(saved, tmp_path, "-m", "accuracy or perf", "-k", "nothing_at_all")
    assert ended.code == 1
    assert "baseline/rows" in ended.output
    assert "FAIL: 0 gates passed, 0 failed, 1 not evaluated" in ended.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "accuracy", "--report={taken}/report"], "--report {taken}/report/report.json: cannot be written"),
        (["-m", "accuracy", "--junitxml={taken}/junit.xml"], "--junitxml {taken}/junit.xml: cannot be written"),
        (
            ["-m", "perf", "--benchmark-histogram={taken}/plot"],
            "--benchmark-histogram {taken}/plot.svg: cannot be written",
        ),
        (
            ["-m", "perf", "--benchmark-save=x", "--benchmark-storage=file://{taken}/kept"],
            "--benchmark-storage {taken}/kept/new.json: cannot be written",
        ),
        (["-m", "perf", "--benchmark-json={taken}/perf.json"], "{taken}/perf.json"),
        (["-m", "perf", "--benchmark-disable"], "--benchmark-disable: this run promises throughput, which would not"),
        (["-m", "perf", "-p", "no:benchmark"], "throughput needs pytest-benchmark, which is not loaded"),
        (["--benchmark-only"], "--benchmark-only skips the accuracy gates"),
        (["--gate=parity/onx/text"], "not a gate of this run; did you mean parity/onnx/text"),
        (
            ["--gate=recall", "-m", "perf"],
            "--gate recall: not a gate of this run; it has e.g. throughput/",
        ),
    ],
)
def test_what_cannot_be_done_is_said_at_the_start(arguments, said, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine", encoding="utf-8")
    ended = small.run("shapes", tmp_path / "work", *(one.format(taken=taken) for one in arguments))
    assert ended.code == 4, ended.output[-2000:]
    assert said.format(taken=taken) in ended.output
    assert taken.read_text(encoding="utf-8") == "mine"


def test_a_folder_of_data_is_not_taken_for_the_tests(tmp_path):
    """pytest takes the value of an option it does not know yet for a path of tests, and another root with it."""
    ended = small.run(
        "shapes", tmp_path / "work", "-m", "accuracy", "--data-dir", str(tmp_path), "--collect-only", "-q"
    )
    assert ended.code == 0, ended.output[-2000:]
    assert "tests/acceptance/test_parity.py::test_parity[onnx-text]" in ended.output


def test_other_projects_keep_their_own_options(tmp_path):
    """Where no conftest.py uses clipval, a run neither has its options nor imports it."""
    (tmp_path / "conftest.py").write_text(
        "import sys\ndef pytest_addoption(parser):\n    parser.addoption('--spec', '--data-dir', type=int)\n"
        "def pytest_unconfigure():\n    assert 'clipval.options' not in sys.modules\n",
        encoding="utf-8",
    )
    (tmp_path / "test_it.py").write_text("def test(pytestconfig):\n    assert pytestconfig.option.spec == 3\n")
    plugins = ["-p", "no:clipval-options", "-p", "clipval.entry", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "--spec", "3"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables = {**outside, "PYTHONPATH": str(small.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def own_data(tmp_path):
    """A chain of a user's own data set; its golden file is not there yet."""
    shapes.write(tmp_path / "data", count=6)
    text = small.write_spec(tmp_path).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith(("images", "captions"))]
    (tmp_path / "own.toml").write_text("\n".join(lines), encoding="utf-8")
    return Settings(spec=str(tmp_path / "own.toml"), workdir=tmp_path / "work", data_dir=tmp_path / "data")


def other_architecture(settings):
    import torch

    file = settings.workdir.parent / "other.pt"
    torch.save({"visual.proj": torch.zeros(2, 2), "logit_scale": torch.ones(())}, file)
    return replace(settings, pretrained=str(file)), "other.pt: not of architecture shapes-vit"


def half_an_image(settings):
    image = sorted(settings.data_dir.glob("*.jpg"))[3]
    image.write_bytes(image.read_bytes()[:900])
    return settings, f"{image.name}: cannot be read, not a picture or damaged"


def other_size(settings):
    config = json.loads(Path(CONFIG).read_text(encoding="utf-8"))
    config["vision_cfg"]["image_size"] = 256
    file = settings.workdir.parent / "larger.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    weights = CONFIG.replace(".json", ".pt")
    return replace(settings, model_name=str(file), pretrained=weights), "has 50 positions, the architecture 65"


def no_golden_file(settings):
    spec = settings.workdir.parent / "golden.toml"
    text = Path(settings.spec).read_text(encoding="utf-8")
    spec.write_text(re.sub(r'file = ".*"', 'file = "none.npz"', text), encoding="utf-8")
    return replace(settings, spec=str(spec), data_dir=None), "none.npz: cannot be read"


WRONG = [other_architecture, half_an_image, other_size, no_golden_file]


@pytest.mark.parametrize("alone", [True, False], ids=["one process", "workers"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_the_input_is_found_before_the_first_gate(wrong, alone, own_data):
    settings, words = wrong(own_data)
    chain = Chain(settings)
    with pytest.raises(InputError, match=words):
        promise.check_inputs(chain, ["values/onnx/vision", "parity/onnx/text"], alone)
    assert not list(settings.workdir.glob("onnx/*"))


def test_gates_of_the_model_alone_do_not_prepare_the_data(own_data):
    settings, _ = half_an_image(own_data)
    promise.check_inputs(Chain(settings), ["artifact/onnx/text", "probe/onnx/vision"], True)
    assert not list(settings.workdir.glob("prepared/*"))


def test_a_defect_of_the_code_is_left_to_the_gate_that_meets_it(own_data, monkeypatch):
    monkeypatch.setattr("clipval.preprocess.prepare", lambda *_: 1 / 0)
    chain = Chain(own_data)
    promise.check_inputs(chain, ["values/onnx/vision"], True)
    with pytest.raises(ZeroDivisionError):
        chain.prepared  # noqa: B018  as the gate does
