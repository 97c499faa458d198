"""The house's order: imports point left, heavy libraries are imported late and in one module each."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clipval

PACKAGE = Path(clipval.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HOMES = {
    "open_clip": {"library.py"},
    "onnx": {
        *("export.py", "backends/onnx.py", "backends/given.py"),
        *("diagnose/graph.py", "diagnose/twin.py", "diagnose/cut.py", "diagnose/bundle.py", "diagnose/evaluate.py"),
    },
    "onnxruntime": {"backends/onnx.py", "diagnose/evaluate.py"},
    "torch": {
        *("library.py", "pickled.py", "checkpoint.py", "model.py", "export.py", "backends/pytorch.py"),
        *("diagnose/taps.py", "train_shapes.py"),
    },
    "aclruntime": {"ascend/aclruntime.py"},
    "pytest": {"plugin.py"},
    "_pytest": {"promise.py"},
}


def order():
    text = " ".join(clipval.__doc__.split())
    arrow = re.search(r"errors -> .*? -> __main__", text).group()
    return {name.strip(): rank for rank, part in enumerate(arrow.split("->")) for name in part.split(",")}


def imported(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "clipval":
                yield from (f"clipval.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    ranks = order()
    here = path.relative_to(PACKAGE).parts[0].replace(".py", "")
    if here == "__init__":
        return
    assert here in ranks, f"{here} is missing from the arrow in clipval/__init__.py"
    for module in imported(path):
        found = re.match(r"clipval\.(\w+)", module)
        if found and found[1] != here:
            assert ranks[found[1]] < ranks[here], f"{here} imports {found[1]}, which is not on its left"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_outside_things_have_one_home(path):
    name = path.relative_to(PACKAGE).as_posix()
    for module in imported(path):
        top = module.split(".")[0]
        assert name in HOMES.get(top, {name}), f"{name} imports {top}; only {HOMES[top]} may"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_late(path):
    heavy = {"torch", "open_clip", "onnx", "onnxruntime", "aclruntime", "scipy", "matplotlib", "jinja2"}
    found = heavy & {module.split(".")[0] for module in imported(path, top_level_only=True)}
    assert not found


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "pytest", "--collect-only", "-q"],
        ["-m", "pytest", "--collect-only", "-q", "tests/acceptance"],
        ["-m", "clipval", "--help"],
    ],
)
def test_collecting_and_help_import_nothing_heavy(command, tmp_path):
    probe = "import atexit, sys; atexit.register(lambda: open(r'{}', 'w').write(' '.join(sys.modules)))"
    loaded = tmp_path / "loaded"
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
    path = f"import sys; sys.path.insert(0, r'{tmp_path}'); import probe_modules\n"
    (tmp_path / "probe_modules.py").write_text(probe.format(loaded), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", path + code, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    heavy = {"torch", "open_clip", "onnxruntime", "aclruntime"} & set(loaded.read_text().split())
    assert not heavy
    assert command[-1] != "tests/acceptance" or "hypothesis" not in loaded.read_text().split()
