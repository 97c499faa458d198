"""ONNX -> OM for one tower, batch size and precision. The only module that runs atc.

Compiling needs CANN but no NPU. Source of flags, verdict and file names: atc_flags.cc, main_impl.cc and
model_helper.cc of the graph engine (GE), and its user guide of atc.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Set, Tuple

from clipval.ascend import atc_advice, cann
from clipval.errors import BackendUnavailable, InputError, ToolFailed, UsageError
from clipval.store import once
from clipval.towers import Tower

DEFAULT_MODE = "force_fp16"  # atc's default without a precision flag; source: GE atc_flags
MODES = (
    "force_fp16",
    "force_fp32",
    "cube_fp16in_fp32out",
    "allow_fp32_to_fp16",
    "must_keep_origin_dtype",
    "allow_mix_precision",
    "allow_mix_precision_fp16",
    "allow_mix_precision_bf16",
    "allow_fp32_to_bf16",
)
MODES_V2 = ("fp16", "origin", "mixed_float16", "mixed_bfloat16", "mixed_hif8", "cube_hif8")
FP32_MODES = ("force_fp32", "must_keep_origin_dtype", "origin")
KEEPS_ORIGIN = ("must_keep_origin_dtype", "origin")
SUCCESS = "ATC run success"
OURS = ("framework", "model", "output", "input_format", "input_shape", "log", "soc_version")
OURS_BY_OPTION = {
    "precision_mode": "--precision-mode",
    "precision_mode_v2": "--precision-mode",
    "keep_dtype": "--keep-dtype",
}
# These do not produce an OM of one static batch size.
REFUSED = ("mode", "om", "json", "singleop", "help", "h", "dynamic_batch_size", "dynamic_image_size", "dynamic_dims",
           "input_shape_range")  # fmt: skip

_running: Set[subprocess.Popen[bytes]] = set()
_starting = threading.Lock()  # held while starting an atc, so that `stop` misses none
_ended = threading.Event()


FUSION_RESULT = "fusion_result.json"  # in atc's working directory: the fusion passes and how often each was applied


@dataclass(frozen=True)
class AtcOptions:
    """atc's options besides tower and batch size.

    Attributes:
        soc_version: the chip that the OM will run on, e.g. `Ascend910B4`.
        precision_mode: a value of `--precision_mode` or `--precision_mode_v2`; empty for atc's default, fp16.
        keep_dtype: file of operators that keep their dtype; empty for none.
        extra: further atc flags, e.g. `("--op_select_implmode=high_precision",)`.
        timeout_seconds: after which atc is killed; minutes per model are normal, more on aarch64 hosts.

    Raises:
        UsageError: an unknown precision mode, or an extra flag that clipval sets itself.
        InputError: the keep_dtype file is missing.
    """

    soc_version: str
    precision_mode: str = ""
    keep_dtype: str = ""
    extra: Tuple[str, ...] = ()
    timeout_seconds: float = 3600

    def __post_init__(self) -> None:
        if not re.fullmatch(r"Ascend[\w-]+", self.soc_version):
            raise UsageError(f"soc version {self.soc_version!r}: expected a chip such as Ascend910B4 or Ascend310P3")
        precision_class(self.precision_mode)
        if self.keep_dtype and self.precision_mode in KEEPS_ORIGIN:
            raise UsageError(f"--keep-dtype has no effect with precision mode {self.precision_mode}; drop one of them")
        if self.keep_dtype and not Path(self.keep_dtype).is_file():
            raise InputError(f"--keep-dtype {self.keep_dtype}: no such file")
        _check_extra(self.extra)


def _check_extra(extra: Iterable[str]) -> None:
    for position, token in enumerate(extra):
        name = token.lstrip("-").split("=", 1)[0]
        if not token.startswith("-") and position == 0:
            raise UsageError(f"atc flags: {token!r} is not a flag; expected --name=value")
        if not token.startswith("-"):
            continue
        if name in OURS:
            raise UsageError(f"atc flag --{name}: clipval sets it itself; drop it from --atc-flags")
        if name in OURS_BY_OPTION:
            raise UsageError(f"atc flag --{name}: give it as {OURS_BY_OPTION[name]}, not in --atc-flags")
        if name in REFUSED:
            raise UsageError(
                f"atc flag --{name}: does not produce an OM of one static batch size; drop it from --atc-flags"
            )


def precision_class(precision_mode: str) -> str:
    """`fp16` or `fp32`: which tolerance applies to a precision mode.

    A mode that may round an operand of a product to 16 bits is `fp16`, bf16 and mixed modes included.

    Raises:
        UsageError: atc has no such mode.
    """
    if precision_mode and precision_mode not in (*MODES, *MODES_V2):
        raise UsageError(f"precision mode {precision_mode!r}: expected one of {', '.join((*MODES, *MODES_V2))}")
    return "fp32" if precision_mode in FP32_MODES else "fp16"


def command(onnx: Path, output: Path, tower: Tower, batch_size: int, options: AtcOptions) -> List[str]:
    """atc's command line, with the recipe's flags.

    Args:
        output: path of the OM, without its suffix.
    """
    shape = ",".join(str(size) for size in tower.shape(batch_size))
    return [
        "atc",
        "--framework=5",
        f"--model={onnx.absolute()}",
        f"--output={output.absolute()}",
        f"--input_format={tower.layout}",
        f"--input_shape={tower.input_name}:{shape}",
        "--log=error",
        f"--soc_version={options.soc_version}",
        *_precision_flags(options),
        *(_absolute(token) for token in options.extra),
    ]


def _precision_flags(options: AtcOptions) -> Iterator[str]:
    if options.precision_mode:
        flag = "precision_mode_v2" if options.precision_mode in MODES_V2 else "precision_mode"
        yield f"--{flag}={options.precision_mode}"
    if options.keep_dtype:
        yield f"--keep_dtype={Path(options.keep_dtype).absolute()}"


def _absolute(token: str) -> str:
    """A file named in an extra flag, made absolute: atc runs in its own directory."""
    flag, equals, value = token.partition("=") if token.startswith("-") else ("", "", token)
    return f"{flag}{equals}{Path(value).absolute()}" if value and Path(value).is_file() else token


def key(tower: Tower, batch_size: int, options: AtcOptions) -> Dict[str, object]:
    """Everything that an OM depends on besides the ONNX file: flags, the files they name, chip, atc."""
    flags = command(Path("model.onnx"), Path("model"), tower, batch_size, options)
    flags = [flag for flag in flags[1:] if not flag.startswith(("--model=", "--output="))]
    program = shutil.which("atc")
    return {
        "flags": flags,
        "files": {value: once(Path(value)) for value in _named_files(flags)},
        "soc": options.soc_version,
        "cann": cann.version(),
        "atc": once(Path(program)) if program else "absent",
    }


def _named_files(flags: Iterable[str]) -> List[str]:
    values = [flag.split("=", 1)[-1] for flag in flags]
    return [value for value in values if os.path.isabs(value) and Path(value).is_file()]


def compile_om(
    onnx: Path,
    output_folder: Path,
    name: str,
    tower: Tower,
    batch_size: int,
    options: AtcOptions,
    *,
    logs_folder: Optional[Path] = None,
) -> Path:
    """Compile one OM.

    atc runs in a scratch directory below `output_folder`, since it leaves `kernel_meta` in its working directory.

    Args:
        name: of the OM, without suffix; also of its log.
        logs_folder: where `<name>.log` is kept, on success and on failure; None for `output_folder`.

    Returns:
        `output_folder/<name>.om`.

    Raises:
        BackendUnavailable: there is no atc on PATH.
        InputError: the ONNX file is missing.
        ToolFailed: atc failed, took too long, or wrote no OM; the message has advice and the log's path.
    """
    program = _program(onnx)
    logs = logs_folder or output_folder
    for folder in (logs, output_folder):
        folder.mkdir(parents=True, exist_ok=True)
    log = (logs / f"{name}.log").absolute()
    where = f"atc, {tower.name} tower, batch size {batch_size}"
    scratch = Path(tempfile.mkdtemp(prefix="atc-", dir=str(output_folder)))
    try:
        arguments = command(onnx, scratch / "out" / name, tower, batch_size, options)
        (scratch / "out").mkdir()
        code = _execute([program, *arguments[1:]], scratch, log, options.timeout_seconds)
        made = _verdict(code, scratch / "out", name, log, where, options.timeout_seconds)
        passes = scratch / FUSION_RESULT
        if passes.is_file():
            passes.replace(output_folder / f"{name}.{FUSION_RESULT}")
        made.chmod(0o640)  # ais_bench rejects an OM that others can write to
        return made.replace(output_folder / f"{name}.om")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _program(onnx: Path) -> str:
    program = shutil.which("atc")
    if program is None:
        raise BackendUnavailable(f"atc: not found on PATH; {cann.how_to_source()}")
    if not onnx.is_file():
        raise InputError(f"ONNX {onnx}: no such file; export it first")
    return program


def _execute(arguments: List[str], folder: Path, log: Path, timeout_seconds: float) -> Optional[int]:
    """Exit code; None on timeout. The log gets the command line, then the output."""
    with open(log, "wb") as stream:
        stream.write((" ".join(arguments) + "\n").encode())
        stream.flush()
        with _starting:
            if _ended.is_set():
                raise ToolFailed("atc: not started, since the run was interrupted")
            process = subprocess.Popen(
                arguments,
                cwd=str(folder),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "ASCEND_SLOG_PRINT_TO_STDOUT": "1"},  # else details go to $HOME/ascend/log
                start_new_session=True,
            )
            _running.add(process)
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _running.discard(process)
            _kill_group(process)


def stop() -> None:
    """End every atc that other threads run or are about to start, for an interrupted run.

    Their `compile_om` then raises ToolFailed, until `resume`.
    """
    with _starting:
        _ended.set()
        for process in list(_running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def resume() -> None:
    """Allow atc to be started again."""
    _ended.clear()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End atc with its compile workers, also if the run was interrupted."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(code: Optional[int], folder: Path, name: str, log: Path, where: str, timeout_seconds: float) -> Path:
    """The new OM. Exit code, success marker and file must all be right: each alone can be misleading."""
    _, _, text = log.read_text(encoding="utf-8", errors="replace").partition("\n")  # without the command line
    if code is None:
        raise ToolFailed(
            f"{where}: killed after {timeout_seconds:g} s; give it more time, or set "
            f"TE_PARALLEL_COMPILER to the number of free cores. Log: {log}"
        )
    if code != 0 or SUCCESS not in text:
        found = f"exit code {code}" if code else f"exit code 0, but no {SUCCESS!r} in its output"
        raise ToolFailed(f"{where}: {found}; {atc_advice.advice(text, cann.how_to_source())}. Log: {log}")
    # If it embeds an operator library, atc adds system and architecture: NAME_linux_x86_64.om.
    made = [path for path in folder.glob("*.om") if re.fullmatch(re.escape(name) + r"(_[a-z]+_\w+)?\.om", path.name)]
    if len(made) != 1 or made[0].stat().st_size == 0:
        listed = (
            ", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in sorted(folder.iterdir())) or "nothing"
        )
        raise ToolFailed(f"{where}: reports success, but wrote {listed} instead of {name}.om. Log: {log}")
    notes = atc_advice.notes(text)
    if notes:
        with open(log, "a", encoding="utf-8") as stream:
            stream.writelines(f"clipval: {note}\n" for note in notes)
    return made[0]
