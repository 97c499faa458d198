"""How large a fault must be to be just caught: python -m tests.faults.sizes > docs/planted-faults.md

Faults that have a size are made smaller until their gate no longer sees them, on a few drawn scenes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, Set, Tuple

import numpy as np
from PIL import Image

from clipval import probe
from clipval.arrays import PreparedRows
from clipval.backends.onnx import OnnxBackend
from clipval.backends.pytorch import PytorchBackend
from clipval.chain import Chain
from clipval.datasets import shapes
from clipval.embeddings import Embeddings, embed
from clipval.gates import artifacts, embeddings, parity
from clipval.model import encoder, load
from clipval.options import Settings
from clipval.preprocess import expected_pixels
from clipval.throughput.verdict import FAULTS as ROW_FAULTS
from tests import small, speed_fakes
from tests.faults.in_data import noisy
from tests.faults.in_exports import ROW, change_table, weights, with_noise
from tests.faults.planted import FAULTS

HEAD = """# Planted faults

Each fault is planted into an artifact, a backend or the data, one at a time, and the real acceptance suite is run on
it (`pytest -m proof` by the intended gate alone; every plain `pytest` by all gates, two faults at random). The intended
gate must fail and name the place.
The last column is the smallest size of a fault that is caught on {images} scenes; faults without one have no size.
Made by `python -m tests.faults.sizes`.

| fault | gate that catches it | smallest size caught |
|---|---|---|"""


class Bench:
    """A data set with everything built, and gates on changed evidence."""

    def __init__(self, spec: str, folder: Path) -> None:
        self.chain = Chain(Settings(spec=spec, workdir=folder))

    def parity(self, tower_name: str, change: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Changed embeddings are caught by values or parity."""
        tower = self.chain.towers[tower_name]
        where, found = self.chain.embeddings("onnx", tower)
        bounds = self.chain.bounds(where, tower)
        changed = Embeddings(found.ids, np.asarray(change(found.values.copy()), np.float32))
        reference = self.chain.embeddings("pytorch", tower).embeddings
        figures = embeddings.values(changed, where, tower, bounds, found.ids)
        figures += parity.agreement(reference, changed, where, tower, bounds)
        return any(figure.verdict == "fail" for figure in figures)

    def weights(self, tower_name: str, change: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Changed weights of one layer of the ONNX file are caught."""
        import onnx

        tower = self.chain.towers[tower_name]
        graph = onnx.load(str(self.chain.onnx(tower)))
        weights(onnx, graph, lambda values: np.asarray(change(values), np.float32))
        rows = self.chain.prepared.rows[tower_name]
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(graph, f"{folder}/changed.onnx")
            found = embed(OnnxBackend(tower, Path(folder) / "changed.onnx"), rows.ids, rows, 8).values
        return self.parity(tower_name, lambda _: found)

    def invariance(self, size: float) -> bool:
        """Noise on the text embeddings of batches of one is caught."""
        tower = self.chain.towers["text"]
        where, whole = self.chain.embeddings("onnx", tower)
        picked = embeddings.invariance_samples(len(whole.ids))
        single = self.chain.embed_some("onnx", tower, picked, 1)
        noisy = Embeddings(single.ids, noise(single.values, size))
        figures = embeddings.invariance(whole, noisy, single, where, tower, self.chain.bounds(where, tower))
        return any(figure.verdict == "fail" for figure in figures)

    def golden(self, size: float) -> bool:
        """Noise on the weights of the model itself is caught by the pinned embeddings of the text tower."""
        chain, tower = self.chain, self.chain.towers["text"]
        assert chain.spec.golden is not None
        pinned = chain.golden(tower)
        model = load(chain.spec.model.name, chain.weights, chain.towers)
        backend, inputs = PytorchBackend(tower, encoder(noisy(model, size), tower)), probe.inputs(chain.model, tower, 0)
        found = embed(backend, *inputs, 8)
        figures = embeddings.golden(pinned, found, inputs.sha256, backend.identity, tower, chain.spec.golden)
        return any(figure.verdict == "fail" for figure in figures)

    def token(self, size: float) -> bool:
        """Noise on one row of the table of tokens is caught by the probe that shows every id."""
        import onnx

        chain, tower = self.chain, self.chain.towers["text"]
        graph = onnx.load(str(chain.onnx(tower)))
        change_table(onnx, graph, lambda table: with_noise(table, ROW, size))
        shown = probe.inputs(chain.model, tower, 0, every_id=True).rows
        rows = shown[(shown == ROW).any(axis=1)]
        ids = tuple(map(str, range(len(rows))))
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(graph, f"{folder}/changed.onnx")
            backend = OnnxBackend(tower, Path(folder) / "changed.onnx")
            found, wanted = (embed(one, ids, rows, 8) for one in (backend, chain.backend("pytorch", tower, 8)))
        figures = embeddings.probe(wanted, found, backend.identity, tower, chain.bounds(backend.identity, tower), 0)
        return any(figure.verdict == "fail" for figure in figures)

    def pixels(self, change: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Changed pixels of one image are caught."""
        rows: PreparedRows = self.chain.prepared.rows["vision"]
        path, spec = self.chain.dataset.image_paths[0], self.chain.spec
        assert spec.preprocess is not None
        off = np.abs(change(rows[[0]][0]) - expected_pixels(path, (224, 224), spec.preprocess)).max()
        return bool(off > artifacts.PIXELS)

    def painted(self, height: float) -> bool:
        """The first picture is caught with its first rows painted over."""
        data = self.chain.dataset
        with Image.open(data.image_paths[0]) as stored, tempfile.TemporaryDirectory() as folder:
            image = stored.convert("RGB")
            image.paste((90, 90, 90), (0, 0, image.width, round(height)))
            path = Path(folder) / data.image_paths[0].name
            image.save(path, quality=90)
            changed = dataclasses.replace(data, image_paths=(path, *data.image_paths[1:]))
            return bool(shapes.off(changed)[0] > 1)


def noise(values: np.ndarray, size: float) -> np.ndarray:
    """Normal noise of one size on each element."""
    return np.asarray(values + np.random.default_rng(0).normal(0, size, values.shape), np.float32)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Weights in whole steps, of so many bits with the sign."""
    step = np.abs(values).max() / (2 ** (bits - 1) - 1)
    return np.asarray(np.round(values / step) * step)


def just_caught(caught: Callable[[float], bool], largest: float) -> str:
    """The smallest size that is still caught, to 5 %."""
    assert caught(largest), "the largest size must be caught"
    low, high = largest * 1e-9, largest
    while high > 1.05 * low:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if caught(middle) else (middle, high)
    return f"{high:.1e}"


def sizes(bench: Bench) -> Dict[str, str]:
    """Fault name -> the size at which it is just caught, with its unit."""

    def turned(rows: np.ndarray, size: float) -> np.ndarray:
        rows[-1:] += size * np.random.default_rng(0).normal(0, rows.shape[1] ** -0.5, (1, rows.shape[1]))
        return rows

    def of_each(values: np.ndarray, size: float) -> np.ndarray:
        return values * noise(np.ones_like(values), size)

    found: Dict[str, Tuple[Callable[[float], bool], float, str]] = {
        "weight_noise_vision": (lambda s: bench.weights("vision", lambda x: of_each(x, s)), 0.02, "of each weight"),
        "weight_noise_text": (lambda s: bench.weights("text", lambda x: of_each(x, s)), 0.02, "of each weight"),
        "layer_zeroed": (lambda s: bench.weights("vision", lambda x: x * (1 - s)), 1.0, "of the layer"),
        "noise_on_embeddings": (lambda s: bench.parity("vision", lambda x: noise(x, s)), 0.01, "on each element"),
        "last_sample": (lambda s: bench.parity("text", lambda x: turned(x, s)), 1.0, "of its length, on one sample"),
        "scaled": (lambda s: bench.parity("vision", lambda x: x * (1 + s)), 0.1, "of the length"),
        "not_normalised": (lambda s: bench.parity("text", lambda x: x * (1 + s)), 9.0, "of the length"),
        "neighbours_leak": (lambda s: bench.parity("text", lambda x: x + s * x.mean(0)), 0.1, "of the mean embedding"),
        "noise_everywhere": (bench.golden, 0.1, "of each weight"),
        "batch_of_one": (bench.invariance, 0.01, "on each element"),
        "other_mean": (lambda s: bench.pixels(lambda x: x + s / 255), 1.0, "of a grey level"),
        "one_picture_painted_over": (bench.painted, 60.0, "pixels of its height"),
        "token_off": (bench.token, 0.02, "on each element of the row"),
        "crop_off_by_one": (lambda s: bench.pixels(lambda x: x + s * (np.roll(x, 1, 2) - x)), 1.0, "of a pixel"),
    }
    table = {name: f"{just_caught(caught, largest)} {unit}" for name, (caught, largest, unit) in found.items()}
    bits = max(bits for bits in range(4, 24) if bench.weights("vision", lambda x: rounded(x, bits)))  # noqa: B023
    return {**table, "int8_weights": f"{bits} bits"}


def speed_sizes() -> Dict[str, str]:
    """The same for timed calls, on backends with a clock of their own."""
    fake = speed_fakes.Fake

    def caught(backend: speed_fakes.Fake, seconds: float = 0.5) -> bool:
        return speed_fakes.verdict(backend, seconds=seconds)[0] in ROW_FAULTS

    def off(size: float) -> speed_fakes.Fake:
        return fake(lambda rows, found, n: noise(found, size) if n > 30 else found)

    def new_off(size: float) -> speed_fakes.Fake:
        """One batch in the middle that never came before is off."""
        seen: Set[bytes] = set()
        new: List[int] = []

        def change(rows: np.ndarray, found: np.ndarray, n: int) -> np.ndarray:
            if rows.tobytes() not in seen and n > 30:
                new.append(n)
            seen.add(rows.tobytes())
            return noise(found, size) if new and n == new[0] else found

        return fake(change)

    def sometimes(share: float) -> speed_fakes.Fake:
        takes, rng = speed_fakes.cached(100.0), np.random.default_rng(0)
        return fake(
            takes=lambda rows, n: min(speed_fakes.SECONDS, takes(rows, n) * (1 if rng.random() < share else 100))
        )

    def tenth(size: float) -> speed_fakes.Fake:
        keep = speed_fakes.keeping(int(size * 2**20), touched)
        return fake(lambda rows, found, n: keep(rows, found, n) if n % 10 == 0 else found)

    def touched(size: int) -> np.ndarray:
        return np.ones(size, np.uint8)

    found: Dict[str, Tuple[Callable[[float], bool], float, str]] = {
        "wrong_under_load": (lambda s: caught(off(s)), 1.0, "on each element"),
        "cached_by_content": (lambda s: caught(fake(takes=speed_fakes.cached(1 + s))), 10.0, "faster, as a share"),
        "cached_mostly": (lambda s: caught(sometimes(s)), 1.0, "of the results"),
        "one_new_batch_wrong": (lambda s: caught(new_off(s)), 1.0, "on each element"),
        "leak_in_every_tenth_call": (lambda s: caught(tenth(s), 3.0), 20.0, "MB in every tenth call"),
        "execute_too_short": (
            lambda s: caught(fake(device=lambda took: took / max(1.0, s))),
            1000.0,
            "times shorter than the call",
        ),
        "execute_too_long": (lambda s: caught(fake(device=lambda took: (1 + s) * took)), 1.0, "longer, as a share"),
        "leak": (lambda s: caught(fake(speed_fakes.keeping(int(s * 2**20), touched))), 1.0, "MB a call"),
    }
    return {name: f"{just_caught(seen, largest)} {unit}" for name, (seen, largest, unit) in found.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        few = Bench(str(small.write_spec(Path(folder))), Path(folder) / "few")
        measured = {**sizes(few), **speed_sizes()}
        few.chain.close()
    print(HEAD.format(images=small.IMAGES))
    for name, fault in FAULTS.items():
        print(f"| {fault.says} | `{fault.gate}` | {measured.get(name, '')} |")


if __name__ == "__main__":
    main()
