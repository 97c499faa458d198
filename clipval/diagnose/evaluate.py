"""Every tensor of an ONNX graph, a few at a time: in the graph's precision, or rounded as on an accelerator.

The only module of `clipval.diagnose` that imports onnxruntime. Graph optimisations are off, so that the file is run as
it is.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import numpy as np

from clipval.diagnose.graph import Graph, widened
from clipval.errors import InputError, one_line

Cut = Callable[[Any], Any]
WIDE = ":wide"
_DTYPES = {1: "float32", 6: "int32", 7: "int64", 10: "float16"}  # of onnx.TensorProto, those that inputs have


def tensors(graph: Graph, rows: np.ndarray, change: Optional[Cut] = None) -> Iterator[Tuple[str, np.ndarray]]:
    """Every tensor that depends on the input, including shapes, and every settled one, in order of computation.

    Keeps only what later nodes need.

    Args:
        rows: the graph's only input.
        change: model -> model, applied to each piece of the graph before it runs (see `clipval.diagnose.twin`).

    Raises:
        InputError: the graph has several inputs, or the runtime cannot run it.
    """
    if len(graph.inputs) != 1:
        raise InputError(f"ONNX {graph.file}: has inputs {', '.join(graph.inputs)}; a tower has one")
    import onnxruntime

    last, shown = _last_use(graph), graph.moving | graph.measured | graph.settled
    fed_rows = np.ascontiguousarray(rows, _DTYPES.get(graph.input_kind))  # somebody's file may take int32 or float16
    alive: Dict[str, Any] = {graph.inputs[0]: onnxruntime.OrtValue.ortvalue_from_numpy(fed_rows)}
    for numbers in graph.segments():
        made = {name for number in numbers for name in graph.nodes[number].outputs if name}
        used = {name for number in numbers for name in graph.nodes[number].inputs} - made
        fed = {name: alive[name] for name in sorted(used) if name in alive}
        wanted = [
            name
            for number in numbers
            for name in graph.nodes[number].outputs
            if name and (name in shown or last.get(name, -1) > numbers[-1] or name in graph.outputs)
        ]
        kinds = {name: (one.element_type(), one.shape()) for name, one in fed.items()}
        model = graph.cut(numbers, kinds, wanted)
        found = run(change(model) if change else model, fed, wanted, graph.file)
        for name in wanted:
            if name in shown and found[name].has_value():
                yield name, as_array(found[name], found.get(f"{name}{WIDE}"))
            if last.get(name, -1) > numbers[-1]:
                alive[name] = found[name]
        alive = {name: values for name, values in alive.items() if last.get(name, -1) > numbers[-1]}


def part(graph: Graph, tensor: str, given: Mapping[str, np.ndarray], change: Optional[Cut] = None) -> np.ndarray:
    """One tensor computed from given ones: a part of the graph, run on another candidate's inputs."""
    import onnxruntime

    numbers = graph.closure(tensor, given)
    used = {name for number in numbers for name in graph.nodes[number].inputs}
    fed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(given[name]) for name in sorted(used & set(given) - {tensor})}
    kinds = {name: (one.element_type(), one.shape()) for name, one in fed.items()}
    model = graph.cut(numbers, kinds, [tensor])
    found = run(change(model) if change else model, fed, [tensor], graph.file)
    return as_array(found[tensor], found.get(f"{tensor}{WIDE}"))


def model(whole: Any, rows: np.ndarray, wanted: str, change: Optional[Cut] = None) -> np.ndarray:
    """One result of a small model with one input, node by node."""
    changed = change(copy.deepcopy(whole)) if change else whole
    return _run_rows(changed, rows, [wanted])[wanted]


def all_of(whole: Any, rows: np.ndarray) -> Dict[str, np.ndarray]:
    """Every result of a small model with one input."""
    from onnx import helper

    shown, held = copy.deepcopy(whole), {one.name for one in whole.graph.output}
    names = [name for node in whole.graph.node for name in node.output if name]
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in held)
    return _run_rows(shown, rows, names)


def _run_rows(whole: Any, rows: np.ndarray, wanted: Sequence[str]) -> Dict[str, np.ndarray]:
    import onnxruntime

    fed = {whole.graph.input[0].name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows))}
    found = run(whole, fed, wanted, whole.graph.name)
    return {name: as_array(found[name], found.get(f"{name}{WIDE}")) for name in wanted if found[name].has_value()}


def as_array(value: Any, wide: Any = None) -> np.ndarray:
    """A runtime's value as an array; bfloat16, which numpy lacks, as float32."""
    return np.asarray((wide or value).numpy())


def run(model: Any, fed: Dict[str, Any], wanted: Sequence[str], what: Any) -> Dict[str, Any]:
    """Run a small model once, node by node as written; takes and returns values of the runtime.

    A bfloat16 result `x` is also returned as float32, under `x` + `WIDE`.

    Raises:
        InputError: the runtime cannot run it.
    """
    try:
        session = _session(model)
        narrow = [one.name for one in session.get_outputs() if "bfloat16" in one.type]
        if narrow:
            session = _session(widened(model, narrow, WIDE))
        names = [*wanted, *(f"{name}{WIDE}" for name in narrow)]
        return dict(zip(names, session.run_with_ort_values(names, fed)))
    except Exception as error:  # the runtime raises its own classes and RuntimeError
        raise InputError(f"ONNX {what}: onnxruntime cannot run it ({one_line(error, 300)})") from error


def _session(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _last_use(graph: Graph) -> Dict[str, int]:
    return {name: number for number, node in enumerate(graph.nodes) for name in node.inputs}
