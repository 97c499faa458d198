"""All options: `add_options` declares them for pytest and the command line, `Settings` holds their values."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from clipval import datasets
from clipval.backends import REFERENCE, BackendSettings, kind, names, providers
from clipval.errors import UsageError

OM_RUNTIMES = ("aclruntime", "pyacl")
DEFAULT_BACKENDS = ("pytorch", "onnx")
CAPTION_FORMATS = ("csv", "clip_benchmark")
# Allowed half-width of the 95 % interval of a row's median, as a share of it, by clock. Not the coefficient of
# variation: a few outliers on a busy host widen that, but do not move a median.
NOISE = {"inference": 0.05, "execute": 0.025}
ONNX_OPTIONS = ("--onnx-providers", "--onnx-provider-options", "--allow-cpu-operators")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "cann": "CANNExecutionProvider"}


@dataclass(frozen=True)
class Settings(BackendSettings):
    """The options of one run. Built once, passed down, never changed; None means the spec's value."""

    spec: str = "shapes"
    model_name: Optional[str] = None
    pretrained: Optional[str] = None
    pretrained_cfg: str = ""
    resize_positions: bool = False
    data_dir: Optional[Path] = None
    data_format: Optional[str] = None
    captions_format: str = "csv"
    backends: Optional[Tuple[str, ...]] = None
    batch_sizes: Optional[Tuple[int, ...]] = None
    opset_version: int = 14
    workdir: Path = Path(".clipval")
    rebuild: bool = False
    probe_seed: Optional[int] = None
    perf_min_time: float = 1.0
    perf_max_time: float = 10.0
    perf_noise: Optional[float] = None
    baseline: Optional[Path] = None
    report: Optional[Path] = None
    diagnose: bool = False
    gate: Optional[Tuple[str, ...]] = None

    @classmethod
    def of(cls, namespace: Any) -> Settings:
        """Settings from an argparse namespace or pytest's `config.option`; missing options keep their defaults."""
        given = {field.name: getattr(namespace, field.name) for field in fields(cls) if hasattr(namespace, field.name)}
        return cls(**given)

    @property
    def validated(self) -> Tuple[str, ...]:
        """Backends that this run validates; the reference is always among them."""
        named = self.backends if self.backends is not None else DEFAULT_BACKENDS
        if len(self.device_id) > 1:  # each device is validated separately
            named = tuple(one for name in named for one in self._on_each_device(name))
        return named if REFERENCE in named else (REFERENCE, *named)

    def _on_each_device(self, name: str) -> List[str]:
        return [f"{name}:{device}" for device in self.device_id] if kind(name).one_session else [name]

    @property
    def strict(self) -> bool:
        """Whether backends were named: then each of their gates must be evaluated, however the run is narrowed."""
        return self.backends is not None


def _backends(text: str) -> Tuple[str, ...]:
    known, given = names(), tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise argparse.ArgumentTypeError(f"unknown backend {(unknown or ['(none)'])[0]!r}; known: {', '.join(known)}")
    return given


def _listed(text: str) -> Tuple[str, ...]:
    given = tuple(dict.fromkeys(part.strip(" /") for part in text.split(",") if part.strip(" /")))
    if not given:
        raise argparse.ArgumentTypeError(f"no gate in {text!r}; expected ids such as parity/onnx/text")
    return given


def _sizes(text: str) -> Tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) > 2048:
        raise argparse.ArgumentTypeError(f"batch sizes {text!r}; expected numbers from 1 to 2048 such as 1,8,64")
    return sizes


def _providers(text: str) -> Tuple[str, ...]:
    found = tuple(PROVIDERS.get(part.strip().lower(), part.strip()) for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"no provider in {text!r}; expected a list such as cpu or cuda,cpu")
    return found


def _provider_options(text: str) -> Tuple[Tuple[str, str], ...]:
    try:
        return providers.parse(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _operators(text: str) -> Tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found or not all(re.fullmatch(r"[A-Za-z]\w*", name) for name in found):
        raise argparse.ArgumentTypeError(f"operators {text!r}; expected ONNX names such as LayerNormalization,Gelu")
    return found


def at_least(kind: Callable[[str], Any], least: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= value < 1e6:
            raise argparse.ArgumentTypeError(f"{text} is out of range, at least {least:g}")
        return value

    return parse


def _opset(text: str) -> int:
    if not text.isdigit() or not 14 <= int(text) <= 18:
        raise argparse.ArgumentTypeError(f"opset {text!r}; torch 2 exports from 14 on, ATC takes up to 18")
    return int(text)


def _devices(text: str) -> Tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"devices {text!r}; expected logic ids from 0, such as 0 or 0,1")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _flags(text: str) -> Tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"atc flags {text!r}: {error}") from None


def table() -> Dict[str, Dict[str, Any]]:
    """Flag -> keyword arguments of `add_argument`; the README's table is held to this."""
    return {
        "--spec": {"metavar": "NAME", "help": "what to validate: a shipped spec or a TOML file"},
        "--model-name": {"metavar": "NAME", "help": "open_clip architecture or JSON config, instead of the spec's"},
        "--pretrained": {"metavar": "W", "help": "weights: tag, file, folder, or random; instead of the spec's"},
        "--pretrained-cfg": {"metavar": "TAG", "help": "the tag that a file's weights are of, for their transform"},
        "--resize-positions": {"action": "store_true", "help": "interpolate position embeddings of another size"},
        "--data-dir": {"type": Path, "metavar": "DIR", "help": "folder of images with their annotation file"},
        "--data-format": {"choices": tuple(datasets.names()), "help": "kind of data set; without it recognised"},
        "--captions-format": {"choices": CAPTION_FORMATS, "help": "how annotations are read"},
        "--backends": {
            "type": _backends,
            "metavar": "LIST",
            "help": f"of {','.join(names())}; named backends are required",
        },
        "--batch-sizes": {"type": _sizes, "metavar": "LIST", "help": "batch sizes of throughput, as 1,8,64"},
        "--opset-version": {"type": _opset, "metavar": "N", "help": "ONNX opset, 14 to 18"},
        "--onnx-providers": {
            "type": _providers,
            "metavar": "LIST",
            "help": "execution providers: cpu, cuda, cann, full names",
        },
        "--onnx-provider-options": {
            "type": _provider_options,
            "metavar": "OPTIONS",
            "help": "of the first provider, as precision_mode=must_keep_origin_dtype,device_id=1",
        },
        "--allow-cpu-operators": {
            "type": _operators,
            "metavar": "LIST",
            "help": "ONNX operators that may compute on the CPU beside another provider, as LayerNormalization,Gelu",
        },
        "--threads": {"type": at_least(int, 1), "metavar": "N", "help": "CPU threads of pytorch and onnx"},
        "--workdir": {"type": Path, "metavar": "DIR", "help": "where artifacts and results are kept"},
        "--rebuild": {"action": "store_true", "help": "build every artifact again"},
        "--probe-seed": {
            "type": at_least(int, 0),
            "metavar": "N",
            "help": "seed of the probe inputs; without it each run draws a new one",
        },
        "--onnx-prefix": {
            "type": Path,
            "metavar": "PREFIX",
            "help": "ready ONNX files of anybody, PREFIX_vision.onnx and PREFIX_text.onnx",
        },
        "--om-dir": {"type": Path, "metavar": "DIR", "help": "ready OM files with the recipe's names"},
        "--soc-version": {"metavar": "SOC", "help": "as Ascend910B4; without it npu-smi is asked"},
        "--precision-mode": {"metavar": "MODE", "help": "of atc; without it atc computes in fp16"},
        "--keep-dtype": {"type": Path, "metavar": "FILE", "help": "of atc: operators that keep their dtype"},
        "--atc-flags": {
            "type": _flags,
            "metavar": "FLAGS",
            "help": "more flags for atc in one string: --atc-flags='--a=1 --b=2'",
        },
        "--jobs": {
            "type": at_least(int, 1),
            "metavar": "N",
            "help": "files that atc compiles at a time; default: an eighth of the cores, at least 1",
        },
        "--device-id": {
            "type": _devices,
            "metavar": "LIST",
            "help": "NPUs by logic id, as 0 or 0,1; each is validated",
        },
        "--om-runtime": {
            "choices": OM_RUNTIMES,
            "help": "what runs OM files: aclruntime, or pyACL, which comes with CANN",
        },
        "--device-timeout": {
            "type": at_least(float, 1),
            "metavar": "S",
            "help": "a device call that takes longer ends the run as failed",
        },
        "--allow-health": {"action": "store_true", "help": "use an NPU whose health is Alarm or worse"},
        "--allow-simulated": {"action": "store_true", "help": "let a simulated NPU pass gates"},
        "--perf-min-time": {"type": at_least(float, 0.01), "metavar": "S", "help": "seconds of timed calls a row"},
        "--perf-max-time": {"type": at_least(float, 0.01), "metavar": "S", "help": "seconds a row at most"},
        "--perf-noise": {
            "type": at_least(float, 0.001),
            "metavar": "SHARE",
            "help": "allowed +- of a row's median; without it "
            f"{NOISE['inference']:g}, on a device's own clock {NOISE['execute']:g}",
        },
        "--baseline": {"type": Path, "metavar": "FILE", "help": "throughput must not fall below this baseline"},
        "--report": {"type": Path, "metavar": "DIR", "help": "write report.json, report.md, report.html there"},
        "--diagnose": {"action": "store_true", "help": "say of each red parity gate where the tower diverges, and why"},
        "--gate": {
            "type": _listed,
            "metavar": "LIST",
            "help": "judge these gates alone, e.g. parity/onnx/text or parity",
        },
    }


def add_options(add: Callable[..., Any], only: Optional[List[str]] = None) -> None:
    """Declare options through `argparse.add_argument` or pytest's `addoption`.

    Args:
        only: flags to declare; None declares all.
    """
    defaults = Settings()
    for flag, keywords in table().items():
        if only is None or flag in only:
            name = flag[2:].replace("-", "_")
            default = getattr(defaults, name)
            shown = "" if default in (None, False, "", ()) else f" (default: {_show(default)})"
            add(flag, **{**keywords, "dest": name, "default": default, "help": keywords["help"] + shown})


def arguments(settings: Settings) -> List[str]:
    """The settings as a command line, without those that control output: to repeat part of a run."""
    found: List[str] = []
    for flag in table():
        name = flag[2:].replace("-", "_")
        value = getattr(settings, name)
        if value == getattr(Settings(), name) or name in ("gate", "rebuild", "report"):
            continue
        shown = shlex.join(value) if name == "atc_flags" else _show(value)
        found.append(flag if value is True else f"{flag}={shown}")
    return found


def pytest_addoption(parser: Any) -> None:
    """Declare the options to pytest before it reads its command line; only once per parser."""
    if getattr(parser, "clipval", False):
        return
    parser.clipval = True
    add_options(parser.getgroup("clipval", "clipval: what is validated, and how").addoption)


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
