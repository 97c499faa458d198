"""How large a fault must be to be just caught: python -m tests.faults.sizes > docs/planted-faults.md

Faults that have a size are halved until their gate no longer sees them, on the embedded default, in one process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np

from clipval import gates
from clipval.backends.onnx import OnnxBackend
from clipval.chain import Chain
from clipval.embeddings import Embeddings, embed
from clipval.options import Settings
from clipval.preprocess import PreparedRows, expected_pixels
from tests import small
from tests.faults.planted import FAULTS

HEAD = """# Planted faults

Each fault is planted into an artifact, a backend or the data, one at a time, and the real acceptance suite is run on
it (`pytest -m proof`; two at random in every plain `pytest`). The gate meant for it must be red and name the place.
The last column is the size at which a fault is just caught on {images} scenes; faults without one are there or not.
Made by `python -m tests.faults.sizes`.

| fault | gate that catches it | just caught at |
|---|---|---|"""


class Bench:
    """The small data set with everything built, and gates on changed evidence."""

    def __init__(self, folder: Path) -> None:
        self.chain = Chain(Settings(spec=str(small.write_spec(folder)), workdir=folder / "work"))
        self.noise = np.random.default_rng(0)

    def parity(self, tower_name: str, change: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Changed embeddings are caught by values or parity."""
        tower = self.chain.towers[tower_name]
        where, found = self.chain.embeddings("onnx", tower)
        bounds = self.chain.bounds(where)
        changed = Embeddings(found.ids, np.asarray(change(found.values.copy()), np.float32))
        reference = self.chain.embeddings("pytorch", tower).embeddings
        figures = gates.values(changed, where, tower, bounds, found.ids)
        figures += gates.agreement(reference, changed, where, tower, bounds)
        return any(figure.verdict == "fail" for figure in figures)

    def weights(self, tower_name: str, size: float) -> bool:
        """Noise on the weights of one layer of the ONNX file is caught."""
        import onnx

        tower = self.chain.towers[tower_name]
        graph = onnx.load(str(self.chain.onnx(tower)))
        blocks = [one for one in graph.graph.initializer if len(one.dims) == 2 and max(one.dims) < 5000]
        chosen = max(blocks, key=lambda one: np.prod(one.dims))
        values = onnx.numpy_helper.to_array(chosen)
        drawn = np.random.default_rng(0).normal(0, size, values.shape)
        chosen.CopyFrom(onnx.numpy_helper.from_array((values * (1 + drawn)).astype(np.float32), chosen.name))
        rows = self.chain.prepared.rows[tower_name]
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(graph, f"{folder}/noisy.onnx")
            found = embed(OnnxBackend(tower, Path(folder) / "noisy.onnx"), rows.ids, rows, 8).values
        return self.parity(tower_name, lambda _: found)

    def pixels(self, size: float) -> bool:
        """A shift of every pixel by a share of a grey level is caught."""
        rows: PreparedRows = self.chain.prepared.rows["vision"]
        path, spec = self.chain.dataset.image_paths[0], self.chain.spec
        assert spec.preprocess is not None
        off = np.abs(rows[[0]][0] + size / 255 - expected_pixels(path, 224, spec.preprocess)).max()
        return bool(off > gates.PIXELS)


def just_caught(caught: Callable[[float], bool], largest: float) -> str:
    """The smallest size, by halving, that is still caught."""
    assert caught(largest), "the largest size must be caught"
    size = largest
    while caught(size / 2):
        size /= 2
    return f"{size:.1e}"


def sizes(bench: Bench) -> Dict[str, str]:
    """Fault name -> the size at which it is just caught, with its unit."""

    def drawn(rows: np.ndarray, size: float) -> Any:
        return rows + np.random.default_rng(0).normal(0, size, rows.shape)

    found = {
        "weight_noise_vision": (lambda s: bench.weights("vision", s), 0.02, "of each weight"),
        "weight_noise_text": (lambda s: bench.weights("text", s), 0.02, "of each weight"),
        "noise_on_embeddings": (lambda s: bench.parity("vision", lambda x: drawn(x, s)), 0.01, "on each element"),
        "scaled": (lambda s: bench.parity("vision", lambda x: x * (1 + s)), 0.1, "of the length"),
        "neighbours_leak": (lambda s: bench.parity("text", lambda x: x + s * x.mean(0)), 0.1, "of the mean embedding"),
        "other_mean": (bench.pixels, 1.0, "of a grey level"),
    }
    return {name: f"{just_caught(caught, largest)} {unit}" for name, (caught, largest, unit) in found.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        measured = sizes(bench)
        bench.chain.close()
    print(HEAD.format(images=small.IMAGES))
    for name, fault in FAULTS.items():
        print(f"| {fault.says} | `{fault.gate}` | {measured.get(name, '')} |")


if __name__ == "__main__":
    main()
