"""A pytest plugin that notes what a run builds, hashes, loads and opens, in the file CLIPVAL_COUNTS."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from clipval import model, store
from clipval.backends.om import OmBackend
from clipval.backends.onnx import OnnxBackend


def note(what: str, which: Any) -> None:
    with open(os.environ["CLIPVAL_COUNTS"], "a", encoding="utf-8") as stream:
        stream.write(f"{what} {which}\n")


def before(owner: Any, name: str, said: Any) -> None:
    """Let a function note something of its arguments before it does its work."""
    real = getattr(owner, name)

    def noted(*arguments: Any, **more: Any) -> Any:
        note(*said(*arguments, **more))
        return real(*arguments, **more)

    setattr(owner, name, noted)


def pytest_configure(config: Any) -> None:
    before(store.Store, "_build", lambda self, folder, *more: ("built", f"{folder.parent.name}/{folder.name}"))
    real = store.sha256
    for module in [one for name, one in sys.modules.items() if name.startswith("clipval")]:
        if getattr(module, "sha256", None) is real:
            before(module, "sha256", lambda path: ("hashed", Path(path)))
    before(model, "load", lambda *arguments, **more: ("loaded", "model"))
    before(OnnxBackend, "_load", lambda self, *arguments: ("opened", self._file))
    before(OmBackend, "__init__", lambda self, tower, om, *more: ("opened", om))
