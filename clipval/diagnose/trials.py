"""Try other ways to compile an OM: precision modes, and operators kept in their own precision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

from clipval import parity
from clipval.ascend import atc
from clipval.backends import REFERENCE
from clipval.chain import Chain
from clipval.diagnose.finding import NONE, Finding
from clipval.errors import ClipvalError, InputError, UsageError
from clipval.options import Settings
from clipval.results import columns, number
from clipval.retrieval import GATED_K
from clipval.throughput import protocol, rows
from clipval.throughput.feed import Feed
from clipval.towers import Tower

ROUNDS = 4  # lists of operators to try: each may reveal an excess that the previous one hid
TITLES = ("compiled with", "tower", "minimum cosine", "mean cosine", "max |diff|", "bounds", "samples/s", "recall")


class Figures(NamedTuple):
    """A tower compiled one way: parity on all samples, whether it is within the spec's bounds, and its speed.

    `rate` is samples/s, with the row's verdict if it is not VALID.
    """

    minimum: float
    mean: float
    largest: float
    within: bool
    rate: str


@dataclass
class Trial:
    """One way of compiling.

    Attributes:
        name: the precision mode, and how many operators are kept.
        towers: figures by tower; recall: by metric, empty without trained weights; failed: the reason if it failed.
    """

    name: str
    towers: Dict[str, Figures] = field(default_factory=dict)
    recall: Dict[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def good(self) -> bool:
        """Whether every tower is within the spec's bounds."""
        return bool(self.towers) and all(one.within for one in self.towers.values())


def modes(text: str) -> Tuple[str, ...]:
    """Precision modes of a comma list.

    Raises:
        UsageError: atc has no such mode.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for mode in found:
        atc.precision_class(mode)
    if not found:
        raise UsageError("diagnose --precision-modes: expected a list such as force_fp16,allow_mix_precision")
    return found


def trial(settings: Settings, backend: str, towers: Sequence[str]) -> Trial:
    """Compile with these settings, and measure; if it cannot be compiled or run, the trial failed.

    Args:
        towers: names of those to measure; with trained weights all are, since recall needs them.
    """
    found = Trial(_name(settings))
    chain = Chain(settings)
    try:
        picked = list(chain.towers) if chain.subject.trained else list(towers)
        for name in picked:
            found.towers[name] = _figures(chain, backend, chain.towers[name])
        if chain.subject.trained:
            found.recall = chain.retrieval(backend).metrics((1, GATED_K))
    except ClipvalError as error:
        found.failed = str(error)
    finally:
        chain.close()
    return found


def _name(settings: Settings) -> str:
    mode = settings.precision_mode or atc.DEFAULT_MODE
    if settings.keep_dtype is None:
        return mode
    return f"{mode}, {len(read_list(settings.keep_dtype))} operators kept"


def _figures(chain: Chain, backend: str, tower: Tower) -> Figures:
    where, found = chain.embeddings(backend, tower)
    reference = chain.embeddings(REFERENCE, tower).embeddings
    compared = parity.compare(found.ids, reference.values, found.values)
    bounds = chain.bounds(where, tower)
    minimum, mean, largest = float(compared.cosine.min()), float(compared.cosine.mean()), float(compared.max_abs.max())
    within = minimum >= bounds.cosine_min and mean >= bounds.cosine_mean and largest <= bounds.max_abs
    return Figures(minimum, mean, largest, within, _rate(chain, backend, tower))


def _rate(chain: Chain, backend: str, tower: Tower) -> str:
    size, settings = chain.accuracy_batch, chain.settings
    feed = Feed(chain.prepared.rows[tower.name], size)
    # outputs are judged separately: a wrong mode has a speed, too
    subject = rows.subject(chain, chain.backend(backend, tower, size), feed, pace=None, checked=False)
    plan = protocol.Plan(settings.perf_min_time, settings.perf_max_time, noise=settings.perf_noise, insist=False)
    row, _ = protocol.measure(subject, plan)
    judged = row.decided
    said = f"{judged.timing.samples_per_second:.1f} at batch size {size}"
    return said if judged.verdict == "VALID" else f"{said} ({judged.verdict})"


def table(trials: Sequence[Trial]) -> List[str]:
    """The trials for a terminal, one line per way of compiling and tower."""
    lines: List[Sequence[str]] = [TITLES]
    for one in trials:
        if one.failed:
            lines.append((one.name, "", "", "", "", "failed", "", ""))
        recall = ", ".join(
            f"{name.replace('_retrieval_recall', ' R')} {value:.4f}" for name, value in one.recall.items()
        )
        for tower, figures in one.towers.items():
            bounds = "within" if figures.within else "BEYOND"
            cells = [number(figures.minimum, "cosine"), number(figures.mean, "cosine"), f"{figures.largest:.2e}"]
            lines.append((one.name, tower, *cells, bounds, figures.rate, recall or "no trained weights"))
    return [*columns(lines), *(f"{one.name}: {one.failed}" for one in trials if one.failed)]


def keep(
    settings: Settings, backend: str, tower: str, found: Finding, file: Path, look: Callable[[Settings], Finding]
) -> Tuple[Finding, str]:
    """Write a list of operators to keep in their own precision, compile with it and diagnose again, a few times.

    Args:
        found: with the current settings; file: the list, for atc's `--keep_dtype`.
        look: diagnoses the OM of other settings.

    Returns:
        the last finding, and a message: confirmed or not.

    Raises:
        UsageError: no operator of the OM is wrong, or the precision mode keeps everything anyway.
    """
    if not found.keep:
        raise UsageError(f"diagnose --try-keep-dtype: no operator of the {tower} tower's OM has an excess")
    names: List[str] = []
    for _ in range(ROUNDS):
        fresh = [name for name in found.keep if name not in names]
        if not fresh:
            break
        names += fresh
        write_list(file, names)
        found = look(replace(settings, keep_dtype=file.absolute()))
        if found.verdict == NONE:
            return found, f"confirmed: with --keep-dtype {file} ({len(names)} operators) there is no excess"
    return found, (
        f"not confirmed: with --keep-dtype {file} ({len(names)} operators) it still diverges, so precision is not the "
        f"cause, or not the only one: {found.sentence}"
    )


def write_list(file: Path, names: Sequence[str]) -> None:
    """A file for `--keep_dtype`: one name of the original model per line (CANN's user guide of atc).

    Raises:
        InputError: it cannot be written.
    """
    try:
        file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from error


def read_list(file: Path) -> List[str]:
    """Names in such a file."""
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
