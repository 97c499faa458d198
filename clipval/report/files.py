"""A run as files: report.json for programs, report.md for tickets, report.html for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping

import msgspec

from clipval import store
from clipval.errors import InputError
from clipval.report import panels, tables
from clipval.report.causes import broken, causes
from clipval.report.panels import Assets, Gallery
from clipval.report.run import JSON, Run, flat, made_by
from clipval.report.wording import added, backend, cell, difference, name, row_verdict, simulated
from clipval.results import FAIL, INFO, Figure, PairedDetail, RecallDetail, ThroughputDetail, number, wanted

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parents[1] / "templates"
MARKDOWN, HTML = "report.md", "report.html"


def write(folder: Path, run: Run, assets: Assets) -> List[Path]:
    """Write report.json, report.md and report.html, each atomically.

    Args:
        assets: how to find pictures and captions of samples; `Assets()` shows none.

    Raises:
        InputError: the folder cannot be written.
    """
    texts: Dict[str, Callable[[], str]] = {
        JSON: lambda: _encode(run),
        MARKDOWN: lambda: markdown(run),
        HTML: lambda: page(run, assets),
    }
    written = []
    for file, make in texts.items():  # the figures first, so that they are saved before anything is drawn
        path = folder / file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store.write(path, make().encode())
        except OSError as error:
            raise InputError(f"report {path}: cannot be written ({error.strerror or error})") from error
        written.append(path)
    return written


def _encode(run: Run) -> str:
    return msgspec.json.format(msgspec.json.encode(run, enc_hook=_plain), indent=1).decode() + "\n"


def _plain(value: object) -> object:
    """A numpy value as a Python one; anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def markdown(run: Run) -> str:
    """report.md: verdict, failures, the recipe's two tables, every figure, environment."""
    environment = _environment(autoescape=False, finalize=cell)
    return _render(environment, "report.md.j2", run, {})


def page(run: Run, assets: Assets) -> str:
    """report.html: one file without network access or scripts."""
    environment = _environment(autoescape=True)
    gallery = Gallery(assets)
    more = {
        "glance": panels.glance(run.figures, run.missing),
        "parity": panels.parity_panels(run.figures, gallery),
        "ladders": panels.ladder_panels(run.figures),
        "recall_plots": panels.recall_panels(run.figures),
        "throughput_plots": panels.throughput_panels(run.figures),
        "paired": panels.paired_panels(run.figures, gallery),
    }
    return _render(environment, "report.html.j2", run, more)


def _environment(**more: Any) -> jinja2.Environment:
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    strict = jinja2.StrictUndefined  # an unknown name is an error instead of empty text
    return jinja2.Environment(loader=loader, undefined=strict, trim_blocks=True, lstrip_blocks=True, **more)


def _render(environment: jinja2.Environment, template: str, run: Run, more: Mapping[str, object]) -> str:
    for word in (added, number, wanted, difference, backend, name, row_verdict):
        environment.filters[word.__name__] = word
    environment.filters["tidy"] = _tidy
    environment.tests["simulated"] = simulated
    failed = {figure.gate for figure in run.figures if figure.verdict == FAIL}
    gates = {figure.gate for figure in run.figures if figure.verdict != INFO}
    text: str = environment.get_template(template).render(
        run=run,
        causes=causes(run.figures),
        broken=broken(run),
        gates=len(gates | set(run.missing)),
        passed=len(gates - failed - set(run.missing)),
        simulated=sorted({backend(one) for one in run.figures if simulated(one)}),
        recall=tables.recall_table(run.figures),
        pairs=[figure for figure in run.figures if isinstance(figure.detail, PairedDetail)],
        rates=tables.rates(run.figures),
        throughput=tables.throughput_table(run.figures),
        sources=_sources(run.figures),
        surroundings=flat({**run.environment, "options": run.options, "backends": made_by(run.figures)}),
        **more,
    )
    return text


def _tidy(text: str) -> str:
    """Typographic signs instead of the terminal's ASCII."""
    for plain, printed in ((">=", "≥"), ("<=", "≤"), ("+-", "±"), (" - ", " \N{MINUS SIGN} ")):
        text = text.replace(plain, printed)
    return text


def _sources(figures: Iterable[Figure]) -> List[str]:
    """Sources of references and published figures, without duplicates."""
    found: Dict[str, None] = {}
    for figure in figures:
        found[figure.source] = None
        if isinstance(figure.detail, RecallDetail):
            found.update(dict.fromkeys(one.source for one in figure.detail.published))
        elif isinstance(figure.detail, ThroughputDetail) and figure.detail.published is not None:
            found[figure.detail.published.source] = None
    return [source for source in found if source]
