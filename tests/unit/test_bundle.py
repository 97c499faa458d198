"""A bundle: the smallest part that still shows a fault, ONNX's layout of test cases, and running it again."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clipval import cli, model, options
from clipval.chain import Chain
from clipval.diagnose import bundle, cut, evaluate, graph, ladder, pairs
from clipval.diagnose.finding import DIVERGENCE, NONE, Finding
from clipval.errors import InputError, UsageError
from tests.faults import in_blocks


@pytest.fixture(scope="module")
def chain(built):
    return Chain(options.Settings(workdir=built))


def planted(chain, fault, folder):
    """The file with a fault, and the finding of it in two samples."""
    one = in_blocks.PLANTED[fault]
    tower = chain.towers[one.tower]
    changed = onnx.load(str(chain.onnx(tower)))
    one.change(in_blocks.Graph(changed))
    file = folder / f"{one.tower}.onnx"
    onnx.save(changed, str(file))
    rows = chain.prepared.rows[tower.name][np.arange(2)]
    climbed = ladder.climb(model.encoder(chain.model, tower), graph.load(file), rows)
    return file, ladder.judge(climbed, "onnx")


def tensor(file):
    held = TensorProto()
    held.ParseFromString(file.read_bytes())
    return numpy_helper.to_array(held)


def by_plain_onnxruntime(folder):
    """What anybody gets who runs the folder as ONNX's own runner does."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    onnx.checker.check_model(str(folder / "model.onnx"))
    given = {session.get_inputs()[0].name: tensor(folder / "test_data_set_0" / "input_0.pb")}
    return session.run(None, given)[0]


@pytest.mark.parametrize(
    "fault",
    [
        "weights_of_one_block",
        pytest.param("residual_left_out", marks=pytest.mark.proof),
        pytest.param("position_embedding_shifted", marks=pytest.mark.proof),
    ],
)
def test_a_bundle_is_small_and_shows_the_fault_again(chain, fault, tmp_path, capsys):
    file, found = planted(chain, fault, tmp_path)
    folder = tmp_path / "sent"
    said = bundle.write(folder, found, ["--backend=onnx"])
    data = folder / "test_data_set_0"
    names = sorted(one.name for one in data.iterdir())
    assert names == ["candidate_output_0.pb", "input_0.pb", "output_0.pb"]
    assert bundle.total(folder) < 0.2 * file.stat().st_size
    assert len(said.part.model.graph.node) < 30
    assert found.node in {node.name for node in said.part.model.graph.node}
    now, candidate, right = by_plain_onnxruntime(folder), *map(tensor, (data / names[0], data / names[2]))
    assert pairs.distance(now, candidate) < 1e-4
    assert pairs.distance(now, right) > 1e-3
    assert found.sentence in (folder / "README.md").read_text(encoding="utf-8")
    assert "diagnose --replay . --backend=onnx" in (folder / "README.md").read_text(encoding="utf-8")
    command = ["diagnose", "--replay", str(folder), "--workdir", str(tmp_path / "none"), "--threads", "1"]
    assert cli.main(command) == 1
    assert "still shows on onnx onnxruntime" in capsys.readouterr().out
    repair(chain, found, folder / "model.onnx", fault)
    if fault == "weights_of_one_block":
        assert cli.main(command) == 0
        assert "no longer shows on onnx" in capsys.readouterr().out


def repair(chain, found, file, fault):
    """Put the right weights back where the fault was planted in weights."""
    held = onnx.load(str(file))
    for one in held.graph.initializer:
        if fault == "weights_of_one_block" and one.name.startswith("planted_"):
            right = chain.model.module.state_dict()[f"{found.module}.weight"].numpy()
            one.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(right.T), one.name))
    onnx.save(held, str(file))


@pytest.mark.proof
def test_a_pooled_position_is_a_constant_of_the_part(chain, tmp_path):
    """Behind the pooling of the text tower tokens and activations meet; the table of tokens need not be sent."""
    tower = chain.towers["text"]
    changed = onnx.load(str(chain.onnx(tower)))
    (pooled,) = [node for node in changed.graph.node if node.op_type == "Gather" and "Flatten" in node.input[0]]
    extra = helper.make_node("Mul", ["pooled_right", "minus"], [pooled.output[0]], name="negated")
    changed.graph.initializer.append(numpy_helper.from_array(np.array([-1.0], np.float32), "minus"))
    pooled.output[0] = "pooled_right"
    changed.graph.node.insert(list(changed.graph.node).index(pooled) + 1, extra)
    file = tmp_path / "text.onnx"
    onnx.save(changed, str(file))
    rows = chain.prepared.rows["text"][np.arange(2)]
    found = ladder.judge(ladder.climb(model.encoder(chain.model, tower), graph.load(file), rows), "onnx")
    bundle.write(tmp_path / "sent", found, [])
    assert bundle.total(tmp_path / "sent") < 1 << 20
    assert bundle.Bundle(tmp_path / "sent").start.dtype == np.float32


@pytest.fixture
def wrong_tokens(chain, tmp_path):
    """The text tower with a table of tokens off by a tenth, and its diagnosis."""
    tower = chain.towers["text"]
    changed = onnx.load(str(chain.onnx(tower)))
    (table,) = [one for one in changed.graph.initializer if one.dims[0] > 10_000]
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table) * np.float32(1.1), table.name))
    onnx.save(changed, str(tmp_path / "text.onnx"))
    rows = chain.prepared.rows["text"][np.arange(2)]
    climbed = ladder.climb(model.encoder(chain.model, tower), graph.load(tmp_path / "text.onnx"), rows)
    return ladder.judge(climbed, "onnx"), rows


def test_rows_of_tokens_that_the_sample_does_not_use_are_not_sent(wrong_tokens, tmp_path):
    found, rows = wrong_tokens
    assert "token_embedding" in found.sentence
    folder = tmp_path / "sent"
    said = bundle.write(folder, found, [])
    assert bundle.total(folder) < 1 << 20
    assert said.start.max() + 1 == len(np.unique(rows[0])) < 77
    now, right = by_plain_onnxruntime(folder), tensor(folder / "test_data_set_0" / "output_0.pb")
    assert pairs.distance(now, right) == pytest.approx(0.1, rel=1e-3)
    assert "its ids are renumbered" in (folder / "README.md").read_text(encoding="utf-8")
    assert bundle.Bundle(folder).start.tolist() == said.start.tolist()
    (folder / "test_data_set_0" / "input_0.pb").write_bytes((folder / "test_data_set_0" / "output_0.pb").read_bytes())
    with pytest.raises(InputError, match=r"model.onnx takes \[1, 1, 77\], input_0.pb is"):
        bundle.Bundle(folder)


@pytest.mark.proof
def test_ids_that_are_read_as_numbers_stay(wrong_tokens, tmp_path):
    found, rows = wrong_tokens
    whole = found.material.graph
    values = {one: each for one, each in evaluate.tensors(whole, rows[:1]) if each.dtype.kind != "f"}
    ids = {whole.inputs[0]: rows[:1]}
    floats = {name: each for name, each in evaluate.tensors(whole, rows[:1]) if name == found.material.tensor}
    made = cut.part(whole, whole.inputs[0], found.material.tensor, {**values, **floats, **ids})
    start = rows[:1].astype(np.int64)[None]
    lean, fewer = cut.without_unused_rows(made, start)
    assert fewer.max() < start.max()
    assert np.array_equal(evaluate.model(lean.model, fewer, cut.OUTPUT), evaluate.model(made.model, start, cut.OUTPUT))
    made.model.graph.node.append(helper.make_node("Equal", [whole.inputs[0], whole.inputs[0]], ["other"]))
    assert cut.without_unused_rows(made, start) == (made, start)


@pytest.mark.parametrize(
    "at", ["resblocks.0/mlp/c_proj/MatMul", pytest.param("resblocks.2/attn/Softmax", marks=pytest.mark.proof)]
)
def test_a_fault_of_the_runtime_is_cut_out_from_both_ends(chain, at, tmp_path):
    tower = chain.towers["vision"]
    whole = graph.load(chain.onnx(tower))
    rows = chain.prepared.rows["vision"][np.arange(1)]
    material = bundle.Material(whole, rows, whole.outputs[0], 1e-6, "fp32", runtime=True)
    runs = []

    def run(file, part, start):
        loaded = onnx.load(str(file))
        runs.append(len(loaded.graph.node))
        for node in [node for node in loaded.graph.node if node.name.endswith(at)]:
            wrong = helper.make_node("Mul", [f"{node.name}:right", "factor"], [node.output[0]])
            loaded.graph.initializer.append(numpy_helper.from_array(np.array(1.01, np.float32), "factor"))
            node.output[0] = f"{node.name}:right"
            loaded.graph.node.insert(list(loaded.graph.node).index(node) + 1, wrong)
        return evaluate.model(loaded, start, cut.OUTPUT)

    found = bundle.smallest(material, run, tmp_path)
    assert [node.name for node in found.part.model.graph.node if node.name.endswith(at)]
    assert len(found.part.model.graph.node) < 0.05 * len(whole.nodes)
    assert len(runs) < 60
    with pytest.raises(InputError, match="does not show again"):
        bundle.smallest(
            material, lambda file, part, start: evaluate.model(onnx.load(str(file)), start, cut.OUTPUT), tmp_path
        )


def test_waists_are_what_every_way_leads_through(tmp_path):
    #  x -> a -> b -> d -> y, a -> c -> d; k is an integer that x alone gives
    nodes = [("Relu", "x", "a"), ("Abs", "a", "b"), ("Neg", "a", "c"), ("Add", "b c", "d"), ("Exp", "d", "y")]
    made = [helper.make_node(op, into.split(), [out]) for op, into, out in nodes]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph(made, "g", values[:1], values[1:])), str(tmp_path / "m.onnx"))
    whole = graph.load(tmp_path / "m.onnx")
    assert cut.waists(whole, "y", set("abcdy")) == ["d", "a", "x"]
    assert cut.waists(whole, "d", set("abcdy")) == ["a", "x"]


def test_what_cannot_be_bundled_or_replayed_is_said(chain, tmp_path, capsys):
    with pytest.raises(UsageError, match="no excess: there is no part to extract"):
        bundle.write(tmp_path / "new", Finding(NONE, "onnx", "fine"), [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="not empty"):
        bundle.write(tmp_path / "full", Finding(DIVERGENCE, "onnx", "bad"), [])
    command = ["diagnose", "--workdir", str(tmp_path), "--replay"]
    assert cli.main([*command, str(tmp_path / "none")]) == 2
    onnx.save(onnx.load(str(chain.onnx(chain.towers["vision"]))), str(tmp_path / "full" / "model.onnx"))
    assert cli.main([*command, str(tmp_path / "full")]) == 2
    assert "lacks clipval.part" in capsys.readouterr().err


def test_the_limit_is_that_of_the_precision_that_runs_it(chain, tmp_path):
    _, found = planted(chain, "weights_of_one_block", tmp_path)
    bundle.write(tmp_path / "sent", found, [])
    read = bundle.Bundle(tmp_path / "sent")
    about = json.loads({one.key: one.value for one in read.part.model.metadata_props}[bundle.PROPERTY])
    assert read.limit("fp32") == 4 * about["noise"]
    assert 1e-4 < read.limit("fp16") < read.limit("bf16") < 0.1
