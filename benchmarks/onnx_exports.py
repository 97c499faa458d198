"""clipval's ONNX export beside the other public ones, in ONNX Runtime; and the rate that the suite records.

Each way embeds the same batch with the same seeded weights of the whole architecture: clipval's export (opset 14),
torch's two exporters at higher opsets, OpenVINO in fp32 on clipval's file, and optimum's export of transformers' CLIP
of the same sizes, whose weights are its own. `pip install onnxscript openvino` for torch's newer exporter and OpenVINO,
`pip install optimum-onnx transformers` for optimum's; what is missing is named and left out. Then the rate that
`-m perf` would record, in turns with a bare loop over the same session.
"""

import argparse
import contextlib
import inspect
import io
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import side_by_side

from clipval import export, library, model, weights
from clipval.backends.onnx import OnnxBackend
from clipval.throughput.feed import Feed
from clipval.throughput.protocol import Plan, Subject, measure
from clipval.towers import Tower

OPENVINO = "OpenVINO, fp32, clipval's file"
CLOSE = 2e-5  # one element of a unit-length embedding; all ways but optimum's have the same weights


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-name", default="ViT-B-32", help="open_clip architecture; default: %(default)s")
    parser.add_argument("--tower", choices=["vision", "text"], action="append", help="default: both")
    parser.add_argument("--batch-sizes", default="1,8,32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: each runtime's own; 1 counts processor time")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn of the recorded rate; default: 1")


def run(args: argparse.Namespace) -> Dict[str, Any]:
    contract = library.sizes(args.model_name)
    loaded = model.load(args.model_name, weights.find_weights(args.model_name, weights.RANDOM), contract)
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    found: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tower in (contract[name] for name in args.tower or contract):
            ways = exports(loaded, tower, Path(folder) / tower.name, args.threads)
            for size in sizes:
                rows = export.example_rows(tower, size)
                calls = {name: bind(call, rows) for name, call in ways.items()}
                agree(calls)
                print(f"\n{args.model_name} {tower.name}, batch size {size}")
                measured = side_by_side.measure(calls, args.rounds, clock(args))
                side_by_side.show(measured)
                rate = recorded(tower, Path(folder) / tower.name / "clipval.onnx", rows, args)
                print(f"the suite records {rate:.3f} of a bare loop's rate, median of {args.rounds} turns")
                found[f"{tower.name} {size}"] = {"ways": measured, "recorded": rate}
    return found


def clock(args: argparse.Namespace) -> Callable[[], float]:
    """With one thread the processor's time, which leaves out what other processes take of a busy machine."""
    return time.process_time if args.threads == 1 else time.perf_counter


def bind(call: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: call(rows)


def agree(calls: Dict[str, Callable[[], np.ndarray]]) -> None:
    """A way that computes something else is no peer."""
    found = {name: call() for name, call in calls.items() if not name.startswith("optimum")}
    first = next(iter(found.values()))
    far = {name: float(np.abs(other - first).max()) for name, other in found.items()}
    assert max(far.values()) < CLOSE, far


def exports(loaded: Any, tower: Tower, folder: Path, threads: int) -> Dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Every way by name, clipval's first."""
    folder.mkdir()
    ours = folder / "clipval.onnx"
    export.export(loaded, tower, ours, metadata={})
    ways = {"clipval, opset 14": in_onnxruntime(ours, threads)}
    makers: Dict[str, Callable[[], Path]] = {
        **{f"torch TorchScript, opset {n}": partial(by_torch, loaded, tower, folder, n, False) for n in (17, 18)},
        **{f"torch dynamo, opset {n}": partial(by_torch, loaded, tower, folder, n, True) for n in (18, 23)},
        "optimum, transformers' CLIP": partial(by_optimum, tower, folder),
        OPENVINO: lambda: ours,
    }
    for name, make in makers.items():
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                ways[name] = (in_openvino if name == OPENVINO else in_onnxruntime)(make(), threads)
        except Exception as error:  # whatever another exporter raises: it is left out, and said
            print(f"{tower.name}: without {name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return ways


def by_torch(loaded: Any, tower: Tower, folder: Path, opset: int, dynamo: bool) -> Path:
    import torch

    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise RuntimeError(f"torch {torch.__version__} has one exporter")
    file = folder / f"torch-{opset}-{dynamo}.onnx"
    example = torch.from_numpy(export.example_rows(tower, 2))
    dynamic: Dict[str, Any] = {"dynamic_axes": {tower.input_name: {0: "batch"}}}
    if dynamo:
        dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    torch.onnx.export(
        model.encoder(loaded, tower),
        (example,),
        str(file),
        input_names=[tower.input_name],
        output_names=[tower.output_name],
        opset_version=opset,
        dynamo=dynamo,
        **dynamic,
    )
    return file


def by_optimum(tower: Tower, folder: Path) -> Path:
    """Its export of transformers' CLIP of the same sizes, which is ViT-B/32's by default; weights are drawn.

    Its vision tower is exported without the last projection, 0.01 % of the work.
    """
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.exporters.onnx.model_configs import CLIPTextWithProjectionOnnxConfig, CLIPVisionModelOnnxConfig
    from transformers import CLIPConfig, CLIPTextModelWithProjection, CLIPVisionModel

    config = CLIPConfig(projection_dim=512, text_config={"projection_dim": 512}, vision_config={"projection_dim": 512})
    kind, sizes, described = (
        (CLIPVisionModel, config.vision_config, CLIPVisionModelOnnxConfig)
        if tower.name == "vision"
        else (CLIPTextModelWithProjection, config.text_config, CLIPTextWithProjectionOnnxConfig)
    )
    how = {"model": described(sizes, task="feature-extraction")}
    made = folder / "optimum"
    onnx_export_from_model(
        kind(sizes).eval(), made, task="feature-extraction", custom_onnx_configs=how, do_validation=False
    )
    return made / "model.onnx"


def in_onnxruntime(file: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
    kinds = {node.name: dtypes[node.type] for node in session.get_inputs()}

    def call(rows: np.ndarray) -> np.ndarray:
        feeds = {name: np.ones_like(rows) if "mask" in name else rows.astype(kind) for name, kind in kinds.items()}
        return np.asarray(session.run(None, feeds)[0])

    return call


def in_openvino(file: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    # without the hint it takes bf16 on a processor that has it
    options = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(file)), "CPU", options)
    return lambda rows: np.asarray(compiled(rows)[0])


def recorded(tower: Tower, file: Path, rows: np.ndarray, args: argparse.Namespace) -> float:
    """The undisturbed rate that the suite's protocol records, as a share of a bare loop's over one batch, in turns."""
    backend = OnnxBackend(tower, file, threads=args.threads or None)
    bare = in_onnxruntime(file, args.threads)
    data = np.concatenate([rows] * 8)
    now, shares = clock(args), []
    for _ in range(args.rounds):
        ends, times = now() + args.seconds, []
        while now() < ends or len(times) < 3:
            started = now()
            bare(rows)
            times.append(now() - started)
        plan = Plan(seconds=args.seconds, cap=3 * args.seconds, insist=False)
        row, _ = measure(Subject(backend, Feed(data, len(rows)), clock=now, other_clock=now), plan)
        shares.append(row.decided.timing.undisturbed * float(np.percentile(times, 5)) / len(rows))
    backend.close()
    return statistics.median(shares)
