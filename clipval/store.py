"""Artifacts in a work directory, keyed by everything they depend on.

An artifact is a folder `<work>/<kind>/<digest>/` with a `manifest.json`: its full key and the size and sha256 of
each file. It is built in `<digest>.building` under a lock and published by one rename, so a killed, crashed or
disk-full build leaves nothing that a later run would use. It is checked against its manifest once per process.
"""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Set, Tuple, Union

from filelock import FileLock

from clipval.errors import ClipvalError, InputError, disk_full, os_cause

MANIFEST = "manifest.json"
# Paths, errors and options: they do not change what an artifact contains, or their values are part of its key.
NEUTRAL = ("clipval.environment", "clipval.errors", "clipval.spec", "clipval.store")
Build = Callable[[Path], object]
_hashing = [threading.Lock() for _ in range(64)]  # one per file (by hash), so that several files are hashed at a time


def sha256(path: Union[str, Path]) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def once(path: Path) -> str:
    """sha256 of a file, cached while its size and modification time stay the same; threads hash a file only once."""
    found = path.stat()
    with _hashing[hash(path) % len(_hashing)]:
        return _once(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=None)
def _once(path: Path, size: int, changed: int) -> str:
    return sha256(path)


@functools.lru_cache(maxsize=None)
def code_hash(*stages: str) -> str:
    """sha256 over the source of modules and of what they import from this package: changed code means a new artifact.

    Imports for type checking and `NEUTRAL` modules do not count.
    """
    digest = hashlib.sha256()
    for name in sorted(stage_modules(*stages)):
        digest.update(_source(name))
    return digest.hexdigest()


def stage_modules(*stages: str) -> Set[str]:
    """The modules that a stage's result depends on: its own and, directly or indirectly, their imports."""
    found: Set[str] = set()
    left = list(stages)
    while left:
        name = left.pop()
        if name not in found and name not in NEUTRAL:
            found.add(name)
            left += _imports(name, _source(name))
    return found


@functools.lru_cache(maxsize=None)
def _imports(name: str, source: bytes) -> Tuple[str, ...]:
    return tuple(_imported(ast.parse(source), name.partition(".")[0]))


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Modules of the package that are imported anywhere under a node."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):  # most nodes, and no import is in one
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == package)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if _is_module(name)]
            yield from modules if len(modules) == len(inside) else [*modules, str(node.module)]
        yield from _imported(node, package)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not a package
        return False


def _source(name: str) -> bytes:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_bytes()


def files(folder: Path) -> Dict[str, Dict[str, object]]:
    """Size and sha256 of each file of a published artifact, by relative path."""
    found: Dict[str, Dict[str, object]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return found


class Store:
    """The work directory.

    Args:
        root: the work directory; created when needed.
        rebuild_before: artifacts older than this `time.time()` are rebuilt (`--rebuild` passes the start of the run, so
        that several processes of one run build each artifact once). None: use what exists.
    """

    def __init__(self, root: Path, rebuild_before: Optional[float] = None) -> None:
        self.root = root.absolute()
        self.rebuild_before = rebuild_before
        self._checked: Set[Path] = set()
        self._failed: Dict[Path, ClipvalError] = {}

    def check(self) -> None:
        """Check that the work directory can be created and written.

        Raises:
            InputError: it cannot.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=str(self.root)):
                pass
        except OSError as error:
            raise InputError(self._explain(error)) from error

    def get(self, kind: str, key: Mapping[str, object], build: Build, *, resumes: bool = False) -> Path:
        """The folder of an artifact, built by `build(folder)` if it is missing, stale or damaged.

        Args:
            kind: name of the folder's parent.
            key: everything the result depends on, JSON-serialisable.
            build: fills the empty folder that it is given; its exceptions are passed on and nothing is kept. A failed
            build is not retried by this store: the next call raises the same error.
            resumes: `build` continues with what a killed or failed build of the same key left in its folder.

        Raises:
            InputError: the work directory cannot be written or the disk is full.
        """
        whole, folder = self._place(kind, key)
        if folder in self._checked:
            return folder
        if folder in self._failed:
            raise self._failed[folder].with_traceback(None)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(str(folder) + ".lock"):
                if not self._usable(folder, whole):
                    self._build(folder, whole, build, resumes)
        except ClipvalError as error:
            self._failed[folder] = error
            raise
        except OSError as error:
            raise InputError(self._explain(error)) from error
        self._checked.add(folder)
        return folder

    def folder(self, kind: str, key: Mapping[str, object]) -> Path:
        """A folder that a tool fills over time with data that depends only on a key, such as a compiler's cache.

        The key is stored in it. With `rebuild_before` it is emptied once per process.

        Raises:
            InputError: the work directory cannot be written or the disk is full.
        """
        whole, folder = self._place(kind, key)
        if folder in self._checked:
            return folder
        note = folder / MANIFEST
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(str(folder) + ".lock"):
                old = note.is_file() and note.stat().st_mtime < (self.rebuild_before or 0)
                if old:
                    shutil.rmtree(folder)
                folder.mkdir(parents=True, exist_ok=True)
                if not note.is_file():
                    note.write_text(json.dumps({"key": whole}, indent=1), encoding="utf-8")
        except OSError as error:
            raise InputError(self._explain(error)) from error
        self._checked.add(folder)
        return folder

    def _place(self, kind: str, key: Mapping[str, object]) -> Tuple[Dict[str, Any], Path]:
        """The full key of an artifact, and its folder."""
        whole = json.loads(json.dumps({"kind": kind, **key}))
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        return whole, self.root / kind / digest[:32]

    def _usable(self, folder: Path, key: Dict[str, object]) -> bool:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            old = self.rebuild_before is not None and manifest["built"] < self.rebuild_before
            return not old and manifest["key"] == key and manifest["files"] == _list(folder)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _build(self, folder: Path, key: Dict[str, object], build: Build, resumes: bool) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with aside(folder, resumes) as scratch:
            build(scratch)
            manifest = {"key": key, "built": time.time(), "files": _list(scratch)}
            (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            os.replace(str(scratch), str(folder))

    def _explain(self, error: OSError) -> str:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            return f"work directory {self.root}: cannot be written ({error.strerror}); give another --workdir"
        if disk_full(error):
            return f"work directory {self.root}: disk full; free some space or give another --workdir"
        elsewhere = "" if error.errno is None else ", or give another --workdir"
        return f"{os_cause(error)}{elsewhere}"


@contextmanager
def aside(folder: Path, resumes: bool = False) -> Iterator[Path]:
    """A folder next to the target, to be renamed to it when complete.

    It is empty, or with `resumes` holds what an incomplete build left.
    """
    scratch = folder.with_name(f"{folder.name}.building")
    if not resumes:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run
    scratch.mkdir(parents=True, exist_ok=resumes)
    try:
        yield scratch
    finally:
        if not resumes:
            shutil.rmtree(scratch, ignore_errors=True)


def write(file: Path, content: bytes) -> None:
    """Write a file atomically; its folder must exist."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{file.name}.", dir=str(file.absolute().parent))
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(scratch, 0o644)  # mkstemp's files are private; these may be read by others
        os.replace(scratch, str(file))
    except BaseException:
        os.unlink(scratch)
        raise


def _list(folder: Path) -> Dict[str, Dict[str, object]]:
    walked = os.walk(str(folder))
    paths = sorted(os.path.join(where, name) for where, _, names in walked for name in names if name != MANIFEST)

    def describe(path: str) -> Dict[str, object]:
        return {"size": os.path.getsize(path), "sha256": once(Path(path))}

    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        relative = (path[len(str(folder)) + 1 :].replace(os.sep, "/") for path in paths)
        return dict(zip(relative, pool.map(describe, paths)))
