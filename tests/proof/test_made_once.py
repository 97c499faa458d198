"""A run builds, hashes and loads each thing once, and compiles only the batch sizes that it needs."""

from collections import Counter

import pytest

from tests import small

from .test_simulated_npu import simulated

pytestmark = pytest.mark.proof


def counts(run, tmp_path, *arguments, **variables):
    log = tmp_path / "counts"
    log.unlink(missing_ok=True)
    ended = small.run(
        run, tmp_path / "work", "-p", "tests.proof.counted", *arguments, CLIPVAL_COUNTS=str(log), **variables
    )
    assert ended.code == 0, ended.output[-3000:]
    return Counter(log.read_text(encoding="utf-8").splitlines())


def test_with_three_backends(small_spec, tmp_path):
    chosen = ["-m", "accuracy", "--backends", "pytorch,onnx,om", "--allow-simulated", "--jobs", "2"]
    found = counts(small_spec, tmp_path, *chosen, **simulated())
    again = {line: n for line, n in found.items() if n > 1 and not line.endswith(".om")}
    assert not again
    assert found["loaded model"] == 1
    compiled = {path.name for path in (tmp_path / "work" / "om").glob("*/*.om")}
    assert compiled == {"text_bs1.om", "text_bs8.om", "vision_bs1.om", "vision_bs8.om"}
    opened = {line for line in found if line.startswith("opened ") and line.endswith(".onnx")}
    assert len(opened) == 2

    warm = counts(small_spec, tmp_path, *chosen, **simulated())
    assert not {line: n for line, n in warm.items() if n > 1 and not line.endswith(".om")}
    assert not [line for line in warm if line.startswith("built ")]


def test_a_selection_compiles_what_it_needs(small_spec, tmp_path):
    chosen = ["--backends", "pytorch,om", "--allow-simulated", "-k", "parity and text"]
    ended = small.run(small_spec, tmp_path / "work", "-m", "accuracy", *chosen, **simulated())
    assert "parity/om/text" in {one.gate for one in ended.figures}  # and red, as the other gates are not evaluated
    assert [path.name for path in (tmp_path / "work" / "om").glob("*/*.om")] == ["text_bs8.om"]
