"""All options: `add_options` declares them for pytest and the command line, `Settings` holds their values."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Type, TypeVar, Union

from clipval import datasets
from clipval.backends import REFERENCE, BackendSettings, kind, names, providers
from clipval.errors import UsageError

OM_RUNTIMES = ("aclruntime", "pyacl")
REFERENCE_DEVICES = ("cpu", "cuda")
DEFAULT_BACKENDS = ("pytorch", "onnx")
CAPTION_FORMATS = ("csv", "clip_benchmark")
# Allowed half-width of the 95 % interval of a row's median, as a share of it, by clock. Not the coefficient of
# variation: a few outliers on a busy host widen that, but do not move a median.
NOISE = {"inference": 0.05, "execute": 0.025}
_NOISE = f"{NOISE['inference']:g}, on a device's own clock {NOISE['execute']:g}"
ONNX_OPTIONS = ("--onnx-providers", "--onnx-provider-options", "--allow-cpu-operators")
Number = TypeVar("Number", int, float)
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
    def of(cls, namespace: object) -> Settings:
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


def expanded(text: str) -> str:
    """With the home folder for a leading `~`, which shells leave as it is in `--option=~/file`."""
    return os.path.expanduser(text)


def to_path(text: str) -> Path:
    return Path(expanded(text))


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
    named = [PROVIDERS.get(part.strip().lower(), part.strip()) for part in text.split(",") if part.strip()]
    found = tuple(dict.fromkeys(named))
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


def at_least(kind: Type[Number], least: float) -> Callable[[str], Number]:
    """A parser of numbers from `least` up to a million."""

    def parse(text: str) -> Number:
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


def listed_devices(text: str) -> Tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"devices {text!r}; expected logic ids from 0, such as 0 or 0,1")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _flags(text: str) -> Tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"atc flags {text!r}: {error}") from None


class Option(NamedTuple):
    """One option; its name and default are those of a field of `Settings`.

    Attributes:
        metavar: of its value; empty for a switch and for `choices`.
        parse: text of the command line -> value.
        choices: what it may be; a function where that is known only when it is declared.
    """

    flag: str
    metavar: str
    help: str
    parse: Callable[[str], object] = str
    choices: Union[Tuple[str, ...], Callable[[], List[str]]] = ()

    @property
    def name(self) -> str:
        """Its field of `Settings`."""
        return self.flag[2:].replace("-", "_")


# The README's table is held to this.
OPTIONS = (
    Option("--spec", "NAME", "what to validate: a shipped spec or a TOML file", expanded),
    Option("--model-name", "NAME", "open_clip architecture or JSON config, instead of the spec's", expanded),
    Option("--pretrained", "W", "weights: tag, file, folder, or random; instead of the spec's", expanded),
    Option("--pretrained-cfg", "TAG", "weight tag of a file's weights, for their transform"),
    Option("--resize-positions", "", "interpolate position embeddings of another size"),
    Option("--data-dir", "DIR", "folder of images with their annotation file", to_path),
    Option("--data-format", "", "kind of data set; default: by content", choices=datasets.names),
    Option("--captions-format", "", "how annotations are read", choices=CAPTION_FORMATS),
    Option("--backends", "LIST", f"of {','.join(names())}; named backends are required", _backends),
    Option("--batch-sizes", "LIST", "batch sizes of throughput, e.g. 1,8,64", _sizes),
    Option("--opset-version", "N", "ONNX opset, 14 to 18", _opset),
    Option("--onnx-providers", "LIST", "execution providers: cpu, cuda, cann, full names", _providers),
    Option("--onnx-provider-options", "OPTIONS", "of the first provider: NAME=VALUE,NAME=VALUE", _provider_options),
    Option("--allow-cpu-operators", "LIST", "operators that may run on the CPU instead, e.g. Gelu", _operators),
    Option("--threads", "N", "CPU threads of pytorch and onnx", at_least(int, 1)),
    Option("--reference-device", "", "device of PyTorch; a GPU is compared with the CPU", choices=REFERENCE_DEVICES),
    Option("--workdir", "DIR", "folder of artifacts and results", to_path),
    Option("--rebuild", "", "build every artifact again"),
    Option("--probe-seed", "N", "seed of the probe inputs; default: a new one in each run", at_least(int, 0)),
    Option("--onnx-prefix", "PREFIX", "ready ONNX files, PREFIX_vision.onnx and PREFIX_text.onnx", to_path),
    Option("--om-dir", "DIR", "ready OM files with the recipe's names", to_path),
    Option("--soc-version", "SOC", "chip, e.g. Ascend910B4; default: from npu-smi"),
    Option("--precision-mode", "MODE", "atc precision mode; default: atc's, fp16"),
    Option("--keep-dtype", "FILE", "atc: operators that keep their dtype", to_path),
    Option("--atc-flags", "FLAGS", "more flags for atc in one string: --atc-flags='--a=1 --b=2'", _flags),
    Option("--jobs", "N", "files that atc compiles in parallel; default: an eighth of the cores", at_least(int, 1)),
    Option("--device-id", "LIST", "NPUs by logic id, e.g. 0 or 0,1; each is validated", listed_devices),
    Option("--om-runtime", "", "runtime of OM files: aclruntime, or pyACL, which comes with CANN", choices=OM_RUNTIMES),
    Option("--device-timeout", "S", "a device call that takes longer ends the run as failed", at_least(float, 1)),
    Option("--allow-health", "", "use an NPU whose health is Alarm or worse"),
    Option("--allow-simulated", "", "let a simulated NPU pass gates"),
    Option("--perf-min-time", "S", "seconds of timed calls per row", at_least(float, 0.01)),
    Option("--perf-max-time", "S", "most seconds per row", at_least(float, 0.01)),
    Option("--perf-noise", "SHARE", f"allowed +- of a row's median; default: {_NOISE}", at_least(float, 0.001)),
    Option("--baseline", "FILE", "throughput must not fall below this baseline", to_path),
    Option("--report", "DIR", "write report.json, report.md, report.html there", to_path),
    Option("--diagnose", "", "report for each failed parity gate where the tower diverges, and why"),
    Option("--gate", "LIST", "judge only these gates, e.g. parity/onnx/text or parity", _listed),
)


def add_options(add: Callable[..., object], only: Optional[List[str]] = None) -> None:
    """Declare options through `argparse.add_argument` or pytest's `addoption`.

    Args:
        only: flags to declare; None declares all.
    """
    defaults = Settings()
    for one in OPTIONS:
        if only is not None and one.flag not in only:
            continue
        default = getattr(defaults, one.name)
        shown = "" if default in (None, False, "", ()) else f" (default: {_show(default)})"
        common = {"dest": one.name, "default": default, "help": one.help + shown}
        if one.choices:
            known = one.choices() if callable(one.choices) else one.choices  # a plugin may add kinds of data sets
            add(one.flag, choices=tuple(known), **common)
        elif one.metavar:
            add(one.flag, type=one.parse, metavar=one.metavar, **common)
        else:
            add(one.flag, action="store_true", **common)


def arguments(settings: Settings) -> List[str]:
    """The settings as a command line, without those that control output: to repeat part of a run."""
    found: List[str] = []
    for one in OPTIONS:
        value = getattr(settings, one.name)
        if value == getattr(Settings(), one.name) or one.name in ("gate", "rebuild", "report"):
            continue
        shown = shlex.join(value) if one.name == "atc_flags" else _show(value)
        found.append(one.flag if value is True else f"{one.flag}={shown}")
    return found


def pytest_addoption(parser: Any) -> None:
    """Declare the options to pytest before it reads its command line; only once per parser."""
    if getattr(parser, "clipval", False):
        return
    parser.clipval = True
    add_options(parser.getgroup("clipval", "clipval: what is validated, and how").addoption)


def _show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
