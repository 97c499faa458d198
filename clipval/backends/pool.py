"""The backends that are open: the reference and one other at most, so that no three hold both towers in memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Dict, NamedTuple, Optional, Set, Tuple

import numpy as np

from clipval.backends import REFERENCE, Backend, Materials, Opening, base_name, kind
from clipval.errors import BackendUnavailable, UsageError
from clipval.towers import Tower

Key = Tuple[str, str, Optional[int]]


class ColdStart(NamedTuple):
    """A backend that was opened again: seconds from its file to ready, and of its first call, at a batch size."""

    load_seconds: float
    first_inference_seconds: float
    batch_size: int


class Pool:
    """Open backends.

    Args:
        made: what they are built of and opened from.
    """

    def __init__(self, made: Materials) -> None:
        self._made = made
        self._expected: Dict[str, Set[Tuple[str, int]]] = {}
        self._backends: Dict[Key, Backend] = {}
        self.notes: Dict[str, None] = {}  # of every backend that was opened, each once, in order
        self._cold: Dict[Key, ColdStart] = {}

    def get(self, name: str, tower: Tower, batch_size: int) -> Backend:
        """An open backend; where its artifact has one batch size, one that takes just this.

        Raises:
            BackendUnavailable: the device is a simulated one, which was not allowed.
        """
        key = _key(name, tower, batch_size)
        if key not in self._backends:
            self._make_room(name)
            backend = self.open_file(name, tower, self.file(name, tower, batch_size), batch_size)
            backend.identity = backend.identity._replace(name=name)
            self.require_real(backend)
            self._backends[key] = backend
            self.notes.update(dict.fromkeys(f"{name}: {note}" for note in backend.notes))
        return self._backends[key]

    def expect(self, name: str, tower_name: str, batch_size: int) -> None:
        """Say that a backend will be opened for a tower and batch size, so that artifacts are built side by side."""
        self._expected.setdefault(base_name(name), set()).add((tower_name, batch_size))

    def sizes(self, name: str) -> Tuple[int, ...]:
        """Batch sizes of the ready files that were given for a backend; empty where its files are built."""
        found = kind(name).sizes
        return (found(self._made.settings, list(self._made.towers.values())) or ()) if found else ()

    def smallest_batch(self, name: str) -> int:
        """The smallest batch size that a backend has: 1, unless ready files were given and none is of it."""
        return min(self.sizes(name), default=1)

    def file(self, name: str, tower: Tower, batch_size: int) -> Optional[Path]:
        """The artifact that a backend opens; None where it opens the model itself."""
        found, expected = kind(name), self._expected.pop(base_name(name), None)
        if found.ahead and expected:
            found.ahead(self._made, [(self._made.towers[one], size) for one, size in sorted(expected)])
        return found.artifact(self._made, tower, batch_size) if found.artifact else None

    def open_file(
        self, name: str, tower: Tower, file: Optional[Path], batch_size: int, *, ready: bool = False
    ) -> Backend:
        """A backend on a given file, which the caller closes; one that opens the model itself needs no file.

        Args:
            ready: the file is somebody's own, which need not look as clipval's does.

        Raises:
            UsageError: the backend needs a file.
        """
        found, number = kind(name), name.partition(":")[2]
        if file is None and found.suffix:
            raise UsageError(f"backend {name} needs --model with an {found.suffix} file")
        device = int(number) if number else self._made.settings.device_id[0]
        return found.open(self._made, Opening(tower, file, batch_size, device, ready))

    def cold_start(self, name: str, tower: Tower, batch: np.ndarray, forget: Callable[[], None]) -> ColdStart:
        """How long a backend takes to open from what lies on the disk, and for its first call.

        Measured once for what one backend serves; its artifact is built before.

        Args:
            batch: of the first call; forget: lets go of the model, for a backend that opens the model itself.
        """
        key = _key(name, tower, len(batch))
        if key not in self._cold:
            if self.file(name, tower, len(batch)) is None:
                forget()
            self.close(name)
            backend = self.get(name, tower, len(batch))
            started = time.perf_counter()
            backend.run(batch)
            self._cold[key] = ColdStart(backend.load_seconds, time.perf_counter() - started, len(batch))
        return self._cold[key]

    def close(self, only: Optional[str] = None) -> None:
        """Close the backends, or those of one name."""
        for key in [key for key in self._backends if only in (None, key[0])]:
            self._backends.pop(key).close()

    def _make_room(self, name: str) -> None:
        """Close the backend that was open besides the reference, and the only session that a device may hold.

        The reference itself needs no room: what is measured stays open while it is held to the reference.
        """
        if name == REFERENCE:
            return
        for other in {key[0] for key in self._backends} - {REFERENCE}:
            if other != name or kind(name).one_session:
                self.close(other)

    def require_real(self, backend: Backend) -> None:
        """Close a backend on a simulated device, and say so, where that was not allowed."""
        if backend.identity.simulated and not self._made.settings.allow_simulated:
            backend.close()
            raise BackendUnavailable(
                f"{backend.identity}: a simulated device passes no gate; use a real one, or give --allow-simulated"
            )


def _key(name: str, tower: Tower, batch_size: int) -> Key:
    """What one open backend serves: one batch size where its artifact has one, else any."""
    return name, tower.name, batch_size if kind(name).fixed_batch else None
