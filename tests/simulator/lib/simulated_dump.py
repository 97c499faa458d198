"""Dump files of the simulated NPU, in the real ones' layout: written with google.protobuf, from the field numbers.

As on a device, operators are not ONNX nodes: a norm, a GELU and a product with its bias are one operator each, under
one of their nodes' names, with the others in the fused list; the matrix unit writes FRACTAL_NZ; some leave no dump.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

SILENT = ("Constant", "Shape", "Reshape", "Unsqueeze", "Squeeze", "Identity", "ConstantOfShape", "Gather", "Expand")
PASSES = {"LayerNormV4": "LayerNormONNXFusionPass", "Gelu": "GeluONNXFusionPass"}  # that made such operators
HELPERS = ("_exact", "_clamped", "_half")  # results that the simulation's own rounding has added
KINDS = {"MatMul": "BatchMatMulV2", "Gemm": "MatMulV2", "Conv": "Conv2D", "Softmax": "SoftmaxV2", "Concat": "ConcatD"}
ND, NZ = 2, 29
FLOAT, HALF, BFLOAT = 1, 2, 27
PROTO = {  # message -> field -> (number, type, repeated); hicann runtime, dfx/adump/proto/dump_task.proto
    "Shape": {"dim": (1, "uint64", True)},
    "OriginalOp": {
        "name": (1, "string", False),
        "output_index": (2, "uint32", False),
        "data_type": (3, "int32", False),
        "format": (4, "int32", False),
    },
    "OpOutput": {
        "data_type": (1, "int32", False),
        "format": (2, "int32", False),
        "shape": (3, "Shape", False),
        "original_op": (4, "OriginalOp", False),
        "size": (6, "uint64", False),
        "original_shape": (7, "Shape", False),
        "address": (9, "uint64", False),
    },
    "OpInput": {
        "data_type": (1, "int32", False),
        "format": (2, "int32", False),
        "shape": (3, "Shape", False),
        "size": (5, "uint64", False),
        "original_shape": (6, "Shape", False),
        "address": (8, "uint64", False),
    },
    "DumpData": {
        "version": (1, "string", False),
        "dump_time": (2, "uint64", False),
        "output": (3, "OpOutput", True),
        "input": (4, "OpInput", True),
        "op_name": (6, "string", False),
    },
}
TITLES = "Input/Output,Index,Data Size,Data Type,Format,Shape,Max Value,Min Value,Avg Value,Count,Nan Count,"
TITLES += "Negative Inf Count,Positive Inf Count"


def messages() -> Dict[str, Any]:
    """The message classes, built from the field numbers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = {"uint64": 4, "int32": 5, "string": 9, "uint32": 13}
    file = descriptor_pb2.FileDescriptorProto(name="simulated_dump.proto", package="toolkit.dump", syntax="proto3")
    for name, fields in PROTO.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            one = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if kind in kinds:
                one.type = kinds[kind]
            else:
                one.type, one.type_name = 11, f".toolkit.dump.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = [pool.FindMessageTypeByName(f"toolkit.dump.{name}") for name in PROTO]
    make = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    return {one.name: make(one) for one in found}


class Operator:
    """One operator of the simulated OM: its nodes, the last of which makes its output."""

    def __init__(self, kind: str, nodes: Sequence[Any]) -> None:
        self.kind = kind
        self.nodes = list(nodes)

    @property
    def name(self) -> str:
        """Fused operators go by their first node's name."""
        return str(self.nodes[0].name)

    @property
    def output(self) -> str:
        return str(self.nodes[-1].output[0])


def operators(nodes: Sequence[Any]) -> List[Operator]:
    """Fuse as the graph engine does: norms and GELUs of one scope, a product with its bias."""
    found: List[Operator] = []
    real = [node for node in nodes if node.name and node.op_type not in SILENT and not _helper(node)]
    for node in real:
        scope = node.name.rpartition("/")[0]
        whole = re.search(r"/(ln_\w+|gelu)$", scope)
        kind = ("Gelu" if whole[1] == "gelu" else "LayerNormV4") if whole else KINDS.get(node.op_type, node.op_type)
        last = found[-1] if found else None
        if (last and whole and last.kind == kind and last.name.rpartition("/")[0] == scope) or (
            last and node.op_type == "Add" and last.nodes[-1].op_type == "MatMul" and _scope(last) == scope
        ):
            last.nodes.append(node)
        else:
            found.append(Operator(kind, [node]))
    return found


def _scope(one: Operator) -> str:
    return one.name.rpartition("/")[0]


def _helper(node: Any) -> bool:
    return any(name.endswith(HELPERS) for name in node.output) and not node.output[0].endswith("_exact")


def fused(nodes: Sequence[Any]) -> List[Dict[str, Any]]:
    """Operators as `atc --mode=1` describes them."""
    return [
        {
            "name": one.name,
            "type": one.kind,
            "attr": [
                {
                    "key": "_datadump_original_op_names",
                    "value": {"list": {"s": [node.name for node in one.nodes] if len(one.nodes) > 1 else []}},
                },
                *([{"key": "pass_name", "value": {"list": {"s": [PASSES[one.kind]]}}}] if one.kind in PASSES else []),
            ],
        }
        for one in operators(nodes)
    ]


class Dumper:
    """What one loaded model dumps at each run.

    Args:
        config: the file of `acl_json_path`.
        stem: file name of the OM up to its last dot, which is the model's name.
        model: its ONNX model.
    """

    def __init__(self, config: str, stem: str, model: Any) -> None:
        self.config = json.loads(Path(config).read_text(encoding="utf-8")).get("dump", {})
        self.stem = stem
        self.model = model
        self.runs = 0
        kinds = [one.i for node in model.graph.node if node.op_type == "Cast" for one in node.attribute]
        # onnx's FLOAT16 is 10, its BFLOAT16 16: the OM rounds to one of them after every operator
        self.narrow = BFLOAT if kinds.count(16) > kinds.count(10) else HALF
        self.switched = next(
            (one for one in self.config.get("dump_list", []) if one.get("model_name", stem) == stem), None
        )

    def run(self, feeds: Dict[str, np.ndarray]) -> None:
        """Write the files of one inference; nothing where the model is not in `dump_list`, which is no error."""
        if self.switched is None:
            return
        wanted = [one for one in operators(self.model.graph.node) if self._listed(one)]
        values = self._values(feeds, wanted)
        root = Path(self.config["dump_path"]) / time.strftime("%Y%m%d%H%M%S") / "0" / self.stem / "1" / str(self.runs)
        root.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(wanted):
            if one.output in values:
                self._write(root, number, one, values[one.output])
        self.runs += 1

    def _type(self, one: Operator) -> int:
        return FLOAT if wide(one) else self.narrow

    def _listed(self, one: Operator) -> bool:
        """`layer` takes the operator's name or an ONNX node's."""
        layers = self.switched.get("layer") if self.switched else None
        return not layers or bool({node.name for node in one.nodes} & set(layers))

    def _values(self, feeds: Dict[str, np.ndarray], wanted: Sequence[Operator]) -> Dict[str, np.ndarray]:
        import copy

        import onnxruntime
        from onnx import helper

        whole = copy.deepcopy(self.model)
        made = {name for node in whole.graph.node for name in node.output}
        names = {one.output: _stored(one.output, made) for one in wanted}
        held = {one.name for one in whole.graph.output}
        extra = [name for name in names.values() if name not in held]
        whole.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(extra))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        exact = {one.name for one in session.get_outputs() if one.type == "tensor(float)"}
        asked = [name for name in dict.fromkeys(names.values()) if name in exact]
        found = dict(zip(asked, session.run(asked, feeds)))
        return {name: found[stored] for name, stored in names.items() if stored in found}

    def _write(self, root: Path, number: int, one: Operator, values: np.ndarray) -> None:
        stamp = f"{int(time.time() * 1e6):016d}"
        plain = re.sub(r"[ ./\\]", "_", one.name)
        file = f"{one.kind}.{plain}.{number}.3.{stamp}"
        if self.config.get("dump_data") == "stats":
            (root / f"{file}.csv").write_text(statistics(values, self._type(one)), encoding="utf-8")
            return
        header, raw = tensor(one, values, self._type(one))
        whole = len(header).to_bytes(8, "little") + header + raw
        (root / file).write_bytes(whole)
        os.chmod(root / file, 0o600)


def of(config: str, model_path: str) -> Any:
    """The dumper of a session, None where nothing is to be dumped."""
    if not config:
        return None
    import npu_host
    import onnx

    _, model = npu_host.read_om(model_path)
    return Dumper(config, Path(model_path).name.rpartition(".")[0], onnx.load_from_string(model))


def _stored(name: str, made: Any) -> str:
    """The rounded result: a node that was rounded has its own name only on what was rounded."""
    return name[: -len("_exact")] if name.endswith("_exact") and name[: -len("_exact")] in made else name


def wide(one: Operator) -> bool:
    """The operator computes in float32: its result is one of those that are rounded, and was not."""
    import simulated_rounding

    return one.nodes[-1].op_type in simulated_rounding.ROUNDED and not one.output.endswith("_exact")


def tensor(one: Operator, values: np.ndarray, kind: int) -> Tuple[bytes, bytes]:
    """Header and bytes of an operator's file: in FRACTAL_NZ where the matrix unit makes it."""
    made = messages()
    half = {FLOAT: np.asarray, HALF: _as_half, BFLOAT: _as_bfloat}[kind](values)
    cube = one.nodes[0].op_type in ("MatMul", "Gemm") and values.ndim >= 2
    stored = fractal(half) if cube else half
    output = made["OpOutput"](data_type=kind, format=NZ if cube else ND, size=stored.nbytes, address=0x12C0_0000_0000)
    output.shape.dim.extend(stored.shape)
    output.original_shape.dim.extend(values.shape)
    if len(one.nodes) > 1 and one.kind == "LayerNormV4":  # passes set it; here to the first node, as some do
        output.original_op.name = one.nodes[0].name
        output.original_op.output_index = 4294967295
    header = made["DumpData"](version="2.0", dump_time=int(time.time() * 1e6), op_name=one.name)
    header.output.append(output)
    return header.SerializeToString(), stored.tobytes()


def _as_half(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -65504, 65504).astype(np.float16)


def _as_bfloat(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded; numpy has no bfloat16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def fractal(values: np.ndarray) -> np.ndarray:
    """[..., M, C] -> [..., C1, M1, M0, C0] in blocks of 16 by 16, the rest filled with what was there (here 7)."""
    *lead, rows, columns = values.shape
    m1, c1 = -(-rows // 16), -(-columns // 16)
    wide = np.full((*lead, m1 * 16, c1 * 16), 7, values.dtype)
    wide[..., :rows, :columns] = values
    blocks = wide.reshape(-1, m1, 16, c1, 16).transpose(0, 3, 1, 2, 4)
    return np.ascontiguousarray(blocks).reshape(*lead, c1, m1, 16, 16)


def statistics(values: np.ndarray, kind: int) -> str:
    """The statistics file of one output, over the stored values; a bf16 tensor's figures are empty cells."""
    finite = values[np.isfinite(values)]
    found = [finite.max(), finite.min(), finite.mean()] if finite.size else ["nan"] * 3
    counts = [int(np.isnan(values).sum()), int(np.isneginf(values).sum()), int(np.isposinf(values).sum())]
    figures = [*(f"{float(one):.6g}" for one in found), values.size, *counts]
    shape = "x".join(map(str, values.shape)) or "-"
    name, size = {FLOAT: ("DT_FLOAT", 4), HALF: ("DT_FLOAT16", 2), BFLOAT: ("DT_BF16", 2)}[kind]
    if kind == BFLOAT:
        figures = [""] * len(figures)
    return f"{TITLES}\n{','.join(map(str, ['Output', 0, values.size * size, name, 'ND', shape, *figures]))}\n"
