"""What the chain opens again: how a backend starts from cold."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from clipval import backends, environment
from clipval.backends import Identity, Kind
from clipval.chain import Chain
from clipval.errors import InputError, UsageError
from clipval.options import Settings
from clipval.towers import TEXT, VISION
from tests.small import ROOT


class Recorded(Chain):
    """A chain that notes what is loaded, opened and run, in order."""

    def __init__(self):
        super().__init__(Settings())
        self.seen = []
        rows = np.zeros((5, 77), np.int64)
        self.prepared = SimpleNamespace(rows={"text": rows})
        self.model = "loaded before"

        self.pool.file, self.pool.open_file = self.built, self.opened

    def built(self, name, tower, batch_size):
        self.seen.append("built")  # by the store, once
        return None if name == "pytorch" else "file"

    def opened(self, name, tower, file, batch_size):
        self.seen.append(f"opened {name}, model {self.__dict__.get('model')}")

        def run(rows):
            assert rows.flags.c_contiguous
            self.seen.append(f"ran {len(rows)}")

        identity = Identity(name, "1", "cpu", "fp32")
        return SimpleNamespace(
            identity=identity, notes=(), load_seconds=1.5, run=run, close=lambda: self.seen.append("closed")
        )


@pytest.mark.parametrize(("name", "model"), [("onnx", "loaded before"), ("om", "loaded before"), ("pytorch", "None")])
def test_a_cold_start_is_of_a_backend_that_is_opened_anew(name, model):
    chain = Recorded()
    chain.backend(name, TEXT, 8).run(np.zeros((8, 77), np.int64))  # as the gates of accuracy do
    chain.seen.clear()
    found = chain.cold_start(name, TEXT, 8)
    assert chain.seen == ["built", "closed", "built", f"opened {name}, model {model}", "ran 8"]
    assert (found.load_seconds, found.batch_size) == (1.5, 8)
    assert found.first_inference_seconds >= 0


@pytest.mark.parametrize(("name", "starts"), [("onnx", 1), ("om", 2)])
def test_it_is_measured_once_a_file(name, starts):
    chain = Recorded()
    for size in (1, 8, 8):
        chain.cold_start(name, TEXT, size)
    assert sum(one.startswith("opened") for one in chain.seen) == starts


def test_the_reference_and_one_other_backend_are_open_at_most():
    chain = Recorded()
    for tower in (TEXT, VISION):
        chain.backend("pytorch", tower, 8)
    first = [chain.backend("onnx", tower, 8) for tower in (TEXT, VISION)]
    assert [chain.backend("onnx", tower, 1) for tower in (TEXT, VISION)] == first
    assert "closed" not in chain.seen
    chain.backend("om", TEXT, 8)
    assert chain.seen.count("closed") == 2
    chain.backend("om", VISION, 8)  # one session a device
    assert chain.seen.count("closed") == 3
    chain.backend("pytorch", TEXT, 8)
    assert sum("opened pytorch" in one for one in chain.seen) == 2


def test_batch_sizes_are_those_of_ready_files(tmp_path):
    for tower in ("vision", "text"):
        for size in (4, 16):
            (tmp_path / f"vit_b_32_{tower}_bs{size}.om").touch()
    chain = Chain(Settings(om_dir=tmp_path, backends=("om",)))
    assert (chain.batch_sizes, chain.accuracy_batch) == ((4, 16), 16)
    assert (chain.pool.smallest_batch("om"), chain.pool.smallest_batch("onnx")) == (4, 1)
    assert Chain(Settings(om_dir=tmp_path, backends=("om",), batch_sizes=(4,))).batch_sizes == (4,)
    assert Chain(Settings(om_dir=tmp_path, backends=("onnx",))).batch_sizes == Chain(Settings()).batch_sizes


def test_files_that_a_run_will_open_are_built_side_by_side_where_their_kind_can(monkeypatch):
    built = []

    def ahead(made, needed):
        built.append([(tower.name, size) for tower, size in needed])

    module = ModuleType("side_by_side")
    module.KIND = Kind(lambda made, asked: None, ".many", lambda made, tower, size: Path(f"{size}.many"), ahead)
    monkeypatch.setitem(sys.modules, "side_by_side", module)
    monkeypatch.setitem(backends.MODULES, "many", "side_by_side")
    pool = Chain(Settings()).pool
    for name, size in (("many:0", 1), ("many:1", 8), ("many:0", 8), ("onnx", 64)):
        pool.expect(name, "text", size)
    assert pool.file("many:1", TEXT, 8) == Path("8.many")
    assert built == [[("text", 1), ("text", 8)]]  # and no others
    pool.file("many:0", TEXT, 1)
    assert len(built) == 1


def test_all_towers_are_exported_before_a_session_is_open(monkeypatch):
    exported = []

    def onnx(chain, tower):
        exported.append(tower.name)
        if tower.name == "text":
            raise InputError("no text")
        return Path(tower.name)

    monkeypatch.setattr(Chain, "onnx", onnx)
    pool = Chain(Settings()).pool
    for tower in ("vision", "text"):
        pool.expect("onnx", tower, 8)
    assert pool.file("onnx", VISION, 8) == Path("vision")
    assert exported[:2] == ["vision", "text"]  # the larger one first
    with pytest.raises(InputError, match="no text"):
        pool.file("onnx", TEXT, 8)


@pytest.mark.parametrize(
    ("names", "provider", "refused"),
    [
        (("onnx", "om"), "CANNExecutionProvider", True),
        (("onnx",), "CANNExecutionProvider", False),
        (("pytorch", "om"), "CANNExecutionProvider", False),
        (("onnx", "om"), "CPUExecutionProvider", False),
    ],
)
def test_two_users_of_acl_are_refused_before_anything_runs(names, provider, refused):
    asked = Settings(backends=names, onnx_providers=(provider,))
    with (
        pytest.raises(UsageError, match="CANN provider and the om backend cannot share a run")
        if refused
        else nullcontext()
    ):
        Chain(asked)


AUTOLOAD = """
import sys
from clipval import cli
cli.main(["models", "no-such-architecture"])
import torch
print("torch_npu" in sys.modules)
"""


@pytest.mark.parametrize(("variable", "loaded"), [(None, False), ("1", True)])
def test_an_installed_torch_npu_does_not_take_acl(tmp_path, variable, loaded):
    (tmp_path / "torch_npu.py").write_text("def start(): pass\n", encoding="utf-8")
    info = tmp_path / "torch_npu-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.5\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:start\n", encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    variables.update({"TORCH_DEVICE_BACKEND_AUTOLOAD": variable} if variable else {})
    done = subprocess.run([sys.executable, "-c", AUTOLOAD], env=variables, capture_output=True, text=True, check=False)
    since = tuple(map(int, environment.version("torch").split(".")[:2])) >= (2, 5)
    by_itself = loaded and since
    assert done.stdout.split()[-1] == str(by_itself), done.stderr


def test_options_without_their_provider_are_not_ignored():
    options = (("precision_mode", "must_keep_origin_dtype"),)
    with pytest.raises(UsageError, match="precision_mode=must_keep_origin_dtype: CPUExecutionProvider has no options"):
        Chain(Settings(onnx_provider_options=options))
    Chain(Settings(onnx_provider_options=options, onnx_providers=("CANNExecutionProvider", "CPUExecutionProvider")))
