"""What a pytest command line promises: the gates that `-m` or `--gate` selects, and which options leave some out."""

from __future__ import annotations

import difflib
import os
import shlex
from pathlib import Path
from typing import Any, List, NamedTuple, Sequence, Tuple

from _pytest.mark.expression import Expression

from clipval import gates, options, report
from clipval.chain import Chain
from clipval.errors import ClipvalError, UsageError
from clipval.run import Account, results_file
from clipval.throughput import baseline


class Line(NamedTuple):
    """The parts of a pytest command line that a promise depends on.

    Attributes:
        option: its parsed options; folder: the working directory; acceptance: the folder of the acceptance tests.
        distributed: several xdist workers run it; timer: pytest-benchmark is loaded.
    """

    option: Any
    folder: Path
    acceptance: Path
    distributed: bool = False
    timer: bool = True


def plan(chain: Chain) -> gates.Plan:
    """What a run validates: what its gates depend on."""
    settings = chain.settings
    trained = chain.subject.trained
    return gates.Plan(chain.spec, settings.validated, chain.batch_sizes, trained, settings.baseline is not None)


def account(chain: Chain, line: Line) -> Account:
    """The record of a run, with what it promises: the gates that `-m` selects.

    Raises:
        UsageError: the options contradict each other or cannot be satisfied; InputError: the spec or baseline is wrong.
    """
    settings, option = chain.settings, line.option
    found = gates.promised(plan(chain))  # reads the spec, so that any run reports a mistake in it as a usage error
    promised = [name for name, gate in found.items() if selects(option.markexpr, gate)]
    chosen = chosen_of(settings.gate, promised) if settings.gate else promised
    kinds = {found[name].kind for name in chosen}
    if settings.baseline is not None:  # read now: a requested comparison is made or fails
        baseline.load(settings.baseline)
        if gates.PERF not in kinds and not settings.gate:
            raise UsageError("--baseline compares throughput, which -m leaves out; add perf to it")
    said, deliberate = _narrowing(line)
    made = Account(promised, results_file(settings.workdir), narrowed_by=["--gate"] * bool(settings.gate) + said)
    made.deliberate = deliberate and not settings.strict
    made.chosen = chosen if settings.gate else None
    made.least = {name: gate.figures for name, gate in found.items()}
    made.always = [name for name in chosen if found[name] is gates.BASELINE]
    made.again = shlex.join(["pytest", *options.arguments(settings)])
    if line.distributed:
        compared = settings.strict or settings.baseline is not None or gates.ACCURACY not in kinds
        if gates.PERF in kinds and compared and not (made.deliberate and settings.baseline is None):
            raise UsageError("throughput cannot be measured by several workers at once; run perf without -n")
        made.promised = [name for name in promised if found[name].kind != gates.PERF]
        made.notes.append("throughput: several workers cannot measure it")
    elif gates.PERF in kinds and not made.deliberate and not option.collectonly:
        _check_timing(line)
    if getattr(option, "benchmark_only", False) and gates.ACCURACY in kinds and not made.deliberate:
        raise UsageError("--benchmark-only skips the accuracy gates, which this run promises; use -m perf")
    return made


def chosen_of(wanted: Sequence[str], promised: Sequence[str]) -> List[str]:
    """The promised gates that `--gate` names, by id or its first parts: `parity`, `parity/onnx`."""
    for one in wanted:
        if not any(f"{name}/".startswith(f"{one}/") for name in promised):
            near = difflib.get_close_matches(one, [*promised, *{name.partition("/")[0] for name in promised}], 3)
            said = f"did you mean {' or '.join(near)}?" if near else f"it has e.g. {', '.join(promised[:3])}"
            raise UsageError(f"--gate {one}: not a gate of this run; {said}")
    return [name for name in promised if any(f"{name}/".startswith(f"{one}/") for one in wanted)]


def check_inputs(chain: Chain, expected: Sequence[str], alone: bool) -> None:
    """Find what is wrong with data, weights and ready ONNX files before the first gate: one error, not one per gate.

    Args:
        expected: ids of the gates to evaluate; the data set is prepared if one of them needs it.
        alone: the gates use this chain; else nothing is left in memory.

    Raises:
        ClipvalError: something is missing, or cannot be read or used.
    """
    used = chain if alone else Chain(chain.settings, chain.store.rebuild_before)
    try:
        _check_inputs(used, expected)
    finally:
        if not alone:
            used.close()


def _check_inputs(used: Chain, expected: Sequence[str]) -> None:
    found = gates.promised(plan(used))
    used.check_inputs()
    for tower in used.towers.values() if used.spec.golden is not None else ():
        used.golden(tower)
    for backend in used.settings.validated:
        if any(f"/{backend}/" in name for name in expected):
            used.open_given(backend)
    try:
        used.model  # noqa: B018  reads the weights into the architecture
        if any(name not in found or found[name].data for name in expected):
            used.prepared  # noqa: B018  decodes every image
    except ClipvalError:
        raise
    except Exception:  # a defect of the code: the gate that meets it has its traceback
        return


def selects(expression: str, gate: gates.Gate) -> bool:
    """Whether `-m` selects the gate's test; true for any expression that pytest itself will reject."""
    try:
        compiled = Expression.compile(expression) if expression else None
    except Exception:  # its class depends on the version of pytest
        return True
    return compiled is None or compiled.evaluate(lambda name, /, **_: name in (gate.kind, "gate"))


def _narrowing(line: Line) -> Tuple[List[str], bool]:
    """Options that leave tests out, and whether one of them asks for part of the run on purpose.

    `--deselect` and `--ignore` are for broken tests; a run that loses promised gates to them fails.
    """
    option = line.option
    said = [f"-k {option.keyword!r}"] if option.keyword else []
    said += [flag for flag, name in (("--lf", "lf"), ("--sw", "stepwise")) if getattr(option, name, False)]
    paths = getattr(option, "file_or_dir", None)  # absent for --help
    if paths and not any(_covers(line, str(name)) for name in paths):
        said.append("the paths given")
    deliberate = bool(said)
    said += [f"--{name.replace('_', '-')}" for name in ("deselect", "ignore", "ignore_glob") if getattr(option, name)]
    return said, deliberate


def _covers(line: Line, argument: str) -> bool:
    """Whether an argument of the command line covers all acceptance tests."""
    acceptance = line.acceptance.resolve()
    return "::" not in argument and (line.folder / argument).resolve() in (acceptance, *acceptance.parents)


def check_outputs(option: Any) -> None:
    """Check now that the files written at the end of a run can be written.

    Raises:
        UsageError: one cannot be written.
    """
    folder, json_file = option.report, getattr(option, "benchmark_json", None)
    # pytest-benchmark 4 has opened the file by now, later versions keep its path
    files = [("--benchmark-json", getattr(json_file, "name", None) if hasattr(json_file, "write") else json_file)]
    files += [("--junitxml", getattr(option, "xmlpath", None)), ("--report", folder and folder / report.JSON)]
    files += [
        ("--benchmark-histogram", f"{prefix}.svg") for prefix in getattr(option, "benchmark_histogram", None) or ()
    ]
    if getattr(option, "benchmark_save", None) or getattr(option, "benchmark_autosave", None):
        storage = str(option.benchmark_storage)
        if storage.startswith("file://") or "://" not in storage:
            files.append(("--benchmark-storage", f"{storage.partition('file://')[2] or storage}/new.json"))
    for flag, name in files:
        if name:
            file = Path(os.path.expanduser(os.path.expandvars(name))).absolute()
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                new = not file.exists()
                with open(file, "ab"):
                    pass
                if new:
                    file.unlink()
            except OSError as error:
                raise UsageError(f"{flag} {file}: cannot be written ({error.strerror or error})") from None


def _check_timing(line: Line) -> None:
    """Throughput is promised, so pytest-benchmark must be loaded and must time."""
    if not line.timer:
        raise UsageError("throughput needs pytest-benchmark, which is not loaded; install it, or use -m accuracy")
    for flag in ("disable", "skip"):
        if getattr(line.option, f"benchmark_{flag}", False):
            raise UsageError(
                f"--benchmark-{flag}: this run promises throughput, which would not be timed; use -m accuracy"
            )
