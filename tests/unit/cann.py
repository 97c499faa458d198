"""A stand-in for ONNX Runtime's CANN provider: it is not on any machine without an NPU.

As the provider does, it computes in fp16 unless told otherwise, keeps what it compiles as `<name>_<input shape>.om` in
the working directory under a key without precision, CANN or chip, takes a file that lies there, and knows a few options
only. Source: ONNX Runtime's page on it, and its cann_execution_provider.cc of 1.24.
"""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

CANN, CPU = "CANNExecutionProvider", "CPUExecutionProvider"
KNOWN = {"device_id", "npu_mem_limit", "enable_cann_graph", "dump_om_model", "precision_mode", "op_select_impl_mode"}
ASSIGNMENT = "get_provider_graph_assignment_info"


def has_assignment():
    """This onnxruntime tells where its nodes are: from 1.24 on."""
    import onnxruntime

    return hasattr(onnxruntime.InferenceSession, ASSIGNMENT)


def _session_class(real, stray, deaf):
    import onnxruntime

    class Session(real):
        """Computes on the CPU, rounds as the NPU would, and says that the NPU did it.

        Attributes:
            stray: operators that it leaves to the CPU.
            deaf: it computes in fp16 whatever it is told.
            opened: options of each session so far; compiled: files that were written, in order.
        """

        stray = ()
        deaf = False
        opened: ClassVar[list] = []
        compiled: ClassVar[list] = []

        def __init__(self, path, options, providers, **rest):
            first = providers[0]
            name, given = first if isinstance(first, tuple) else (first, {})
            self._cann = name == CANN
            self._given, self._models = given, {}
            if self._cann:
                assert rest == {"enable_fallback": 0}, "onnxruntime would fall back and hide the reason"
                unknown = set(given) - KNOWN
                if unknown:
                    raise RuntimeError(f"Unknown provider option: {unknown.pop()}")
                Session.opened.append(dict(given))
                # operators that the CPU would fuse are the provider's here
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            super().__init__(path, options, providers=[CPU])

        def get_providers(self):
            return [CANN, CPU] if self._cann else [CPU]

        def run(self, names, feeds, *rest):
            found = super().run(names, feeds, *rest)
            return [self._round(value, feeds) for value in found] if self._cann else found

        def _round(self, value, feeds):
            shape = "_".join(str(size) for size in next(iter(feeds.values())).shape)
            if shape not in self._models:
                file = Path(os.getcwd()) / f"CANNExecutionProvider_main_graph_0_{shape}.om"
                if not file.exists():
                    file.write_text(self._given.get("precision_mode", "force_fp16"))
                    Session.compiled.append(file)
                self._models[shape] = file.read_text()
            keeps = self._models[shape] == "must_keep_origin_dtype" and not self.deaf
            return value if keeps else value.astype(np.float16).astype(np.float32)

        def get_provider_graph_assignment_info(self):
            graphs = super().get_provider_graph_assignment_info()
            nodes = [node for graph in graphs for node in graph.get_nodes()]
            if not self._cann:
                return graphs
            parts = {CANN: [node for node in nodes if node.op_type not in self.stray]}
            parts[CPU] = [node for node in nodes if node.op_type in self.stray]
            return [SimpleNamespace(ep_name=name, get_nodes=lambda found=found: found) for name, found in parts.items()]

        def end_profiling(self):
            """One event for all that was compiled whole, one for each operator that strayed."""
            file = super().end_profiling()
            events = json.loads(Path(file).read_text(encoding="utf-8"))
            nodes = [event for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
            strayed = [event for event in nodes if event["args"]["op_name"] in self.stray]
            whole = {
                "provider": CANN,
                "op_name": "CANNExecutionProvider_main_graph_0",
                "output_type_shape": [{"float": [1, 512]}],
            }
            fused = [{"cat": "Node", "args": whole}] if len(strayed) < len(nodes) else []
            Path(file).write_text(json.dumps([*strayed, *fused]), encoding="utf-8")
            return file

    Session.stray, Session.deaf, Session.opened, Session.compiled = tuple(stray), deaf, [], []
    return Session


def install(monkeypatch, stray=(), deaf=False, assignment=True):
    """Put the stand-in in onnxruntime's place; `assignment` off is onnxruntime before 1.24. Returns its class."""
    import onnxruntime

    real = onnxruntime.InferenceSession
    while hasattr(real, "stray"):  # an earlier stand-in
        real = real.__base__
    made = _session_class(real, stray, deaf)
    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CANN, CPU])
    if not assignment or not hasattr(real, ASSIGNMENT):
        for base in made.__mro__:
            if ASSIGNMENT in vars(base):
                monkeypatch.delattr(base, ASSIGNMENT)
    return made


def operators(backend):
    """How many operators a backend says run on each provider."""
    return Counter({name: sum(found.values()) for name, found in backend.placement.operators.items()})
