"""The open backends: at most the reference and one other, so that no third one holds both towers in memory."""

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
    """Cold start of a backend: seconds from its file to ready, and of its first call, at a batch size."""

    load_seconds: float
    first_inference_seconds: float
    batch_size: int


class Pool:
    """Open backends.

    Args:
        made: the chain, which provides what they are built and opened from.
    """

    def __init__(self, made: Materials) -> None:
        self._made = made
        self._expected: Dict[str, Set[Tuple[str, int]]] = {}
        self._backends: Dict[Key, Backend] = {}
        self.notes: Dict[str, None] = {}  # of every backend opened so far, without duplicates
        self._cold: Dict[Key, ColdStart] = {}

    def get(self, name: str, tower: Tower, batch_size: int) -> Backend:
        """An open backend; if its artifact has one batch size, the one for this size.

        Raises:
            BackendUnavailable: the device is simulated, which was not allowed.
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
        """Announce that a backend will be opened for a tower and batch size, to build artifacts in parallel."""
        self._expected.setdefault(base_name(name), set()).add((tower_name, batch_size))

    def sizes(self, name: str) -> Tuple[int, ...]:
        """Batch sizes of a backend's ready files; empty if its files are built."""
        found = kind(name).sizes
        return (found(self._made.settings, list(self._made.towers.values())) or ()) if found else ()

    def smallest_batch(self, name: str) -> int:
        """The smallest batch size of a backend: 1, unless ready files were given and none has it."""
        return min(self.sizes(name), default=1)

    def file(self, name: str, tower: Tower, batch_size: int) -> Optional[Path]:
        """The artifact that a backend opens; None if it opens the model itself."""
        found, expected = kind(name), self._expected.pop(base_name(name), None)
        if found.ahead and expected:
            found.ahead(self._made, [(self._made.towers[one], size) for one, size in sorted(expected)])
        return found.artifact(self._made, tower, batch_size) if found.artifact else None

    def open_file(
        self, name: str, tower: Tower, file: Optional[Path], batch_size: int, *, ready: bool = False
    ) -> Backend:
        """A backend on a given file, which the caller closes; one that opens the model itself needs no file.

        Args:
            ready: the file was provided by the user and need not follow clipval's contract.

        Raises:
            UsageError: the backend needs a file.
        """
        found, number = kind(name), name.partition(":")[2]
        if file is None and found.suffix:
            raise UsageError(f"backend {name} needs --model with an {found.suffix} file")
        device = int(number) if number else self._made.settings.device_id[0]
        return found.open(self._made, Opening(tower, file, batch_size, device, ready))

    def cold_start(self, name: str, tower: Tower, batch: np.ndarray, forget: Callable[[], None]) -> ColdStart:
        """How long a backend takes to open from disk, and for its first call.

        Measured once per open backend; its artifact is built before.

        Args:
            batch: for the first call; forget: releases the model, for a backend that opens the model itself.
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
        """Close the open backend that is not the reference, and the only session that a device may hold.

        The reference closes nothing: a backend stays open while it is compared with the reference.
        """
        if name == REFERENCE:
            return
        for other in {key[0] for key in self._backends} - {REFERENCE}:
            if other != name or kind(name).one_session:
                self.close(other)

    def require_real(self, backend: Backend) -> None:
        """Close a backend on a simulated device and raise, unless that was allowed."""
        if backend.identity.simulated and not self._made.settings.allow_simulated:
            backend.close()
            raise BackendUnavailable(
                f"{backend.identity}: a simulated device passes no gate; use a real one, or give --allow-simulated"
            )


def _key(name: str, tower: Tower, batch_size: int) -> Key:
    """Key of an open backend: with the batch size if its artifact has one, else for any."""
    return name, tower.name, batch_size if kind(name).fixed_batch else None
