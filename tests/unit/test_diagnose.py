"""Diagnosis: taps are paired with tensors, an error is followed to where it starts, a twin costs what fp16 costs."""

import copy
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clipval import cli, export, model, options
from clipval.chain import Chain
from clipval.diagnose import checks, evaluate, graph, ladder, locate, pairs, taps, twin
from clipval.diagnose.finding import DIVERGENCE, NONE, table
from tests.faults import in_blocks


@pytest.fixture(scope="module")
def chain(built):
    return Chain(options.Settings(workdir=built))


@pytest.fixture(scope="module")
def files(chain):
    return {name: chain.onnx(tower) for name, tower in chain.towers.items()}


def rows(tower, count=2):
    rng = np.random.default_rng(0)
    if tower.dtype == "float32":
        return rng.normal(0, 1, tower.shape(count)).astype(np.float32)
    found = np.zeros(tower.shape(count), np.int64)
    for n, row in enumerate(found):
        row[: 12 + n] = [49406, *rng.integers(300, 40000, 10 + n), 49407]
    return found


def climbed(chain, name, candidate, count=2):
    encoder = model.encoder(chain.model, chain.towers[name])
    return ladder.climb(encoder, candidate, rows(chain.towers[name], count))


@pytest.mark.parametrize("name", ["vision", "text"])
def test_a_clean_export_has_no_excess_and_every_tap_a_tensor(chain, files, name):
    found = climbed(chain, name, graph.load(files[name]), 3)
    said = ladder.judge(found, "onnx")
    assert said.verdict == NONE
    assert "no excess: " in said.sentence
    constant = set()  # open_clip 2.20 adds the class embedding to zeros, which the exporter folds
    for n, tap in enumerate(found.recorded.taps):
        if tap.op == "zeros" or (tap.parents and constant.issuperset(tap.parents)):
            constant.add(n)
    assert len(constant) <= 2
    assert all(one.error is not None and one.excess < 2 for n, one in found.rungs.items() if n not in constant)
    ends = [path for tap in found.recorded.taps for path in tap.ends]
    assert [path for path in ends if path.endswith(("ln_1", "attn", "ln_2", "mlp"))]
    assert found.rungs[found.recorded.output].tensor == chain.towers[name].output_name


def test_an_error_that_does_not_reach_the_embedding_is_found(chain, tmp_path):
    tested = chain.model._replace(module=copy.deepcopy(chain.model.module))
    tower, last = chain.towers["vision"], tested.module.visual.transformer.resblocks[1].attn.out_proj
    for value in (last.weight, last.bias):
        value.data.zero_()  # as the last norm of a ResNet's branch begins
    export.export(tested, tower, tmp_path / "clean.onnx", metadata={})
    changed = onnx.load(str(tmp_path / "clean.onnx"))
    in_blocks.PLANTED["scale_of_one_attention"].change(in_blocks.Graph(changed))
    onnx.save(changed, str(tmp_path / "faulty.onnx"))
    encoder = model.encoder(tested, tower)
    clean, found = (
        ladder.judge(ladder.climb(encoder, graph.load(tmp_path / f"{name}.onnx"), rows(tower)), "onnx")
        for name in ("clean", "faulty")
    )
    assert clean.verdict == NONE, clean.sentence
    assert found.module == "visual.transformer.resblocks.1.attn"
    assert "it does not reach the embedding (" in found.sentence


@pytest.mark.parametrize("fault", ["mask_missing", pytest.param("residual_left_out", marks=pytest.mark.proof)])
def test_a_graph_without_names_says_the_node_and_its_neighbours(chain, files, fault, tmp_path):
    planted = in_blocks.PLANTED[fault]
    changed = onnx.load(str(files[planted.tower]))
    planted.change(in_blocks.Graph(changed))
    for node in changed.graph.node:
        node.name = ""
    file = tmp_path / "anonymous.onnx"
    onnx.save(changed, str(file))
    said = ladder.judge(climbed(chain, planted.tower, graph.load(file)), "onnx")
    assert said.verdict == DIVERGENCE
    assert said.module == planted.module
    assert "(after " in said.sentence
    assert "before " in said.sentence


@pytest.mark.proof
def test_the_half_precision_file_of_somebody_else_has_no_excess(chain, files, tmp_path):
    file = tmp_path / "half.onnx"
    onnx.save(halved(onnx.load(str(files["text"]))), str(file))
    candidate = graph.load(file)
    assert candidate.precision == "fp16"
    encoder = model.encoder(chain.model, chain.towers["text"])
    found = ladder.climb(encoder, candidate, rows(chain.towers["text"]), graph.load(files["text"]))
    said = ladder.judge(found, "onnx")
    assert said.verdict == NONE
    assert found.rungs[found.recorded.output].error > 1e-4  # it does round
    assert "a fault shows from" in said.sentence


def halved(whole):
    """The graph in fp16: weights, constants and casts to float."""
    held = [one.t for node in whole.graph.node for one in node.attribute if one.HasField("t")]
    for tensor in [*whole.graph.initializer, *held]:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in whole.graph.node:
        for one in node.attribute:
            if node.op_type == "Cast" and one.name == "to" and one.i == TensorProto.FLOAT:
                one.i = TensorProto.FLOAT16
    del whole.graph.value_info[:]
    whole.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    return whole


def test_the_model_is_as_it_was_after_it_was_recorded(chain):
    tower = chain.towers["vision"]
    encoder = model.encoder(chain.model, tower)
    before = copy.deepcopy(chain.model.module.state_dict())
    recorded = taps.record(encoder, rows(tower))
    after = chain.model.module.state_dict()
    assert all(after[name].dtype == value.dtype and after[name].equal(value) for name, value in before.items())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in encoder.modules())
    assert 0 < recorded.taps[recorded.output].noise < 1e-5


def test_memory_bounds_the_samples_that_are_held(chain, monkeypatch):
    tower = chain.towers["text"]
    one = sum(tap.truth.nbytes for tap in taps.record(model.encoder(chain.model, tower), rows(tower, 1)).taps)
    monkeypatch.setattr(taps, "BYTES", 3 * one + 1)
    assert len(taps.record(model.encoder(chain.model, tower), rows(tower, 5)).rows) == 3


def test_segments_give_what_the_whole_graph_gives(chain, files, monkeypatch):
    whole = graph.load(files["text"])
    fed = rows(chain.towers["text"])
    at_once = dict(evaluate.tensors(whole, fed))
    monkeypatch.setattr(graph, "SEGMENT_NODES", 7)
    assert len(whole.segments()) > 80
    in_parts = dict(evaluate.tensors(whole, fed))
    assert set(in_parts) == set(at_once)
    assert all(np.array_equal(in_parts[name], at_once[name]) for name in at_once)


def test_nodes_without_a_name_get_the_graph_engines(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Abs", ["a"], ["b"], name="named"),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    file = tmp_path / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), str(file))
    assert [node.name for node in graph.load(file).nodes] == ["Relu_0", "named", "Relu_1"]


def test_module_paths_of_both_exporters():
    node = helper.make_node("MatMul", ["a", "b"], ["c"], name="/visual/transformer/resblocks.3/attn/MatMul_1")
    assert graph.module_path(node) == "visual.transformer.resblocks.3.attn"
    node = helper.make_node("MatMul", ["a", "b"], ["c"], name="node_MatMul_12")
    entry = node.metadata_props.add() if hasattr(node, "metadata_props") else None
    if entry is not None:  # onnx 1.16 on
        entry.key, entry.value = graph.SCOPES, "['', 'clip.visual', 'clip.visual.resblocks.0.attn', 'linear']"
        assert graph.module_path(node) == "visual.resblocks.0.attn"


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_tensors_are_compared_in_every_order_of_axes(order):
    truth = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)
    moved = truth.transpose(order)
    assert pairs.distance(moved, truth) == 0
    assert pairs.distance(moved + np.float32(0.1), truth) == pytest.approx(0.1, rel=0.2)
    assert pairs.distance(truth, truth.reshape(24, 8)) == 0
    assert pairs.distance(truth[:2], truth) == np.inf


def test_masks_of_any_large_negative_number_are_one():
    truth = np.array([1.0, -np.inf, 2.0], np.float32)
    assert taps.relative(np.array([1.0, -65504.0, 2.0], np.float32), truth) == 0
    assert taps.relative(np.array([1.0, 0.5, 2.0], np.float32), truth) == np.inf
    assert taps.relative(np.array([1.0, np.nan], np.float32), np.ones(2, np.float32)) == np.inf


def test_suspects_are_bad_with_good_inputs_on_the_way_to_the_output():
    parents = {"a": [], "b": ["a"], "c": ["b"], "d": ["a"], "e": ["c", "d"], "f": ["e"], "loose": ["a"]}
    good = {"a": True, "b": True, "c": False, "d": True, "e": False, "f": False, "loose": False}
    assert locate.suspects(good, parents, "f") == ["c"]
    assert locate.suspects({**good, "c": None}, parents, "f") == ["e"]  # seen through
    assert locate.suspects({**good, "e": None, "f": True}, parents, "f") == []
    assert locate.suspects({**good, "d": False}, parents, "f") == ["c", "d"]


@pytest.mark.parametrize(("precision", "step"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_a_twin_rounds_weights_and_every_result(chain, files, precision, step):
    values = np.random.default_rng(2).normal(0, 1, 999).astype(np.float32)
    off = np.abs(twin.rounded(values, precision) - values) / np.abs(values)
    assert step / 4 < off.max() <= step
    assert twin.rounded(np.array([1e6, -1e6], np.float32), "fp16").tolist() == [65504, -65504]
    whole = graph.load(files["vision"])
    fed = rows(chain.towers["vision"])
    exact = dict(evaluate.tensors(whole, fed))
    floats = {name for name, one in exact.items() if one.dtype == np.float32}
    found = dict(evaluate.tensors(whole, fed, twin.Twin(precision, floats)))
    last = chain.towers["vision"].output_name
    assert step / 8 < pairs.distance(found[last], exact[last]) < 20 * step
    assert all(np.array_equal(found[name], twin.rounded(found[name], precision)) for name in floats)


def test_what_is_not_numerics_is_said(chain):
    ids = ("a", "b", "c", "d")
    unit = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0][:4]
    assert checks.embeddings(ids, unit, unit) == []
    assert "another order: a has the embedding of b" in checks.embeddings(ids, unit, unit[[1, 0, 2, 3]])[0]
    near = np.tile(unit[:1], (4, 1)) + 0.05 * unit  # captions of one image, and one of them badly off
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    off = near.copy()
    off[3] = near[0] + 0.09 * np.eye(8)[7]
    assert checks.embeddings(ids, near, off / np.linalg.norm(off, axis=1, keepdims=True)) == []
    assert "not normalised: their lengths are 3 to 3" in checks.embeddings(ids, unit, 3 * unit)[0]
    assert "have the same embedding" in " ".join(checks.embeddings(ids, unit, unit[[0, 1, 2, 2]]))
    assert "another output?" in checks.embeddings(ids, unit, unit[:, :4])[0]
    assert "b by up to 0.5" in checks.inputs(("a", "b"), np.zeros((2, 3)), np.array([[0, 0, 0], [0, 0.5, 0]]))[0]
    assert "depends on its batch" in checks.batches(ids, unit, unit[::-1], 1e-3)[0]


def test_another_checkpoint_is_not_one_bad_layer(chain, files):
    whole = graph.load(files["text"])
    held = {name: value.detach().numpy() for name, value in chain.model.module.named_parameters()}
    assert checks.other_weights(whole, held) == []
    other = {name: np.random.default_rng(4).normal(size=value.shape) for name, value in held.items()}
    assert "holds other weights" in checks.other_weights(whole, other)[0]
    said = checks.file(whole, {"clipval.weights": "0" * 64, "opset": "14"}, {"clipval.weights": "1" * 64}, held)
    assert "a stale or different file" in said[0]


def test_the_command_says_where_and_ends_with_one(chain, files, tmp_path, capsys):
    planted = in_blocks.PLANTED["bias_dropped"]
    changed = onnx.load(str(files["text"]))
    planted.change(in_blocks.Graph(changed))
    file, written = tmp_path / "text.onnx", tmp_path / "finding.json"
    onnx.save(changed, str(file))
    common = ["diagnose", "--tower", "text", "--workdir", str(chain.settings.workdir), "--samples", "2"]
    assert cli.main([*common, "--model", str(file), "--json", str(written)]) == 1
    said = capsys.readouterr().out
    assert f"diverges in PyTorch module {planted.module}" in said
    assert planted.words in said
    assert ">>" in said
    found = json.loads(written.read_text())
    assert found["module"] == planted.module
    assert [rung["name"] for rung in found["ladder"] if rung["name"] == found["first"]]
    assert cli.main(common) == 0
    assert "no excess" in capsys.readouterr().out
    for wrong, words in (
        (["--model", str(tmp_path / "none.onnx")], "no such file"),
        (["--model", str(files["vision"])], "the two files may be swapped"),
        (["--sample", "nobody"], "the text data has no such id"),
        (["--json", str(tmp_path / "none" / "x.json")], "cannot be written"),
        (["--bundle", str(tmp_path)], "not empty"),
    ):
        assert cli.main([*common, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_an_overflow_is_at_its_node_and_what_follows_is_on_the_ladder(chain, files, tmp_path):
    """Everything after it is NaN: each of these tensors still has its place."""
    changed, name = onnx.load(str(files["vision"])), in_blocks.at(f"{in_blocks.VISION}.mlp.c_fc", "MatMul")
    faulty = in_blocks.Graph(changed)
    faulty.set_weight(name, 1, faulty.weight(name, 1) * in_blocks.LARGE)
    faulty.cast(name, TensorProto.FLOAT16)
    onnx.save(changed, str(tmp_path / "large.onnx"))
    found = ladder.judge(climbed(chain, "vision", graph.load(tmp_path / "large.onnx"), 1), "onnx")
    assert found.module == f"{in_blocks.VISION}.mlp.c_fc"
    assert found.node == f"{name}/to_narrow"
    assert "values are NaN or Inf" in found.sentence
    broken = [rung.name for rung in found.ladder if rung.error == float("inf")]
    assert broken[0] == found.first
    assert "visual.transformer.resblocks.2.ln_1" in broken
    names = [rung.name for rung in found.ladder]  # each is of one rung
    assert len(set(names)) == len(names)
    assert {f"{in_blocks.VISION}.attn (bmm)", f"{in_blocks.VISION}.attn (bmm) #2"} <= set(names)


def test_the_table_marks_the_first_excess(chain, files):
    found = climbed(chain, "text", graph.load(files["text"]))
    lines = table(ladder.judge(found, "onnx"))
    assert len(lines) == 1 + len(found.rungs)
    assert not [line for line in lines if line.startswith(">>")]


def test_export_names_every_node(files):
    assert all(node.name for file in files.values() for node in onnx.load(str(file)).graph.node)
    assert export.OPSET == 14
