"""The backends that are open: the reference and one other at most, so that no three hold both towers in memory."""

from __future__ import annotations

import time
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np

from clipval.backends import REFERENCE, Backend, kind
from clipval.errors import BackendUnavailable
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
        open_: opens one, by name, tower and batch size.
        allow_simulated: a simulated device may stand in for a real one.
    """

    def __init__(self, open_: Callable[[str, Tower, int], Backend], *, allow_simulated: bool = False) -> None:
        self._open = open_
        self._allow_simulated = allow_simulated
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
            backend = self._open(name, tower, batch_size)
            backend.identity = backend.identity._replace(name=name)
            self._require_real(backend)
            self._backends[key] = backend
            self.notes.update(dict.fromkeys(f"{name}: {note}" for note in backend.notes))
        return self._backends[key]

    def cold_start(
        self, name: str, tower: Tower, batch: np.ndarray, forget: Callable[[], None] = lambda: None
    ) -> ColdStart:
        """How long a backend takes to open from what lies on the disk, and for its first call.

        Measured once for what one backend serves. Its artifact must be built already, and the libraries imported.

        Args:
            batch: of the first call; forget: called once the backend is closed, to let go of what it was opened from.
        """
        key = _key(name, tower, len(batch))
        if key not in self._cold:
            self.close(name)
            forget()
            backend = self.get(name, tower, len(batch))
            started = time.perf_counter()
            backend.run(batch)
            self._cold[key] = ColdStart(backend.load_seconds, time.perf_counter() - started, len(batch))
        return self._cold[key]

    def busy(self, name: str) -> str:
        """What else uses the device of an open backend, in words; empty for nothing, and where none is open."""
        return next((backend.busy() for key, backend in self._backends.items() if key[0] == name), "")

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

    def _require_real(self, backend: Backend) -> None:
        if backend.identity.simulated and not self._allow_simulated:
            backend.close()
            raise BackendUnavailable(
                f"{backend.identity}: a simulated device passes no gate; use a real one, or give --allow-simulated"
            )


def _key(name: str, tower: Tower, batch_size: int) -> Key:
    """What one open backend serves: one batch size where its artifact has one, else any."""
    return name, tower.name, batch_size if kind(name).fixed_batch else None
