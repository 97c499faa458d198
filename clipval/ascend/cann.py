"""Where CANN is installed on this host: its folders, the toolkit's version, its operator package."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import List


def toolkit_folders(root: Path = Path("/")) -> List[Path]:
    """Possible CANN folders: the one set by `set_env.sh`, else the usual places, newest first."""
    sourced = [os.environ.get(name, "") for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")]
    folders = [under(root, Path(value)) for value in dict.fromkeys(sourced) if value]
    return folders or [path / "latest" if path.name == "ascend-toolkit" else path for path in _install_folders(root)]


def set_env_files(root: Path = Path("/")) -> List[Path]:
    """The set_env.sh files of this host, preferred first."""
    return [path / "set_env.sh" for path in _install_folders(root) if (path / "set_env.sh").is_file()]


def _install_folders(root: Path) -> List[Path]:
    """From CANN 8.5 on `cann`, a link to e.g. `cann-9.1.0`; up to 8.3 `ascend-toolkit`; system-wide or the user's."""
    found = []
    for base in (Path("/usr/local/Ascend"), Path(os.path.expanduser("~")) / "Ascend"):
        folder = under(root, base)
        versions = sorted(folder.glob("cann-*"), key=lambda path: _numbers(path.name), reverse=True)
        found += [folder / "cann", *versions, folder / "ascend-toolkit"]
    return found


def _numbers(version: str) -> List[int]:
    """`cann-9.1.0` as [9, 1, 0], for comparison."""
    return [int(part) for part in re.findall(r"\d+", version)]


def under(root: Path, path: Path) -> Path:
    """An absolute path, relative to another root."""
    return root / path.relative_to(path.anchor) if path.is_absolute() else root / path


def how_to_source(root: Path = Path("/")) -> str:
    """The command that makes CANN available; one clause."""
    found = set_env_files(root)
    if found:
        return f"run `source {found[0]}` first, in the same shell"
    return "install the CANN toolkit and run `source <its folder>/set_env.sh` in the same shell"


def version(root: Path = Path("/")) -> str:
    """Version of the CANN toolkit, e.g. `8.0.RC3`; `unknown` if no file states it.

    Source: ascend_toolkit_install.info (`version=`), version.cfg (`toolkit_running_version=[7.6.0.1.220:8.0.0]`), and
    share/info/runtime/version.info (`Version=`), which ACL itself reads from CANN 8.5 on.
    """
    for folder in toolkit_folders(root):
        for path in _info_files(folder, "ascend_toolkit_install.info"):
            found = read_value(path, "version")
            if found:
                return found
        for place in (folder, folder.parent):
            running = read_value(place / "version.cfg", "toolkit_running_version")
            if running:
                return running.strip("[]").split(":")[-1]
        found = read_value(folder / "share/info/runtime/version.info", "Version")
        if found:
            return found
    return "unknown"


def operators(root: Path = Path("/")) -> str:
    """CANN's operator package besides the toolkit, e.g. `Ascend-cann-910b-ops 9.1.0`; empty for none.

    Up to CANN 8.3 operators are part of the toolkit or of a kernels package; from 8.5 on atc needs the chip's
    package to compile anything. Source: ascend_ops_install.info of CANN 8.5 to 9.1.
    """
    for folder in toolkit_folders(root):
        for path in _info_files(folder, "ascend_ops_install.info"):
            if path.is_file():
                return " ".join([read_value(path, "package_name") or "ops", read_value(path, "version")]).strip()
    return ""


def needs_operators(toolkit: str) -> bool:
    """Whether this version of the toolkit needs a separate operator package to compile."""
    return _numbers(toolkit)[:2] >= [8, 5]


def _info_files(folder: Path, name: str) -> List[Path]:
    """Where a CANN package stores its version: per architecture, this machine's first."""
    machine = platform.machine()
    arches = sorted(folder.glob("*-linux"), key=lambda path: not path.name.startswith(machine))
    return [place / name for place in (*arches, folder)]


def read_value(path: Path, name: str) -> str:
    """Value of a `name=value` line, ignoring case; empty if file or line is missing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^\s*{re.escape(name)}\s*=\s*(.*?)\s*$", text, re.IGNORECASE | re.MULTILINE)
    return match.group(1) if match else ""
