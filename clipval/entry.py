"""The pytest plugin of the installed package: declares clipval's options to runs of a clipval folder, and to no other.

pytest needs to know them before it reads its command line: of `--data-dir DIR` it would otherwise take DIR for tests.
Other projects of the environment have runs and options of their own, so nothing is imported or declared for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    here = Path.cwd()
    if any(_uses_clipval(folder / "conftest.py") for folder in (here, *here.parents)):
        from clipval import options

        options.pytest_addoption(parser)


def _uses_clipval(conftest: Path) -> bool:
    try:
        return "clipval.plugin" in conftest.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
