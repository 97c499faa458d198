"""Faults of one part of one block are located: the module, and what differs there."""

import copy
import os
import sys

import numpy as np
import onnx
import pytest

from clipval import export, model, options
from clipval.ascend import atc, dumping
from clipval.chain import Chain
from clipval.diagnose import dump, fusions, graph, ladder, om, trials
from clipval.diagnose.finding import NONE
from tests import simulator, warm
from tests.faults import in_blocks

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def chain(small_spec, clean):
    return Chain(options.Settings(spec=str(small_spec), workdir=clean))


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


@pytest.fixture
def simulated(monkeypatch):
    for name, value in simulator.environment().items():
        monkeypatch.setenv(name, value)


def in_om(chain, name, folder, change=None, keep=""):
    """The finding of a faulty OM that dumps, against the ONNX file without the fault."""
    planted = in_blocks.PLANTED[name]
    tower, tested = chain.towers[planted.tower], chain.model
    clean, change = chain.onnx(tower), change or planted.change
    if name == "mlp_overflows_in_fp16":
        tested = tested._replace(module=in_blocks.large_mlp(copy.deepcopy(tested.module)))
        clean, change = folder / "large.onnx", lambda graph: None  # fp16 alone is enough
        export.export(tested, tower, clean, metadata={})
    changed = onnx.load(str(clean))
    change(in_blocks.Graph(changed))
    onnx.save(changed, str(folder / "faulty.onnx"))
    wanted = atc.AtcOptions(soc_version="Ascend910B4", keep_dtype=str(keep))
    made = atc.compile_om(folder / "faulty.onnx", folder, f"{tower.name}_bs2", tower, 2, wanted)
    rows = np.ascontiguousarray(chain.prepared.rows[tower.name][np.arange(2)])
    dumping.dump(made, rows, 0, folder / "figures", stats=True)
    dumping.dump(made, rows, 0, folder / "dump")
    dumped = dump.read(folder / "dump")
    dumped.statistics = dump.read(folder / "figures").statistics
    fused = fusions.names(dumping.as_json(made, folder / "om.json"))
    return om.judge(om.compare(graph.load(clean), dumped, rows, "fp16", fused), dumped, "fp16", "om")


@pytest.mark.parametrize("name", in_blocks.names())
def test_a_fault_is_located_in_a_simulated_om(chain, name, tmp_path, simulated):
    large = {"epsilon_of_one_norm": lambda graph: graph.constant(in_blocks.NORM, 1, 1e5)}
    found = in_om(chain, name, tmp_path, large.get(name))
    assert found.module == in_blocks.PLANTED[name].module, found.sentence
    assert found.operator in found.sentence
    if name == "mlp_overflows_in_fp16":
        assert "values at the limit of DT_FLOAT16" in found.sentence


def test_a_fault_below_the_noise_of_fp16_is_said_to_be_below(chain, tmp_path, simulated):
    found = in_om(chain, "epsilon_of_one_norm", tmp_path)  # 2e-4 of the norm's result
    assert found.verdict == NONE
    assert "a fault is below that unless it is" in found.sentence


def test_a_bundle_of_an_om_is_replayed_on_every_backend(small_spec, tmp_path):
    work = [f"--spec={small_spec}", f"--workdir={tmp_path / 'work'}", "--allow-simulated"]

    def diagnosed(*arguments, fault=""):
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-m", "clipval", "diagnose", *work, *arguments]
        variables = {**outside, **simulator.environment(fault=fault)}
        return warm.run(command, variables)

    sent = str(tmp_path / "sent")
    done = diagnosed("--backend=om", "--tower=vision", "--samples=2", f"--bundle={sent}", fault="wrong_layer")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "resblocks.1/mlp/c_fc/Add_output_0" in done.stdout.splitlines()[-1]
    again = diagnosed("--replay", sent, "--backend=om", fault="wrong_layer")
    assert (again.returncode, "still shows on om simulated" in again.stdout) == (1, True), again.stdout + again.stderr
    for backend in ("om", "onnx"):
        fixed = diagnosed("--replay", sent, f"--backend={backend}")
        assert (fixed.returncode, "no longer shows" in fixed.stdout) == (0, True), fixed.stdout + fixed.stderr


def test_operators_that_overflow_are_listed_kept_and_confirmed(chain, tmp_path, simulated):
    def look(settings):
        folder = tmp_path / f"look{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return in_om(chain, "mlp_overflows_in_fp16", folder, keep=settings.keep_dtype or "")

    found, file = look(chain.settings), tmp_path / "keep.cfg"
    after, said = trials.keep(chain.settings, "om", "vision", found, file, look)
    assert after.verdict == NONE, said
    assert said.startswith("confirmed")
    assert "/visual/transformer/resblocks.1/mlp/c_fc/MatMul" in file.read_text().splitlines()
    assert [line for line in file.read_text().splitlines() if "resblocks.1/" not in line] == []


def test_precision_modes_are_compiled_and_compared(small_spec, tmp_path):
    command = [sys.executable, "-m", "clipval", "diagnose", "--allow-simulated", f"--spec={small_spec}"]
    command += [f"--workdir={tmp_path}", "--perf-min-time=0.1", "--perf-max-time=1", "--perf-noise=10", "--threads=1"]
    command += ["--precision-modes=force_fp16,allow_mix_precision_bf16,must_keep_origin_dtype"]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = warm.run(command, {**outside, **simulator.environment()})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " vision " in line or " text " in line]
    assert [line.split()[0] for line in lines] == [
        *("force_fp16", "force_fp16", "allow_mix_precision_bf16", "allow_mix_precision_bf16"),
        *("must_keep_origin_dtype", "must_keep_origin_dtype"),
    ]
    off = {line.split()[0]: float(line.split()[4]) for line in lines if " vision " in line}
    assert off["must_keep_origin_dtype"] < off["force_fp16"] < off["allow_mix_precision_bf16"]
    assert all("image R@1 0." in line and " at batch size 8" in line for line in lines)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_clean_om_has_no_excess(small_spec, tmp_path, tower):
    command = [sys.executable, "-m", "clipval", "diagnose", "--backend", "om", "--tower", tower, "--allow-simulated"]
    command += [f"--spec={small_spec}", f"--workdir={tmp_path}", "--samples=2"]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = warm.run(command, {**outside, **simulator.environment()})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no excess" in done.stdout
