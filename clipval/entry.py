"""The pytest plugin of the installed package: declares clipval's options to runs of a clipval folder, and to no other.

pytest needs them before it reads its command line: it would otherwise take DIR of `--data-dir DIR` for a test path.
For runs of other projects in the same environment nothing is imported or declared.
"""

from __future__ import annotations

from pathlib import Path


def pytest_addoption(parser: object) -> None:
    here = Path.cwd()
    if any(_uses_clipval(folder / "conftest.py") for folder in (here, *here.parents)):
        from clipval import options

        options.pytest_addoption(parser)


def _uses_clipval(conftest: Path) -> bool:
    try:
        return "clipval.plugin" in conftest.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
