"""ONNX Runtime's CANN provider, played by a stand-in: precision and bounds, options, placement, cache, one user."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clipval import export, model, store
from clipval.ascend import aclruntime, process
from clipval.ascend import cann as toolkit
from clipval.backends import BackendSettings, Opening, kind, providers
from clipval.backends import onnx as onnx_backend
from clipval.backends.onnx import OnnxBackend
from clipval.backends.pytorch import PytorchBackend
from clipval.embeddings import embed
from clipval.errors import BackendUnavailable, UsageError
from clipval.gates import artifacts, parity
from clipval.options import Settings, add_options
from clipval.results import FAIL, INFO, PASS
from clipval.spec import load
from clipval.towers import TEXT
from tests.unit import cann

KEEP = (("precision_mode", "must_keep_origin_dtype"),)
SOC = "Ascend910B4"


@pytest.fixture(scope="module")
def file(seeded, tmp_path_factory):
    made = tmp_path_factory.mktemp("onnx") / "text.onnx"
    export.export(seeded, TEXT, made, metadata={"clipval.weights": "abc"})
    return made


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No other user of ACL, before and after."""
    monkeypatch.setattr(process, "_user", None)
    for name in process.MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)


def rows(count=6):
    found = export.example_rows(TEXT, count)
    found[:, 1] = np.arange(count) + 320
    return found


def opened(file, tmp_path, options=(), soc=SOC, **settings):
    """A backend as the chain opens it."""
    asked = BackendSettings(
        onnx_providers=(cann.CANN,), onnx_provider_options=tuple(options), soc_version=soc, **settings
    )
    made = SimpleNamespace(settings=asked, store=store.Store(tmp_path / "work"))
    return onnx_backend.KIND.open(made, Opening(TEXT, file, 6, 0))


def judged(seeded, backend):
    """Verdicts of parity with PyTorch, under the bounds that the backend is held to."""
    reference = embed(PytorchBackend(TEXT, model.encoder(seeded, TEXT)), list("abcdef"), rows(), 6)
    where, its = backend.identity, kind("onnx")
    bounds = load("shapes").bounds(its.judged_as(where) or "onnx", its.precision(where), "text")
    found = embed(backend, list("abcdef"), rows(), 6)
    return {figure.verdict for figure in parity.agreement(reference, found, where, TEXT, bounds)}, bounds


def test_it_is_labelled_with_what_it_computes_in(seeded, file, tmp_path, monkeypatch):
    cann.install(monkeypatch)
    backend = opened(file, tmp_path)
    assert (backend.identity.device, backend.identity.precision) == (cann.CANN, "force_fp16")
    assert f"CANN {toolkit.version()}" in backend.identity.version
    verdicts, bounds = judged(seeded, backend)
    assert (verdicts, bounds.backend, bounds.precision) == ({PASS}, "om", "fp16")


def test_options_decide_its_precision_and_its_bounds(seeded, file, tmp_path, monkeypatch):
    made = cann.install(monkeypatch)
    backend = opened(file, tmp_path, KEEP)
    assert backend.identity.precision == "must_keep_origin_dtype"
    assert made.opened[-1] == {"device_id": "0", "precision_mode": "must_keep_origin_dtype"}
    verdicts, bounds = judged(seeded, backend)
    assert (verdicts, bounds.backend, bounds.precision) == ({PASS}, "om", "fp32")


def test_fp16_on_the_cpu_bounds_fails(seeded, file, tmp_path, monkeypatch):
    """What the label fp32 hid: the same figures, held to what ONNX Runtime reaches in fp32."""
    cann.install(monkeypatch, deaf=True)
    found = embed(opened(file, tmp_path, KEEP), list("abcdef"), rows(), 6)
    reference = embed(PytorchBackend(TEXT, model.encoder(seeded, TEXT)), list("abcdef"), rows(), 6)
    where = opened(file, tmp_path, KEEP).identity
    figures = parity.agreement(reference, found, where, TEXT, load("shapes").bounds("onnx", "fp32", "text"))
    assert FAIL in {figure.verdict for figure in figures}


def test_an_option_that_it_does_not_know_is_told_in_its_words(file, tmp_path, monkeypatch):
    cann.install(monkeypatch)
    with pytest.raises(BackendUnavailable, match="precission_mode=x cannot load .*Unknown provider option: precission"):
        opened(file, tmp_path, (("precission_mode", "x"),))


def test_a_precision_mode_that_atc_does_not_know_is_wrong_usage(file, tmp_path, monkeypatch):
    cann.install(monkeypatch)
    with pytest.raises(UsageError, match="precision mode 'fp12'"):
        opened(file, tmp_path, (("precision_mode", "fp12"),))


@pytest.mark.parametrize("assignment", [True, False], ids=["assignment", "profile"])
@pytest.mark.parametrize("operator", ["Erf", "ReduceMean", "MatMul"])
def test_an_operator_that_strays_to_the_cpu_is_an_error(file, tmp_path, monkeypatch, assignment, operator):
    witness = "graph assignment" if assignment and cann.has_assignment() else "profile"
    cann.install(monkeypatch, stray=[operator], assignment=assignment)
    words = rf"fell back to CPUExecutionProvider for \d+ operators \({operator} \d+\), as the {witness} says"
    with pytest.raises(BackendUnavailable, match=f"{words}.*--opset-version 14.*--allow-cpu-operators {operator}$"):
        opened(file, tmp_path)
    with pytest.raises(BackendUnavailable, match=words):
        opened(file, tmp_path, allow_cpu_operators=("Gelu",))
    backend = opened(file, tmp_path, allow_cpu_operators=("Gelu", operator))
    assert backend.placement.strayed.keys() == {operator}
    assert backend.placement.operators[cann.CPU].keys() == {operator}


@pytest.mark.parametrize("assignment", [True, False], ids=["assignment", "profile"])
def test_operators_on_shapes_may_stay_on_the_cpu(file, tmp_path, monkeypatch, assignment):
    """Shape itself; but not the Gather that looks tokens up, though shapes are gathered from too."""
    cann.install(monkeypatch, stray=["Shape"], assignment=assignment)
    assert opened(file, tmp_path).placement.strayed == {}
    cann.install(monkeypatch, stray=["Shape", "Gather"], assignment=assignment)
    with pytest.raises(BackendUnavailable, match=r"for \d+ operators \(Gather \d+\)"):
        opened(file, tmp_path)


def test_a_provider_that_computes_nothing(file, tmp_path, monkeypatch):
    everything = {node.op_type for node in export_nodes(file)}
    cann.install(monkeypatch, stray=everything | {"FusedMatMul", "Gelu", "BiasGelu", "LayerNormalization", "FusedGemm"})
    with pytest.raises(BackendUnavailable, match="fell back to CPUExecutionProvider"):
        opened(file, tmp_path, allow_cpu_operators=tuple(everything))


def export_nodes(file):
    import onnx

    return onnx.load(str(file)).graph.node


def test_placement_is_in_the_report(file, tmp_path, monkeypatch):
    cann.install(monkeypatch, stray=["Erf"])
    backend = opened(file, tmp_path, allow_cpu_operators=("Erf",))
    _, shown = artifacts.artifact(file, artifacts.examine(file, TEXT), TEXT, "abc", backend.identity, backend.placement)
    assert (shown.verdict, shown.measured) == (INFO, backend.placement.strayed["Erf"])
    assert shown.count == sum(cann.operators(backend).values())
    assert shown.detail.operators[cann.CPU].keys() == {"Erf"}
    assert "CANNExecutionProvider: " in shown.message


def test_the_cpu_tells_its_operators_too(file):
    backend = OnnxBackend(TEXT, file)
    assert set(cann.operators(backend)) <= {cann.CPU}
    assert backend.placement.strayed == {}


def test_compiled_models_lie_in_the_work_directory_by_all_they_depend_on(file, tmp_path, monkeypatch):
    made = cann.install(monkeypatch)
    here = Path.cwd()
    before = sorted(here.iterdir())
    assert opened(file, tmp_path, KEEP).run(rows()).shape == (6, TEXT.width)
    first = list(made.compiled)
    assert {path.parents[2] for path in first} == {tmp_path / "work"}
    assert len({path.parent for path in first}) == 1
    opened(file, tmp_path, KEEP).run(rows())
    assert made.compiled == first, "nothing is compiled twice"
    opened(file, tmp_path).run(rows())
    opened(file, tmp_path, KEEP, soc="Ascend310P3").run(rows())
    monkeypatch.setattr(toolkit, "version", lambda: "9.9.9")
    opened(file, tmp_path, KEEP).run(rows())
    assert len({path.parent for path in made.compiled}) == 4, "precision, chip and CANN each have their own"
    assert Path.cwd() == here
    assert sorted(here.iterdir()) == before


def test_a_cache_of_another_precision_is_not_taken(seeded, file, tmp_path, monkeypatch):
    """The stand-in, like the provider, would run the fp16 file that it finds."""
    cann.install(monkeypatch)
    rounded = opened(file, tmp_path).run(rows())
    exact = opened(file, tmp_path, KEEP).run(rows())
    assert np.abs(rounded - exact).max() > 1e-5
    assert np.abs(exact - OnnxBackend(TEXT, file).run(rows())).max() < 2e-6


def test_rebuild_empties_the_cache(tmp_path):
    folder = store.Store(tmp_path).folder("cann", {"a": 1})
    (folder / "old.om").write_text("x")
    assert (store.Store(tmp_path).folder("cann", {"a": 1}) / "old.om").exists()
    again = store.Store(tmp_path, rebuild_before=folder.stat().st_mtime + 10).folder("cann", {"a": 1})
    assert again == folder
    assert not (again / "old.om").exists()


def test_one_process_never_holds_aclruntime_and_the_provider(file, tmp_path, monkeypatch):
    cann.install(monkeypatch)
    opened(file, tmp_path)
    opened(file, tmp_path)
    with pytest.raises(BackendUnavailable, match="om backend: onnxruntime's CANN provider is in this process"):
        aclruntime.load()
    monkeypatch.setattr(process, "_user", None)
    monkeypatch.setitem(sys.modules, "aclruntime", SimpleNamespace())
    aclruntime.load()
    with pytest.raises(BackendUnavailable, match="CANN provider: aclruntime is in this process"):
        opened(file, tmp_path)


@pytest.mark.parametrize("module", ["acl", "torch_npu"])
def test_other_users_of_acl_are_refused(file, tmp_path, monkeypatch, module):
    cann.install(monkeypatch)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace())
    with pytest.raises(BackendUnavailable, match=f"CANN provider: {module} is in this process"):
        opened(file, tmp_path)


@pytest.mark.parametrize(
    ("provider", "options", "precision", "held_to"),
    [
        (providers.CPU, {}, "fp32", "fp32"),
        (providers.CUDA, {"use_tf32": "0"}, "fp32", "fp32"),
        (providers.CUDA, {"use_tf32": "1"}, "tf32", "fp16"),
        (providers.CANN, {}, "force_fp16", "fp16"),
        (providers.CANN, {"precision_mode": "allow_mix_precision"}, "allow_mix_precision", "fp16"),
        (providers.CANN, {"precision_mode": "force_fp32"}, "force_fp32", "fp32"),
        (providers.CANN, {"precision_mode_v2": "origin"}, "origin", "fp32"),
        (providers.TENSORRT, {}, "tf32", "fp16"),
        (providers.TENSORRT, {"trt_fp16_enable": "True"}, "fp16", "fp16"),
        (providers.OPENVINO, {}, "fp32", "fp32"),
        (providers.OPENVINO, {"device_type": "GPU"}, "fp16", "fp16"),
        (providers.OPENVINO, {"device_type": "GPU", "precision": "FP32"}, "fp32", "fp32"),
        (providers.OPENVINO, {"precision": "ACCURACY"}, "accuracy", "fp16"),
        ("XnnpackExecutionProvider", {}, "fp32", "fp32"),
    ],
)
def test_precision_of_every_provider(provider, options, precision, held_to):
    assert providers.precision(provider, options) == precision
    assert providers.precision_class(precision) == held_to


def test_options_of_the_command_line():
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser.add_argument, ["--onnx-provider-options", "--allow-cpu-operators"])
    given = 'precision_mode=must_keep_origin_dtype,optypelist_for_implmode="Gelu,Sigmoid",device_id=1'
    found = Settings.of(parser.parse_args(["--onnx-provider-options", given, "--allow-cpu-operators", "Gelu, Erf"]))
    assert found.onnx_provider_options == (
        *(
            ("precision_mode", "must_keep_origin_dtype"),
            ("optypelist_for_implmode", "Gelu,Sigmoid"),
            ("device_id", "1"),
        ),
    )
    assert found.allow_cpu_operators == ("Gelu", "Erf")
    for wrong in ("precision_mode", "=1", "a=1,a=2", "a=1,'b", ""):
        with pytest.raises(UsageError, match="provider options"):
            providers.parse(wrong)


def test_options_are_part_of_what_a_baseline_compares():
    assert kind("onnx").origin(BackendSettings(onnx_provider_options=KEEP)) == "precision_mode=must_keep_origin_dtype"
