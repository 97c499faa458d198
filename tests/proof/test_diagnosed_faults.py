"""Faults of one part of one block are located: the module, and what differs there."""

import copy

import numpy as np
import onnx
import pytest

from clipval import export, model, options
from clipval.chain import Chain
from clipval.diagnose import graph, ladder
from tests.faults import in_blocks

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return Chain(options.Settings(workdir=tmp_path_factory.mktemp("work")))


@pytest.mark.parametrize("name", in_blocks.names())
def test_a_fault_is_located_in_an_onnx_file(chain, name, tmp_path):
    planted = in_blocks.PLANTED[name]
    tower, tested = chain.towers[planted.tower], chain.model
    clean = chain.onnx(tower)
    if name == "mlp_overflows_in_fp16":
        tested = tested._replace(module=in_blocks.large_mlp(copy.deepcopy(tested.module)))
        clean = tmp_path / "large.onnx"
        export.export(tested, tower, clean, metadata={})
    changed = onnx.load(str(clean))
    planted.change(in_blocks.Graph(changed))
    file = tmp_path / "faulty.onnx"
    onnx.save(changed, str(file))
    rows = chain.prepared.rows[tower.name][np.arange(2)]
    found = ladder.judge(ladder.climb(model.encoder(tested, tower), graph.load(file), rows), "onnx")
    assert found.module == planted.module, found.sentence
    assert any(words in " ".join(found.lines()) for words in planted.words.split("|")), found.lines()
