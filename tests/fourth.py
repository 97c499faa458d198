"""A fourth backend, to show what adding one takes: this file, and the line of the registry at its end.

It runs the ONNX graph as it is written, without ONNX Runtime's optimisations, from files of one batch size each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from clipval import backends
from clipval.backends import Backend, Identity, Kind, Materials, Opening
from clipval.towers import Tower


class FourthBackend(Backend):
    def __init__(self, made: Materials, asked: Opening) -> None:
        import onnxruntime  # its threads do not survive the fork of a watched run, which hung as it ended

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = made.settings.threads or 0
        assert asked.file is not None
        self._session = onnxruntime.InferenceSession(asked.file.read_bytes(), options)
        self.identity = Identity("fourth", onnxruntime.__version__, "cpu", "as written")
        self.tower = asked.tower
        self.batch_size = asked.batch_size

    def run(self, rows: np.ndarray) -> np.ndarray:
        assert len(rows) == self.batch_size
        return np.asarray(self._session.run(None, {self.tower.input_name: rows})[0])


def artifact(made: Materials, tower: Tower, batch_size: int) -> Path:
    onnx, name = made.onnx(tower), f"{tower.name}_bs{batch_size}.fourth"

    def build(folder: Path) -> None:
        shutil.copyfile(onnx, folder / name)

    return made.store.get("fourth", {"onnx": onnx.parent.name, "batch": batch_size}, build) / name


KIND = Kind(FourthBackend, suffix=".fourth", artifact=artifact, fixed_batch=True, one_session=True)
backends.MODULES["fourth"] = __name__
