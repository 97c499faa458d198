"""Other ways to compile: how trials are shown, lists of operators that are kept, and which fusion made an operator."""

import json

import pytest

from clipval import options
from clipval.diagnose import fusions, trials
from clipval.diagnose.finding import DIVERGENCE, NONE, Finding
from clipval.errors import InputError, UsageError

FIGURES = trials.Figures(0.9999, 0.99999, 1e-3, True, "100.0 at batch size 8")


def found(*names):
    return Finding(DIVERGENCE if names else NONE, "om vision", f"om vision: {len(names)}", keep=names)


def test_the_table_has_a_line_a_way_and_tower_and_says_what_failed():
    good = trials.Trial("force_fp32", {"vision": FIGURES, "text": FIGURES}, {"image_retrieval_recall@5": 0.5})
    bad = trials.Trial("fp16", {"vision": FIGURES._replace(within=False)})
    none = trials.Trial("mixed_hif8", failed="atc: exit code 1")
    lines = trials.table([good, bad, none])
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["force_fp32", "vision"],
        ["force_fp32", "text"],
        ["fp16", "vision"],
    ]
    assert "image R@5 0.5000" in lines[1]
    assert "BEYOND" in lines[3]
    assert lines[-1] == "mixed_hif8: atc: exit code 1"
    assert (good.good, bad.good, none.good) == (True, False, False)


def test_modes_are_those_of_atc():
    assert trials.modes("force_fp16, origin,force_fp16") == ("force_fp16", "origin")
    with pytest.raises(UsageError, match="half"):
        trials.modes("force_fp16,half")
    with pytest.raises(UsageError, match="expected a list"):
        trials.modes(" ,")


def test_a_list_grows_until_there_is_no_excess(tmp_path):
    file, looked = tmp_path / "keep.cfg", []

    def look(settings):
        looked.append(trials.read_list(settings.keep_dtype))
        return found("b", "a") if len(looked) == 1 else found()

    after, said = trials.keep(options.Settings(), "om", "vision", found("a"), file, look)
    assert looked == [["a"], ["a", "b"]]
    assert after.verdict == NONE
    assert said == f"confirmed: with --keep-dtype {file} (2 operators) there is no excess"


def test_what_precision_does_not_help_is_said(tmp_path):
    file, looked = tmp_path / "keep.cfg", []

    def look(settings):
        looked.append(settings)
        return found("a")

    _, said = trials.keep(options.Settings(), "om", "vision", found("a"), file, look)
    assert len(looked) == 1
    assert said.startswith("not confirmed: ")
    assert said.endswith("om vision: 1")
    with pytest.raises(UsageError, match="no operator of the vision tower"):
        trials.keep(options.Settings(), "om", "vision", found(), file, look)
    with pytest.raises(InputError, match="cannot be written"):
        trials.keep(options.Settings(), "om", "vision", found("a"), tmp_path / "no" / "keep.cfg", look)


def test_the_fusion_that_made_an_operator_is_named(tmp_path):
    def attribute(key, *values):
        return {"key": key, "value": {"list": {"s": list(values)}}}

    made = {
        "name": "norm",
        "attr": [attribute("pass_name", "A", "B", "A"), attribute(fusions.ORIGINS, "x\\303\\244", "y")],
    }
    file = tmp_path / "om.json"
    file.write_text(json.dumps({"graph": [{"op": [made, {"name": "plain"}]}]}))
    assert fusions.passes(file) == {"norm": ["A", "B"]}
    assert fusions.names(file)["plain"] == []
    result = tmp_path / "fusion_result.json"
    kinds = {
        "graph_fusion": {"A": {"effect_times": "2"}, "N": {"effect_times": "0"}},
        "ub_fusion": {"C": {"effect_times": 1}},
    }
    result.write_text(json.dumps([kinds, kinds]))
    counts = fusions.applied(result)
    assert counts == {"A": 4, "C": 2}
    (said,) = fusions.advice("norm", fusions.passes(file), counts)
    assert said.startswith("switch off the fusion that made norm: A (applied 4 times), B (--fusion_switch_file")
    assert fusions.advice("plain", fusions.passes(file), counts) == []
    assert "an applied fusion: A, C" in fusions.advice("plain", {}, counts)[0]
    result.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        fusions.applied(result)
    file.write_text(json.dumps({"graph": [{"op": [{"type": "x"}]}]}))
    with pytest.raises(InputError, match="make it with atc --mode=1"):
        fusions.names(file)
