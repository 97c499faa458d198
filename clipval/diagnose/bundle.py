"""A finding as a folder to send: the smallest part that still shows it, with one sample, as an ONNX test case.

`model.onnx`, `test_data_set_0/input_0.pb` and `output_0.pb` (what is right) are the layout of ONNX's own backend tests;
`candidate_output_0.pb` is added, and a README with versions and the command that runs it again.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set

import numpy as np

from clipval import environment
from clipval.diagnose import cut, evaluate, pairs
from clipval.diagnose.finding import Finding
from clipval.diagnose.graph import Graph
from clipval.diagnose.locate import EXCESS, FLOOR
from clipval.diagnose.twin import PRECISIONS, Twin
from clipval.errors import InputError, UsageError, one_line
from clipval.towers import Tower

MODEL, DATA, README = "model.onnx", "test_data_set_0", "README.md"
INPUT, RIGHT, CANDIDATE = "input_0.pb", "output_0.pb", "candidate_output_0.pb"
PROPERTY = "clipval.part"
UNUSED = "Rows that this sample does not read are left out of the table of tokens, and its ids are renumbered."
Run = Callable[[Path, Tower, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Material:
    """What a bundle is cut from.

    Attributes:
        graph: the candidate's graph; for an OM the one that it was compiled from.
        rows: the diagnosed inputs, the worst sample first.
        tensor: the first bad one; noise: of its precision there.
        good: tensors known to be right, from which a part may start.
        truth: PyTorch's values of `tensor`, for all rows; None if the float32 graph itself is right.
        device: for an OM, tensors that a device computed from the same rows, by name.
        runtime: the graph is right node by node, but the backend's result is not.
    """

    graph: Graph
    rows: np.ndarray
    tensor: str
    noise: float
    precision: str
    good: FrozenSet[str] = frozenset()
    truth: Optional[np.ndarray] = None
    device: Mapping[str, np.ndarray] = field(default_factory=dict)
    runtime: bool = False


@dataclass(frozen=True)
class Case:
    """A part with the values of one sample, and the candidate's distance from the right output."""

    part: cut.Part
    start: np.ndarray
    right: np.ndarray
    candidate: np.ndarray
    noise: float

    @property
    def error(self) -> float:
        return pairs.distance(self.candidate, self.right)

    @property
    def shows(self) -> bool:
        return not self.error <= EXCESS * self.noise


class _Sample:
    """One sample of a material: its tensors up to the bad one."""

    def __init__(self, material: Material) -> None:
        self.material = material
        whole, rows = material.graph, material.rows
        self.values: Dict[str, np.ndarray] = {}
        self.floats: Set[str] = set()
        self._look(whole, rows[:1] if whole.batch < 2 else rows)
        alone, self.single = self.values, whole.batch < 2
        if len(rows) > 1 and self.single and (material.truth is not None or material.device):
            self._look(whole, rows)
            together, kept = self.values, {}
            for name, one in alone.items():
                kept[name] = self._own(together[name], one.shape) if one.dtype.kind == "f" else one
            self.together = together
            near = pairs.distance(kept[material.tensor], alone[material.tensor])
            self.single = near <= EXCESS * max(material.noise, FLOOR["fp32"])
        else:
            self.together = alone
        self.values = alone if self.single else self.together
        self.rows = rows[:1] if self.single else rows
        self.values[whole.inputs[0]] = self.rows

    def _look(self, whole: Graph, rows: np.ndarray) -> None:
        self.values, self.floats = {}, set()
        for name, values in evaluate.tensors(whole, rows):
            if values.dtype.kind == "f":
                self.floats.add(name)
            else:
                self.values[name] = values
        self.waists = cut.waists(whole, self.material.tensor, self.floats)
        wanted = self.floats if self.material.runtime else {self.material.tensor, *self.waists}
        self.values.update({name: one for name, one in evaluate.tensors(whole, rows) if name in wanted})

    @staticmethod
    def _own(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The first sample's part of a tensor of several samples, whichever axis these are along."""
        return values[tuple(slice(0, size) for size in shape)] if values.ndim == len(shape) else values

    def of_sample(self, name: str, values: np.ndarray) -> np.ndarray:
        """Values of a tensor for all rows from another source, in the graph's shape for this sample."""
        whole = pairs.aligned(np.asarray(values, np.float32), np.asarray(self.together[name], np.float32))
        return np.ascontiguousarray(self._own(whole, self.values[name].shape))


def smallest(material: Material, run: Optional[Run], folder: Path) -> Case:
    """The smallest part of the candidate that still shows what was found.

    Args:
        run: runs a file on the backend under test; needed if the fault is in the runtime.
        folder: for the files passed to `run`.

    Raises:
        InputError: no part alone shows it.
    """
    sample = _Sample(material)
    if material.runtime:
        assert run is not None
        return _of_runtime(sample, run, folder)
    whole = material.graph
    known = {whole.root(name) for name in (*material.good, *whole.inputs)}
    for source in [name for name in sample.waists if whole.root(name) in known]:
        found = _of_device(sample, source) if material.device else _of_file(sample, source)
        if found is not None and found.shows:
            return found
    raise InputError(f"bundle: no part of {material.graph.file.name} shows it alone; send the whole file")


def _of_file(sample: _Sample, source: str) -> Case:
    material = sample.material
    made = cut.part(material.graph, source, material.tensor, sample.values)
    truth = material.truth
    assert truth is not None
    right = sample.of_sample(material.tensor, truth)
    start = _start(sample.values[source])
    return Case(made, start, right, _plain(made, start), material.noise)


def _of_device(sample: _Sample, source: str) -> Optional[Case]:
    """The part run in float32 on the device's own input gives the right output; None without a dumped input."""
    material = sample.material
    given = material.device.get(source)
    if given is None and source not in material.graph.inputs:
        return None
    made = cut.part(material.graph, source, material.tensor, sample.values)
    start = _start(sample.values[source] if given is None else sample.of_sample(source, given))
    right = _plain(made, start)
    noise = max(FLOOR.get(material.precision, 0), cost(made, start, right, material.precision, sample.floats))
    candidate = sample.of_sample(material.tensor, material.device[material.tensor])
    return Case(made, start, right, candidate, noise)


def _of_runtime(sample: _Sample, run: Run, folder: Path) -> Case:
    """Move both ends inwards while the backend's result is off, then up the branch in which it is off."""
    whole, noise = sample.material.graph, sample.material.noise

    def case(source: str, target: str) -> Case:
        made = cut.part(whole, source, target, sample.values)
        start = _start(sample.values[source])
        save(made.model, folder / MODEL)
        candidate = np.asarray(run(folder / MODEL, made.tower, start)).reshape(made.shape)
        return Case(made, start, np.asarray(_plain(made, start), np.float32), candidate, noise)

    path = [*reversed(sample.waists), sample.material.tensor]
    found = case(path[0], path[-1])
    if not found.shows:
        raise InputError("bundle: the backend's error does not show again in the first sample alone")
    low, high = 1, len(path) - 1  # the first output that shows it
    while low < high:
        middle = (low + high) // 2
        tried = case(path[0], path[middle])
        low, high, found = (low, middle, tried) if tried.shows else (middle + 1, high, found)
    found = _nearer(sample, found, case)
    while True:
        source, target = found.part.source, found.part.target
        above = [name for name in whole.parents(target) if name in sample.floats and name != source]
        worse = next((tried for tried in (case(source, name) for name in above) if tried.shows), None)
        if worse is None:
            return _nearer(sample, found, case)
        found = worse


def _nearer(sample: _Sample, found: Case, case: Callable[[str, str], Case]) -> Case:
    """The nearest waist before a part's end that still shows it."""
    target = found.part.target
    above = cut.waists(sample.material.graph, target, sample.floats)
    above = above[: above.index(found.part.source)]
    low, high = 0, len(above)
    while low < high:
        middle = (low + high) // 2
        tried = case(above[middle], target)
        low, high, found = (low, middle, tried) if tried.shows else (middle + 1, high, found)
    return found


def _start(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32 if values.dtype.kind == "f" else np.int64)[None]


def _plain(made: cut.Part, start: np.ndarray, change: Optional[evaluate.Cut] = None) -> np.ndarray:
    """The part's output node by node, in the shape of its end in the whole graph."""
    return evaluate.model(made.model, start, cut.OUTPUT, change).reshape(made.shape)


def cost(made: cut.Part, start: np.ndarray, exact: np.ndarray, precision: str, floats: Set[str]) -> float:
    """The noise of a precision in a part: the error of its twin; 0 for fp32."""
    if precision not in PRECISIONS:
        return 0.0
    return pairs.distance(_plain(made, start, Twin(precision, floats)), exact)


def save(model: Any, file: Path) -> None:
    """Write a model.

    Raises:
        InputError: it cannot be written, or exceeds protobuf's 2 GiB.
    """
    try:
        file.write_bytes(model.SerializeToString())
    except (OSError, ValueError) as error:
        raise InputError(f"bundle {file}: cannot be written ({one_line(error)})") from error


def write(folder: Path, finding: Finding, options: Sequence[str], run: Optional[Run] = None) -> Case:
    """Write the bundle of a finding into a new folder.

    Args:
        options: command-line options for `--replay` on the same backend.

    Raises:
        UsageError: the folder is not empty, or the finding has no wrong tensor.
        InputError: no part shows it, or the folder cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"diagnose --bundle {folder}: not empty; give a new folder")
    if finding.material is None:
        raise UsageError(f"diagnose --bundle: {finding.verdict}: there is no part to extract, so nothing is written")
    data = folder / DATA
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"bundle {folder}: cannot be created ({error.strerror})") from error
    whole = smallest(finding.material, run, folder)
    made, start = cut.without_unused_rows(whole.part, whole.start)
    found = replace(whole, part=made, start=start)
    _describe(found, finding)
    save(found.part.model, folder / MODEL)
    for name, values in ((INPUT, found.start), (RIGHT, found.right), (CANDIDATE, found.candidate)):
        shaped = values if name == INPUT else np.asarray(values, np.float32).reshape(1, -1)
        _write_tensor(data / name, shaped, cut.INPUT if name == INPUT else cut.OUTPUT)
    left_out = [] if start is whole.start else [UNUSED]
    (folder / README).write_text(_readme(found, finding, options, left_out), encoding="utf-8")
    return found


def _describe(found: Case, finding: Finding) -> None:
    about = {
        "precision": finding.material.precision,
        "noise": found.noise,
        "shape": found.part.shape,
        "finding": finding.sentence,
    }
    entry = found.part.model.metadata_props.add()
    entry.key, entry.value = PROPERTY, json.dumps(about)


def _write_tensor(file: Path, values: np.ndarray, name: str) -> None:
    from onnx import numpy_helper

    file.write_bytes(numpy_helper.from_array(np.ascontiguousarray(values), name).SerializeToString())


def _readme(found: Case, finding: Finding, options: Sequence[str], left_out: List[str]) -> str:
    part, limit = found.part, EXCESS * found.noise
    packages = environment.describe()["packages"]
    right = "the float32 graph of this very input" if finding.material.truth is None else "PyTorch in float64"
    lines = [
        *(f"# {finding.candidate}", "", *(f"{one}\n" for one in finding.lines())),
        f"`{MODEL}` is the smallest part that shows it: from `{part.source}` to `{part.target}` {list(part.shape)},",
        f"{len(part.model.graph.node)} nodes, one sample. `{DATA}/{INPUT}` goes in, `{RIGHT}` is right ({right}),",
        f"`{CANDIDATE}` is what the candidate gave: {found.error:.2e} off (relative), up to {limit:.1e} is what",
        f"{finding.material.precision} costs there, with a factor of {EXCESS:g}. Input and output are one row each.",
        *left_out,
        "",
        "Run it again, on this or any other backend; exit code 1 if it still shows, 0 if not:",
        "",
        f"    python -m clipval diagnose --replay . {shlex.join(options)}".rstrip(),
        "",
        "Made with " + ", ".join(f"{name} {version}" for name, version in packages.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


class Bundle:
    """A bundle, written here or received.

    Raises:
        InputError: the folder is not one.
    """

    def __init__(self, folder: Path) -> None:
        import onnx

        self.file = folder / MODEL
        try:
            model = onnx.load(str(self.file))
            about = json.loads({one.key: one.value for one in model.metadata_props}[PROPERTY])
            self.precision, self.noise = str(about["precision"]), float(about["noise"])
            self.shape, self.sentence = tuple(map(int, about["shape"])), str(about["finding"])
            self.start, self.right = (_tensor(folder / DATA / name) for name in (INPUT, RIGHT))
            self.right = self.right.reshape(self.shape)
            taken = [one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim]
            if 0 not in taken and taken != list(self.start.shape):
                raise ValueError(f"{MODEL} takes {taken}, {INPUT} is {list(self.start.shape)}")
        except Exception as error:  # protobuf's, onnx's and the file system's own classes
            said = "lacks " + PROPERTY if isinstance(error, KeyError) else one_line(error)
            raise InputError(f"bundle {folder}: cannot be read ({said}); give what diagnose --bundle wrote") from error
        dtype = str(self.start.dtype)
        tower = Tower("part", cut.INPUT, dtype, self.start.shape[1:], cut.OUTPUT, int(np.prod(self.shape)), "ND", "")
        self.part = cut.Part(model, tower, cut.INPUT, cut.OUTPUT, self.shape)

    def limit(self, precision: str) -> float:
        """The largest error that is no fault: the precision's noise in the part, times a diagnosis's factor."""
        if precision == self.precision or precision not in PRECISIONS:
            return EXCESS * self.noise
        exact = _plain(self.part, self.start)
        floats = {name for name, one in evaluate.all_of(self.part.model, self.start).items() if one.dtype == np.float32}
        return EXCESS * max(FLOOR[precision], cost(self.part, self.start, exact, precision, floats))

    def error(self, run: Run) -> float:
        """The error of a backend's result now, in the order of axes in which it is closest."""
        found = np.asarray(run(self.file, self.part.tower, self.start), np.float32).reshape(self.shape)
        return pairs.distance(found, self.right)


def _tensor(file: Path) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    held = TensorProto()
    held.ParseFromString(file.read_bytes())
    return np.array(numpy_helper.to_array(held))


def total(folder: Path) -> int:
    """Total bytes of a bundle's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
