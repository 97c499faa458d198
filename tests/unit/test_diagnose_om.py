"""An OM that dumps, on the simulated host: its operators against the ONNX file that it was compiled from."""

import json
import os

import numpy as np
import onnx
import pytest

from clipval import cli, options
from clipval.ascend import atc, dumping
from clipval.chain import Chain
from clipval.diagnose import bundle, dump, fusions, graph, npu, om
from clipval.errors import BackendUnavailable, InputError
from tests import simulator
from tests.faults import in_blocks
from tests.simulator import tiny as drawn


@pytest.fixture(scope="module")
def made(built):
    """A chain, and a compiler of its text tower with a fault, on the simulated host."""
    before = dict(os.environ)
    os.environ.update(simulator.environment())
    chain = Chain(options.Settings(workdir=built, allow_simulated=True))
    yield chain
    os.environ.clear()
    os.environ.update(before)


def faulty(chain, fault, folder):
    """An OM of batch size 2 with a fault that its ONNX file does not have, and one batch of rows."""
    planted = in_blocks.PLANTED[fault]
    tower = chain.towers[planted.tower]
    changed = onnx.load(str(chain.onnx(tower)))
    planted.change(in_blocks.Graph(changed))
    file = folder / "faulty.onnx"
    onnx.save(changed, str(file))
    wanted = atc.AtcOptions(soc_version="Ascend910B4")
    made = atc.compile_om(file, folder, f"{tower.name}_bs2", tower, 2, wanted)
    return made, tower, drawn.rows(tower, 2)


@pytest.mark.parametrize("fault", ["mask_missing", pytest.param("one_layer_quantised", marks=pytest.mark.proof)])
def test_three_dumps_narrow_a_fault_down_to_its_operator(made, fault, tmp_path):
    file, tower, rows = faulty(made, fault, tmp_path)
    whole = graph.load(made.onnx(tower))
    found = npu.locate(file, whole, rows, 0, "fp16", "om", tmp_path / "kept")
    assert found.module == in_blocks.PLANTED[fault].module, found.sentence
    assert "OM operator /transformer/resblocks.1/" in found.sentence
    assert "times when run on its own inputs" in found.sentence
    assert "fusion" not in " ".join(found.advice)  # the OM tells that no pass made this operator
    assert found.advice[0].startswith("keep the precision of /transformer/resblocks.1/")
    blocks = dump.read(tmp_path / "kept" / "blocks")
    drowned = fault == "one_layer_quantised"  # at the ends of blocks in the noise of fp16: then everything is dumped
    last = dump.read(tmp_path / "kept" / ("whole" if drowned else "inside"))
    assert 3 <= len(blocks.operators) < len(last.operators)
    assert (len(last.operators) > 60) == drowned


@pytest.mark.proof
def test_a_dump_is_analysed_without_cann(made, tmp_path, capsys, monkeypatch):
    file, tower, rows = faulty(made, "bias_dropped", tmp_path)
    dumping.dump(file, rows, 0, tmp_path / "dump")
    fused = dumping.as_json(file, tmp_path / "om.json")
    monkeypatch.setenv("PATH", "")
    arguments = ["diagnose", "--dump", str(tmp_path / "dump"), "--onnx", str(made.onnx(tower))]
    arguments += ["--input", str(tmp_path / "dump.in.npy"), "--json", str(tmp_path / "finding.json")]
    assert cli.main([*arguments, "--om-json", str(fused)]) == 1
    said = capsys.readouterr().out
    assert "transformer.resblocks.1.mlp.c_fc to transformer.resblocks.1.mlp.gelu" in said
    assert "switch off the fusion that made /transformer/resblocks.1/mlp/gelu/Div: GeluONNXFusionPass" in said
    ladder = json.loads((tmp_path / "finding.json").read_text())["ladder"]
    assert len(ladder) > 60
    sent = tmp_path / "sent"
    assert cli.main([*arguments, "--bundle", str(sent)]) == 1  # names in the dump alone
    assert bundle.total(sent) < 1 << 20
    assert cli.main(["diagnose", "--replay", str(sent)]) == 0  # the graph that it was compiled from is right
    assert "transformer.resblocks.1." in capsys.readouterr().out
    assert cli.main(["diagnose", "--dump", str(tmp_path / "dump")]) == 2
    assert "give --onnx FILE" in capsys.readouterr().err


@pytest.mark.proof
def test_pyacl_dumps_what_aclruntime_dumps(made, tmp_path):
    file, tower, rows = faulty(made, "mask_missing", tmp_path)
    found = {}
    for runtime in ("aclruntime", "pyacl"):
        embedded = dumping.dump(file, rows, 0, tmp_path / runtime, runtime=runtime)
        dumped = dump.read(tmp_path / runtime)
        found[runtime] = embedded, {name: one.values(0) for name, one in dumped.operators.items()}
    ours, theirs = found.values()
    assert np.array_equal(ours[0], theirs[0])
    assert len(ours[1]) > 60
    assert {name: values.tobytes() for name, values in ours[1].items()} == {
        name: values.tobytes() for name, values in theirs[1].items()
    }
    whole = graph.load(made.onnx(tower))
    located = npu.locate(file, whole, rows, 0, "fp16", "om", runtime="pyacl")
    assert located.module == in_blocks.PLANTED["mask_missing"].module


def test_a_dump_without_an_end_is_said(made, tmp_path, monkeypatch):
    monkeypatch.setattr(dumping, "TIMEOUT_S", 0.01)
    with pytest.raises(BackendUnavailable, match=r"dump of x.om on device 3: no end after 0.01 s"):
        dumping.dump(tmp_path / "x.om", np.zeros((1, 2), np.float32), 3, tmp_path / "dump")


def test_a_dump_that_switched_nothing_on_is_said(made, tmp_path, monkeypatch):
    file, tower, rows = faulty(made, "bias_dropped", tmp_path)
    real = dumping.configuration
    monkeypatch.setattr(dumping, "configuration", lambda model, *args, **more: real("other", *args, **more))
    with pytest.raises(BackendUnavailable, match=r"Nothing was dumped.*without a dump"):
        npu.locate(file, graph.load(made.onnx(tower)), rows, 0, "fp16", "om")


def test_a_run_that_fails_says_so_with_what_is_known_without(made, tmp_path):
    broken = tmp_path / "text_bs2.om"
    broken.write_bytes(b"no OM")
    rows = np.zeros((2, 77), np.int64)
    with pytest.raises(
        BackendUnavailable, match=r"dump of text_bs2.om on device 0: the process ended with 1.*without a dump"
    ):
        npu.locate(broken, graph.load(made.onnx(made.towers["text"])), rows, 0, "fp16", "om")


def test_the_configuration_is_what_acl_takes():
    found = dumping.configuration("vit.v2", "/d", stats=True, layers=["/a/MatMul"])["dump"]
    assert found["dump_list"] == [{"model_name": "vit.v2", "layer": ["/a/MatMul"]}]
    assert (found["dump_data"], found["dump_level"], found["dump_mode"]) == ("stats", "op", "output")
    assert (
        "layer" not in dumping.configuration("m", "/d", layers=[])["dump"]["dump_list"][0]
    )  # CANN refuses an empty one


def test_an_operator_is_found_by_the_header_then_the_fused_list_then_its_name(made, tmp_path):
    whole = graph.load(made.onnx(made.towers["text"]))
    norm = "/transformer/resblocks.1/ln_1/"
    output = dump.Tensor("float16", "ND", (2,), (2,), 4, True)

    def found(name, origin="", fused=()):
        told = dump.Tensor("float16", "ND", (2,), (2,), 4, True, origin) if origin else output
        return om.candidates(whole, dump.Operator(tmp_path, name, "X", (), (told,)), 0, {name: list(fused)})

    assert found(f"{norm}Div") == [f"{norm}Div_output_0"]
    assert found(f"{norm}Div".replace("/", "_").replace(".", "_")) == [f"{norm}Div_output_0"]
    assert found("made_up") == found("trans_TransData_3") == []
    assert found("made_up", fused=(f"{norm}Sub", f"{norm}Div")) == [f"{norm}Div_output_0", f"{norm}Sub_output_0"]
    assert found("made_up", f"{norm}Sub", (f"{norm}Sub", f"{norm}Div"))[0] == f"{norm}Sub_output_0"
    first = found("made_up", f"{norm}Sub")  # of the fused nodes, whose list is not known
    assert first[0] == f"{norm}Sub_output_0"
    assert f"{norm}Add_1_output_0" in first
    product = dump.Operator(tmp_path, "/transformer/resblocks.1/attn/MatMul_1", "X", (), (output,))
    assert "/transformer/resblocks.1/attn/Add_2_output_0" in om.behind(whole, product, {})  # the mask, fused into it
    assert om.behind(whole, product, {product.name: [product.name]}) == []
    with pytest.raises(InputError, match="cannot be read"):
        fusions.names(tmp_path / "none.json")


def test_a_dump_of_another_batch_is_said(made, tmp_path):
    whole = graph.load(made.onnx(made.towers["text"]))
    held = om.Compared(whole, rows=np.zeros((4, 77), np.int64), other_sizes=[("/Cast_1", 80, 40)], dumped=1)
    said = om.judge(held, dump.Dump(tmp_path), "fp16", "dump")
    assert (
        "/Cast_1 has 80 values in the dump, 40 of these 4 inputs; the dump has 8 samples: --samples 8" in said.sentence
    )


def test_saturation_is_said_but_not_that_of_a_mask(made, tmp_path):
    whole = graph.load(made.onnx(made.towers["text"]))
    name = next(node.name for node in whole.nodes if node.name.endswith("resblocks.1/mlp/c_fc/MatMul"))
    mask = next(node.name for node in whole.nodes if node.name.endswith("resblocks.1/attn/MatMul_1"))

    def row(least, largest):
        return [dump.Statistic("Output", 0, (2,), "DT_FLOAT16", largest, least, 0.0, 0.0)]

    found = dump.Dump(tmp_path, statistics={name: row(-1.0, 65504.0), mask: row(-65504.0, 3.0)})
    (said,) = om.saturation(whole, found)
    assert said.startswith(f"{name} (OM operator) has values at the limit of DT_FLOAT16")
    kept = dump.Statistic("Output", 0, (2,), "DT_FLOAT", 1e6, -1e6, 0.0, 0.0)
    assert om.saturation(whole, dump.Dump(tmp_path, statistics={name: [kept]})) == []  # float32 has room for it
