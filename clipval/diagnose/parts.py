"""Parts of a tower on a backend: extract a fault, and check later whether it is still there."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import List, Optional, Tuple

import numpy as np

from clipval import backends, options
from clipval.ascend.atc import DEFAULT_MODE
from clipval.backends import BackendSettings, Identity
from clipval.chain import Chain
from clipval.diagnose.bundle import Bundle, total, write
from clipval.diagnose.candidate import precision_of
from clipval.diagnose.finding import Finding
from clipval.diagnose.twin import PRECISIONS
from clipval.errors import UsageError
from clipval.towers import Tower


class Runner:
    """Runs small ONNX files on a backend; if it takes no ONNX, they are compiled first.

    Attributes:
        identity: of the last run; None before.

    Raises:
        UsageError: the backend opens no files.
    """

    def __init__(self, chain: Chain, backend: str) -> None:
        self._chain, self._backend, self._kind = chain, backend, backends.kind(backend)
        self.identity: Optional[Identity] = None
        if not self._kind.takes_onnx and self._kind.compiled is None:
            raise UsageError(f"diagnose: backend {backend} cannot run a part of a graph; onnx and om can")

    def __call__(self, file: Path, part: Tower, rows: np.ndarray) -> np.ndarray:
        """Outputs of one batch; see `clipval.backends.pool.Pool.open_file` for errors."""
        chain, compiled = self._chain, self._kind.compiled
        with tempfile.TemporaryDirectory(prefix="clipval-part-") as scratch:
            made = compiled(chain.settings, file, Path(scratch), part, len(rows)) if compiled else file
            opened = chain.pool.open_file(self._backend, part, made, len(rows), ready=True)
            try:
                chain.pool.require_real(opened)
                self.identity = opened.identity
                return np.asarray(opened.run(rows))
            finally:
                opened.close()

    @property
    def precision(self) -> str:
        """The backend's precision: `fp32`, `fp16`, `bf16`, ..."""
        assert self.identity is not None  # something was run
        if self._kind.dumped:
            return precision_of(self._chain.settings.precision_mode or DEFAULT_MODE)
        return self._chain.precision(self.identity)


def bundle(chain: Chain, backend: str, finding: Finding, folder: Path) -> str:
    """Write the bundle of a finding; returns a message. See `clipval.diagnose.bundle.write` for errors."""
    runs = finding.material is not None and finding.material.runtime
    found = write(folder, finding, [f"--backend={backend}", *_options(chain)], Runner(chain, backend) if runs else None)
    nodes, size = len(found.part.model.graph.node), total(folder)
    return f"bundle {folder}: {nodes} nodes from {found.part.source} to {found.part.target}, {size / 2**20:.1f} MiB"


def replay(chain: Chain, backend: str, folder: Path) -> Tuple[bool, str]:
    """Whether a bundle still shows its fault on a backend, and a message."""
    read, run = Bundle(folder), Runner(chain, backend)
    error = read.error(run)
    limit = read.limit(run.precision)
    still = not error <= limit
    word = "still shows" if still else "no longer shows"
    said = f"bundle {folder}: {word} on {run.identity}: output {error:.2e} off"
    costs = run.precision if run.precision in PRECISIONS else read.precision  # see `Bundle.limit`
    return still, f"{said}, up to {limit:.1e} is what {costs} costs. It was sent for: {read.sentence}"


def _options(chain: Chain) -> List[str]:
    """Options of the run that affect the backend's computation."""
    own = {"--" + one.name.replace("_", "-") for one in fields(BackendSettings)} - {
        "--onnx-prefix",
        "--om-dir",
        "--jobs",
    }
    return [one for one in options.arguments(chain.settings) if one.partition("=")[0] in own]
