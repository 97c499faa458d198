"""Pickles of checkpoints: tensors are read from between any objects, and nothing of a pickle is imported or run."""

import argparse
import collections
import enum
import functools
import io
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest

from clipval import checkpoint, pickled
from clipval.errors import InputError


def torch_file(file, content, **records):
    """A file of torch.save with a hand-made pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("made/data.pkl", content)
        for name, value in records.items():
            archive.writestr(f"made/data/{name}", value)
    return file


class Precision(enum.Enum):
    AMP = "amp"


HARMLESS = {
    "numpy scalar": lambda: np.float64(0.5),
    "numpy array": lambda: np.arange(3),
    "numpy generator": lambda: np.random.RandomState(0),
    "arguments": lambda: argparse.Namespace(lr=1e-3, model="ViT-B-32"),
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "deque": lambda: collections.deque([1, 2]),
    "Counter": lambda: collections.Counter("ab"),
    "set": lambda: {1, 2},
    "partial": lambda: functools.partial(int, base=2),
    "enum": lambda: Precision.AMP,
    "method": lambda: "a".upper,
    "bytes": lambda: b"abc",
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS)
def test_weights_are_read_from_between_other_objects(make, legacy, tmp_path):
    import torch

    held = {
        "epoch": make(),
        "name": "run",
        "state_dict": collections.OrderedDict(a=torch.arange(6.0).reshape(2, 3).T, b=torch.ones(2).half()),
        "optimizer": {"state": {0: {"step": make(), "exp_avg": torch.zeros(3)}}, "param_groups": [make()]},
        "scaler": make(),
    }
    torch.save(held, tmp_path / "epoch_1.pt", _use_new_zipfile_serialization=not legacy)
    found = checkpoint.read(tmp_path / "epoch_1.pt")
    assert found["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (set(found), found["b"].dtype) == ({"a", "b"}, torch.float16)


def test_only_the_weights_are_read(tmp_path):
    import torch

    torch.save({"state_dict": {"a": torch.ones(3)}, "optimizer": {"b": torch.ones(5)}}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as whole, zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
        for name in whole.namelist():
            if not name.endswith("data/1"):  # the optimizer's
                cut.writestr(name, whole.read(name))
    assert checkpoint.read(tmp_path / "cut.pt")["a"].tolist() == [1, 1, 1]


def test_a_whole_module_is_read_by_its_parameters_and_buffers(tmp_path):
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    module[0].weight.data = torch.arange(6.0).reshape(3, 2)
    for held in (module, {"model": module, "epoch": 1}, {"state_dict": torch.nn.DataParallel(module).state_dict()}):
        torch.save(held, tmp_path / "model.pt")
        found = checkpoint.read(tmp_path / "model.pt")
        assert list(found) == list(module.state_dict())
        assert torch.equal(found["0.weight"], module[0].weight)
        assert torch.equal(found["1.running_var"], module[1].running_var)


def test_dtypes_views_and_shared_storages(tmp_path):
    import torch

    flat = torch.arange(12, dtype=torch.float64)
    held = {"head": flat[:4], "tail": flat[8:].view(2, 2), "tied": flat, "none": torch.empty(0, 3)}
    held.update(
        {f"a {name}": torch.ones(2).to(getattr(torch, name)) for name in ("bfloat16", "int16", "uint8", "bool")}
    )
    held["parameter"] = torch.nn.Parameter(torch.ones(2))
    if hasattr(torch, "uint16"):  # torch 2.1 cannot save float8
        held["float8"] = torch.ones(2).to(torch.float8_e4m3fn)
    for modern in (True, False):
        if not modern:
            held.pop("float8", None)  # which the old format does not hold
        torch.save(held, tmp_path / "w.pt", _use_new_zipfile_serialization=modern)
        found = checkpoint.read(tmp_path / "w.pt")
        for name, value in held.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name].double(), value.detach().double()), name


def test_a_file_without_checksums(tmp_path):
    import torch

    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes them")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(1000.0)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.read(tmp_path / "w.pt")["a"].sum() == 499500


def test_a_flipped_bit_is_damage(tmp_path):
    import torch

    torch.save({"a": torch.full((1000,), 7.0)}, tmp_path / "w.pt")
    whole = bytearray((tmp_path / "w.pt").read_bytes())
    whole[whole.index(struct.pack("<f", 7.0) * 9) + 5] ^= 1
    (tmp_path / "w.pt").write_bytes(whole)
    with pytest.raises(InputError, match="damaged or cut off .Bad CRC-32"):
        checkpoint.read(tmp_path / "w.pt")


def test_tensors_that_torch_npu_saved(tmp_path):
    """It writes a function of its own for them, which torch's reader without code refuses."""
    name = b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x05\x00\x00\x00npu:0K\x02tQ"
    tensor = name + b"(" + storage + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rctorch_npu\nInfo\n)RtR"
    file = torch_file(
        tmp_path / "w.pt", b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s.", **{"0": struct.pack("<2f", 1, 2)}
    )
    assert checkpoint.read(file)["a"].tolist() == [1, 2]


class Reduce:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def attacks(file):
    """Pickles that would create `file` if something of them ran."""
    import os

    command = f"touch {file}"
    unicode = b"X" + struct.pack("<I", len(command)) + command.encode()
    reduced = Reduce(os.system, command)
    return {
        "REDUCE": pickle.dumps({"state_dict": {"a": reduced}}, 2),
        "open": pickle.dumps({"a": Reduce(open, str(file), "w")}, 2),
        "eval": pickle.dumps({"a": Reduce(eval, f"open({str(file)!r}, 'w')")}, 4),
        "nested": pickle.dumps({"a": Reduce(pickle.loads, pickle.dumps(reduced))}, 4),
        "as a key": pickle.dumps({reduced: 1}, 2),
        "a function of what a function gave": pickle.dumps(Reduce(map, os.system, [command]), 4),
        "getattr": pickle.dumps(Reduce(getattr, "a", "upper"), 4),
        "GLOBAL": b"cposix\nsystem\n" + unicode + b"\x85R.",
        "INST": b"(" + unicode + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + unicode + b"o.",
        "NEWOBJ": b"\x80\x02cposix\nsystem\n" + unicode + b"\x85\x81.",
        "a dotted name": b"\x80\x04\x8c\x06shutil\x8c\x09os.system\x93" + unicode + b"\x85R.",
        "rebuilt with it": b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nNX" + unicode[1:] + b"\x85NtR.",
        "its result called": b"cbuiltins\ngetattr\n(cos\nsystem\nX\x08\x00\x00\x00__call__tR" + unicode + b"\x85R.",
        # BUILD gives attributes to whatever is on the stack: a class, a function, an object
        "BUILD a class": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsb.",
        "BUILD its slots": b"ccollections\nOrderedDict\nN}X\x08\x00\x00\x00__init__cposix\nsystem\ns\x86b.",
        "BUILD an object": b"ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsb"
        + unicode
        + b"b.",
        "append": b"ccollections\ndeque\n)R}X\x06\x00\x00\x00appendcposix\nsystem\nsb" + unicode + b"a.",
        "a persistent id": b"(X\x07\x00\x00\x00storagecposix\nsystem\n" + unicode + b"X\x03\x00\x00\x00cpuK\x01tQ.",
    }


NAMES = list(attacks("x"))


@pytest.mark.parametrize("form", ["torch", "torchscript", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_pickle_runs(name, form, tmp_path, monkeypatch):
    harmed, file = tmp_path / "harmed", tmp_path / "evil.pt"
    content = attacks(harmed)[name]
    if form == "legacy":
        head = io.BytesIO()
        for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(one, head, 2)
        file.write_bytes(head.getvalue() + content + pickle.dumps([], 2))
    else:
        torch_file(file, content)
        if form == "torchscript":
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr("made/constants.pkl", b"")
    before = {name: dict(vars(one)) for name, one in vars(pickled).items() if isinstance(one, type)}
    modules = set(sys.modules)
    with pytest.raises(InputError) as caught:
        checkpoint.read(file)
    assert "\n" not in str(caught.value)
    assert not harmed.exists()
    assert {name: dict(vars(one)) for name, one in vars(pickled).items() if isinstance(one, type)} == before
    assert not {one for one in set(sys.modules) - modules if one.split(".")[0] in ("posix", "os", "pickle")}


def test_the_attacks_are_ones(tmp_path):
    """Python's own unpickler runs them, so that the test above shows something."""
    ran = []
    for n, name in enumerate(["REDUCE", "open", "eval", "nested", "GLOBAL", "INST", "OBJ", "a dotted name"]):
        harmed = tmp_path / str(n)
        pickle.loads(attacks(harmed)[name])
        ran.append(harmed.exists())
    assert all(ran)
