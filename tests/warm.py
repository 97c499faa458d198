"""`python -m MODULE` without the seconds that imports take, for tests that need many runs in a process of their own.

A server imports the large libraries, nothing of clipval, and starts no thread. Each run is a fork of it with its own
arguments, variables and output, which ends as every Python process does, exit hooks included. Only what the interpreter
itself reads at its start (PYTHONHASHSEED, PYTHONIOENCODING, LD_LIBRARY_PATH) is the server's.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).parents[1]
TIMEOUT = 600.0  # seconds


def run(command: List[str], env: Dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `[python, "-m", module, *arguments]` in a folder, with exactly these environment variables.

    Raises:
        subprocess.TimeoutExpired: it did not end in `TIMEOUT` seconds, and was killed.
    """
    assert command[:2] == [sys.executable, "-m"]
    if sys.platform != "linux":  # elsewhere a fork of a process with such libraries may not live
        given: Dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT, "check": False}
        return subprocess.run(command, cwd=cwd, env=env, **given)
    with tempfile.TemporaryDirectory() as folder:
        code = _Server.shared().answer(command, env, str(cwd), folder)
        out, err = ((Path(folder) / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    return subprocess.CompletedProcess(command, code, out, err)


class _Server:
    """The client's side of a server."""

    def __init__(self) -> None:
        # Of bytecode: rewriting the asserts of clipval takes a second of each run.
        self.cache = tempfile.TemporaryDirectory()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": self.cache.name}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests import warm; warm.serve()"],
            cwd=ROOT, env=variables, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self.close)

    @staticmethod
    @lru_cache(maxsize=None)
    def shared() -> _Server:
        """The one of this process."""
        return _Server()

    def answer(self, command: List[str], env: Dict[str, str], cwd: str, folder: str) -> int:
        """Exit code of a run, less than 0 for a signal; its output lies in the folder."""
        asked = {"command": command, "env": env, "cwd": cwd, "folder": folder, "cache": self.cache.name}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            self.close()
            raise subprocess.TimeoutExpired(command, TIMEOUT)
        code = self.process.stdout.readline()
        assert code, f"the server of warm processes ended with {self.process.wait()}"
        return int(code)

    def close(self) -> None:
        """End the server, and the run that it is at."""
        self.shared.cache_clear()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.cache.cleanup()


def serve() -> None:
    """Answer each request, a line of JSON, with a run's exit code."""
    _import_libraries()
    path = [one for one in sys.path if one not in ("", str(ROOT))]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(path, **json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


def _import_libraries() -> None:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as every run of clipval sets it
    import onnx  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401

    from clipval import library

    library.import_open_clip()
    globals()["kept"] = library  # torchvision's operators live as long as the module that declared them
    for name in [one for one in sys.modules if one.split(".")[0] == "clipval"]:
        del sys.modules[name]  # each run imports its own: pytest rewrites and faults change them
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork copies one of {threads} threads"


def _become(path: List[str], command: List[str], env: Dict[str, str], cwd: str, folder: str, cache: str) -> None:
    """Turn a fork into the process that was asked for, and do what it does."""
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as the variables say, not where the server keeps what torch writes on import
    for number, (name, mode) in enumerate([(os.devnull, "r"), (f"{folder}/out", "w"), (f"{folder}/err", "w")]):
        with open(name, mode) as stream:
            os.dup2(stream.fileno(), number)
    os.chdir(cwd)
    sys.path[:] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.dont_write_bytecode, sys.pycache_prefix = False, cache
    sys.orig_argv, sys.argv[:] = command, command[2:]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)
