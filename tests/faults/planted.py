"""A pytest plugin that plants one fault where it would really occur: -p tests.faults.planted, CLIPVAL_FAULT=<name>.

Each fault names the gate that is meant for it and words that the failure must say. Without it nothing changes.
CLIPVAL_BUILD_LOG=<file> notes each artifact that is built, CLIPVAL_ORDER=<seed> shuffles the tests, and
CLIPVAL_DISK_FULL=<kind> fills the disk while such an artifact is made. CLIPVAL_KILLED_BEFORE=<n> kills the process
before its nth shard of embeddings.
"""

from __future__ import annotations

import errno
import os
import random
import signal
from typing import Any

from clipval import store
from tests.faults import (  # noqa: F401  enter their faults into the table
    in_backends,
    in_data,
    in_exports,
    in_inputs,
    in_suite,
    in_timing,
)
from tests.faults.table import FAULTS


def log_builds(file: str) -> None:
    real = store.Store._build

    def build(self: store.Store, folder: Any, key: Any, make: Any, *more: Any) -> None:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(f"{folder.parent.name}/{folder.name}\n")
        real(self, folder, key, make, *more)

    store.Store._build = build  # type: ignore[method-assign]


def fill_disk(kind: str) -> None:
    """Let the build of one kind of artifact write something and then find the disk full."""
    real = store.Store._build

    def build(self: store.Store, folder: Any, key: Any, make: Any, *more: Any) -> None:
        def half(scratch: Any) -> None:
            (scratch / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch / "half"))

        real(self, folder, key, half if key["kind"] == kind else make, *more)

    store.Store._build = build  # type: ignore[method-assign]


def pytest_configure(config: Any) -> None:
    name, log = os.environ.get("CLIPVAL_FAULT"), os.environ.get("CLIPVAL_BUILD_LOG")
    if name:
        FAULTS[name].plant()
    if log:
        log_builds(log)
    if "CLIPVAL_DISK_FULL" in os.environ:
        fill_disk(os.environ["CLIPVAL_DISK_FULL"])
    if "CLIPVAL_KILLED_BEFORE" in os.environ:
        kill_before(int(os.environ["CLIPVAL_KILLED_BEFORE"]))


def kill_before(shard: int) -> None:
    from clipval.shards import files

    real, begun = files.make, []

    def make(*given: Any) -> Any:
        begun.append(given)
        if len(begun) == shard:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    files.make = make  # type: ignore[assignment]


def pytest_collection_modifyitems(items: Any) -> None:
    order = os.environ.get("CLIPVAL_ORDER")
    if order:
        random.Random(int(order)).shuffle(items)
    in_suite.collected(items, os.environ.get("CLIPVAL_FAULT", ""))
