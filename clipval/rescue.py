"""Rescue a run whose process was killed: its figures so far as a summary, a report and a JUnit file.

Written by the watching process. Results are on disk as they come, so only the running check is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Optional

from clipval import promise, report, results, store
from clipval.ascend import watchdog
from clipval.chain import Chain
from clipval.report import Failure


class Rescued(NamedTuple):
    """The run's lines for the terminal, and an exit code if more is known than the process's own."""

    lines: List[str]
    code: Optional[int]


def save(chain: Chain, line: promise.Line, child: int, ended: str, began: float) -> Optional[Rescued]:
    """Write the requested files; None for a run that is not about gates.

    Args:
        chain, line: for the run's options; child: the pid of its process; ended: how that ended, as text.
        began: when the run began, in seconds since the epoch.

    Raises:
        InputError: a file cannot be written.
    """
    account = promise.account(chain, line)
    found = sorted(account.file.parent.glob(f"*-{child}.jsonl"))
    account.figures = results.read(found[-1]) if found else []
    others = "the paths given" in account.narrowed_by
    if not account.figures and (others or not account.expected):
        return None
    account.started = began
    ended = ended.partition("clipval: ")[2] or ended
    account.failures.append(Failure("error", "session", ended))
    run = account.run(chain)
    lines = [report.summary(run, line.option.verbose > 0)]
    lines += [f"figures: {found[-1]}"] if found else []
    if chain.settings.report is not None:
        assets = report.Assets(lambda one: chain.dataset.image_path(one), lambda one: chain.dataset.caption(one))
        lines.append(f"report: {', '.join(map(str, report.write(chain.settings.report, run, assets)))}")
    if getattr(line.option, "xmlpath", None):
        file = Path(line.option.xmlpath).expanduser().absolute()
        store.write(file, report.junit(run, ended))
        lines.append(f"junit: {file}, one case per gate")
    hung = any(one.metric == watchdog.METRIC for one in run.figures)
    return Rescued(lines, 1 if hung else None)
