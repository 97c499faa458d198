"""Execution providers of ONNX Runtime: their options and the resulting precision. Imports no runtime.

Source: ONNX Runtime's pages on execution providers, and the provider options in the source of 1.24.
"""

from __future__ import annotations

import shlex
from typing import Dict, Mapping, Sequence, Tuple

from clipval.ascend import atc
from clipval.errors import UsageError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CANN, TENSORRT = "CANNExecutionProvider", "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
# CUDA's rounds products to TF32 by default (an option since ONNX Runtime 1.18); fp32 is claimed
DEFAULTS: Dict[str, Dict[str, str]] = {CUDA: {"use_tf32": "0"}}
SHORT = {"TF32": "tf32", "FP16": "fp16", "BF16": "bf16", "FP32": "fp32"}

Options = Tuple[Tuple[str, str], ...]


def parse(text: str) -> Options:
    """`a=1,b="2,3"` as pairs, in the order given.

    Raises:
        UsageError: a part is not NAME=VALUE, or a name is a duplicate.
    """
    reader = shlex.shlex(text, posix=True)
    reader.whitespace, reader.whitespace_split, reader.commenters = ",", True, ""
    try:
        pairs = [tuple(part.strip() for part in token.split("=", 1)) for token in reader]
    except ValueError as error:
        raise UsageError(f"provider options {text!r}: {error}") from None
    if not pairs or any(len(pair) != 2 or not pair[0] for pair in pairs):
        raise UsageError(f"provider options {text!r}: expected NAME=VALUE,NAME=VALUE")
    if len({pair[0] for pair in pairs}) < len(pairs):
        raise UsageError(f"provider options {text!r}: a name is a duplicate")
    return tuple((pair[0], pair[1]) for pair in pairs)


def check(names: Sequence[str], given: Options) -> None:
    """Refuse options that would be ignored without a word.

    Raises:
        UsageError: options are given, and the first provider is the CPU's, which has none.
    """
    if given and names[0] == CPU:
        shown = ",".join(f"{name}={value}" for name, value in given)
        raise UsageError(
            f"--onnx-provider-options {shown}: {CPU} has no options; name their provider: --onnx-providers"
        )


def configured(provider: str, given: Options) -> Dict[str, str]:
    """The options of a provider: our defaults, overridden by those given."""
    return {**DEFAULTS.get(provider, {}), **dict(given)}


def accelerator(provider: str) -> str:
    """What a provider computes on, where it has numbered devices, which its option `device_id` picks: NPU or GPU."""
    return {CANN: "NPU", CUDA: "GPU", TENSORRT: "GPU"}.get(provider, "")


def precision(provider: str, options: Mapping[str, str]) -> str:
    """The precision of a provider with its options: `fp32`, or a word that `precision_class` knows.

    CANN's is an atc precision mode, force_fp16 by default. TensorRT may round to TF32, and no option forbids it.
    OpenVINO's is fp32 on a CPU and fp16 elsewhere. Any other one is assumed to compute in fp32: its results must be
    within the fp32 bounds, which half precision does not reach.

    Raises:
        UsageError: CANN has no such precision mode.
    """
    if provider == CANN:
        mode = options.get("precision_mode_v2") or options.get("precision_mode") or atc.DEFAULT_MODE
        atc.precision_class(mode)
        return mode
    if provider == CUDA:
        return "fp32" if options.get("use_tf32") == "0" else "tf32"
    if provider == TENSORRT:
        halves = [name for name in ("fp16", "bf16", "int8", "fp8") if _on(options.get(f"trt_{name}_enable", "0"))]
        return halves[0] if halves else "tf32"
    if provider == OPENVINO:
        device = options.get("device_type", "CPU").upper()
        asked = options.get("precision", "").upper() or ("FP16" if "GPU" in device or "NPU" in device else "FP32")
        return SHORT.get(asked, asked.lower())
    return "fp32"


OWN = ("bf16", "w8a16", "w8a8")


def precision_class(computes_in: str) -> str:
    """Which tolerance applies: `fp32`, `fp16`, or a ready file's own `bf16`, `w8a16` or `w8a8`.

    TF32 and a provider's int8 round operands to 10 bits or fewer, as fp16 does.
    """
    if computes_in in OWN:
        return computes_in
    return "fp32" if computes_in in ("fp32", *atc.FP32_MODES) else "fp16"


def _on(value: str) -> bool:
    return value.strip().lower() in ("1", "true")
