"""What a line that is narrowed by anything says, and what it may end with."""

import re
import shlex

import pytest

from tests import small

pytestmark = pytest.mark.proof
NAMED = "--backends=pytorch,onnx"
ACCEPTANCE = "tests/acceptance"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-k", "prepared"], r"PASS of 2 of \d+ gates; \d+ left out by -k 'prepared'"),
        (["tests/acceptance/test_artifacts.py"], r"PASS of 4 of \d+ gates; \d+ left out by the paths given"),
        (["tests/acceptance/test_artifacts.py", "-k", "onnx"], r"\d+ left out by -k 'onnx', the paths given"),
        (["tests/../tests/acceptance"], r"PASS: \d+ gates passed"),
        ([ACCEPTANCE, "tests/unit/test_gates.py"], r"PASS: \d+ gates passed"),
        (["-n", "2", "-k", "prepared"], r"PASS of 2 of \d+ gates; \d+ left out by -k 'prepared'"),
    ],
)
def test_a_line_without_named_backends_says_what_it_left_out(arguments, words, small_spec, clean):
    ended = small.run(small_spec, clean, "-m", "accuracy", *arguments)
    assert ended.code == 0, ended.output[-3000:]
    assert re.search(words, ended.output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([NAMED, "-k", "prepared"], r"\d+ not evaluated \(run with -k 'prepared'\)"),
        ([NAMED, "tests/acceptance/test_artifacts.py"], r"\d+ not evaluated \(run with the paths given\)"),
        ([NAMED, "-n", "2", "-k", "prepared"], r"\d+ not evaluated \(run with -k 'prepared'\)"),
        ([NAMED, "-p", "no:clipval-keeper", "-k", "prepared"], r"\d+ not evaluated"),
        ([ACCEPTANCE, "tests/unit/test_gates.py", f"--deselect={ACCEPTANCE}/test_parity.py"], "2 not evaluated"),
        (["tests/../tests/acceptance", f"--ignore={ACCEPTANCE}/test_parity.py"], r"\(run with --ignore\)"),
        ([f"--deselect={ACCEPTANCE}/test_parity.py"], r"2 not evaluated \(run with --deselect\)"),
    ],
)
def test_what_was_not_asked_for_by_name_is_never_green(arguments, words, small_spec, clean):
    ended = small.run(small_spec, clean, "-m", "accuracy", *arguments)
    assert ended.code == 1, ended.output[-3000:]
    assert re.search(words, ended.output)
    assert "PASS" not in ended.output


def test_options_of_the_environment_narrow_a_run_too(small_spec, clean):
    ended = small.run(small_spec, clean, "-m", "accuracy", NAMED, PYTEST_ADDOPTS="-k prepared")
    assert ended.code == 1
    assert re.search(r"\d+ not evaluated \(run with -k 'prepared'\)", ended.output)


def test_the_last_failed_of_a_run_without_a_record_are_all(small_spec, clean, tmp_path):
    arguments = ["-m", "accuracy", "-p", "cacheprovider", "--lf", "-o", f"cache_dir={tmp_path / 'cache'}"]
    ended = small.run(small_spec, clean, *arguments, NAMED)
    assert ended.code == 0, ended.output[-3000:]
    assert re.search(r"PASS: \d+ gates passed", ended.output)


def test_some_gates_are_judged_alone(small_spec, clean):
    ended = small.run(small_spec, clean, NAMED, "--gate=parity/onnx/text,prepared")
    assert ended.code == 0, ended.output[-3000:]
    assert re.search(r"PASS of 3 of \d+ gates; \d+ left out by --gate and not judged", ended.output)
    assert {one.gate for one in ended.figures} == {"parity/onnx/text", "prepared/data/vision", "prepared/data/text"}


def test_a_failure_ends_with_the_command_that_judges_its_gate_alone(small_spec, workdir):
    red = small.run(small_spec, workdir, "-m", "accuracy", NAMED, CLIPVAL_FAULT="rounded_to_fp16")
    (command,) = re.findall(r"to judge this gate alone: pytest (.*--gate=parity/onnx/text)$", red.output, re.MULTILINE)
    assert NAMED in command
    alone = small.run(small_spec, workdir, *shlex.split(command), CLIPVAL_FAULT="rounded_to_fp16")
    assert (alone.code, alone.red) == (1, ["parity/onnx/text"])
    assert small.run(small_spec, workdir, *shlex.split(command)).code == 0


@pytest.mark.parametrize("narrowed", [["-k", "vision"], ["--deselect=tests/acceptance/test_parity.py"]])
def test_gates_that_were_named_are_evaluated_whatever_narrows(narrowed, small_spec, clean):
    ended = small.run(small_spec, clean, NAMED, "--gate=parity/onnx", *narrowed)
    assert ended.code == 1
    assert re.search(r"\d not evaluated", ended.output)
