"""Dump an OM on its NPU in three steps, each in a new process: statistics, ends of blocks, inside the bad part."""

from __future__ import annotations

import re
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

from clipval.ascend import atc, dumping
from clipval.diagnose import dump, fusions, graph, om
from clipval.diagnose.finding import Finding
from clipval.errors import BackendUnavailable, InputError, ToolFailed

BLOCK = re.compile(r".*\.\d+$")  # the path of a numbered module, e.g. `visual.transformer.resblocks.3`
WITHOUT = (
    "without a dump: diagnose --backend onnx checks the graph, a run with another --precision-mode checks the precision"
)


def locate(
    file: Path,
    whole: graph.Graph,
    rows: np.ndarray,
    device: int,
    precision: str,
    candidate: str,
    keep: Optional[Path] = None,
    runtime: str = "aclruntime",
) -> Finding:
    """Where an OM diverges from the ONNX graph that it was compiled from.

    Args:
        rows: one full batch of the OM.
        keep: folder for the dumps; default: a temporary folder, which is deleted.
        runtime: what runs the OM, a name of `--om-runtime`.

    Raises:
        BackendUnavailable: no dump is possible; the message has alternatives.
    """
    take = partial(dumping.dump, file, rows, device, runtime=runtime)
    with _folder(keep) as folder:
        described = _described(file, folder)
        fused = fusions.names(described) if described else {}
        try:
            take(folder / "statistics", stats=True)
            figures = dump.read(folder / "statistics")
            found = _narrow(take, whole, rows, precision, folder, fused)
        except (BackendUnavailable, InputError) as error:
            raise BackendUnavailable(f"{error}. {WITHOUT}") from error
        compared, dumped = found
        dumped.statistics = figures.statistics
        passes = fusions.passes(described) if described else {}
        return om.judge(compared, dumped, precision, candidate, passes, _applied(file))


def _narrow(
    take: Callable[..., np.ndarray],
    whole: graph.Graph,
    rows: np.ndarray,
    precision: str,
    folder: Path,
    fused: Dict[str, List[str]],
) -> Tuple[om.Compared, dump.Dump]:
    """The ends of blocks first; then everything between the last good and the first bad one."""
    ends = block_ends(whole)
    if ends:
        take(folder / "blocks", layers=ends)
        coarse = om.compare(whole, dump.read(folder / "blocks"), rows, precision, fused)
        bad = om.first(coarse)
        if bad is not None:
            good = [name for name, rung in coarse.rungs.items() if rung.good]
            inside = [whole.nodes[n].name for n in whole.between(bad, good)]
            layers = [*inside, *(whole.node_of(name).name for name in good)]
            take(folder / "inside", layers=layers)
            dumped = dump.read(folder / "inside")
            return om.compare(whole, dumped, rows, precision, fused), dumped
    take(folder / "whole")
    dumped = dump.read(folder / "whole")
    return om.compare(whole, dumped, rows, precision, fused), dumped


def block_ends(whole: graph.Graph) -> List[str]:
    """Names of the nodes that compute the output of each numbered block, and of the graph's last node."""
    found = []
    for node in whole.nodes:
        if BLOCK.match(node.module) and any(whole.leaves(name, node.module) for name in node.outputs):
            found.append(node.name)
    return [*found, *(whole.node_of(name).name for name in whole.outputs)] if found else []


def _described(file: Path, folder: Path) -> Optional[Path]:
    """The OM's operators as JSON; None without atc on this host, then the dump's own names are used."""
    try:
        return dumping.as_json(file, folder / "om.json")
    except (BackendUnavailable, ToolFailed):
        return None


def _applied(file: Path) -> Dict[str, int]:
    kept = file.with_name(f"{file.stem}.{atc.FUSION_RESULT}")
    return fusions.applied(kept) if kept.is_file() else {}


@contextmanager
def _folder(keep: Optional[Path]) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="clipval-dump-") as scratch:
        yield Path(scratch)
