"""One architecture in a process of its own: python -m tests.sweep.one NAME prints its row as JSON."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from clipval import architectures
from clipval.architectures import Architecture

ROOT = Path(__file__).parents[2]


def run(name: str) -> Architecture:
    """Check an architecture; a process that died is the reason why its export was not seen."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sweep.one", name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return msgspec.structs.replace(architectures.describe(name), export=last)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Architecture)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(msgspec.json.encode(architectures.check(sys.argv[1], Path(folder))).decode())
