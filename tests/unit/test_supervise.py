"""A run that is watched from outside: its exit code is what its closing record says, and signals reach it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from clipval import supervise
from tests import small

pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system cannot wait for signals")
WATCHED = """
import atexit, os, signal, sys, time
from clipval import supervise
code = supervise.fork(lambda line: print(line, file=sys.stderr))
if code is not None:
    sys.stdout.flush()
    os._exit(code)
print(os.getpid(), flush=True)
"""
# beside threads, and beside a runtime that has some, the child starts again
AGAIN = WATCHED.replace("supervise.fork(", "supervise.start([sys.executable, *sys.orig_argv[1:]], ")
WITH_THREADS = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n" + AGAIN
WITH_RUNTIME = "import onnxruntime\n" + AGAIN
starts_again = pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.orig_argv")


def run(body, watched=WATCHED):
    command = [sys.executable, "-c", watched + body]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("supervise.close(0)", 0, ""),
        ("supervise.close(1); sys.exit(1)", 1, ""),
        ("sys.exit(4)", 4, ""),
        ("os._exit(0)", 1, "FAIL: the process ended with exit code 0 before its verdict"),
        ("", 1, "before its verdict"),
        ("atexit.register(os._exit, 0); supervise.close(1); sys.exit(1)", 1, "its exit hooks changed that to 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "ended by SIGKILL before its verdict"),
        ("supervise.close(0); os.kill(os.getpid(), signal.SIGSEGV)", 139, "SIGSEGV while it was ending"),
    ],
)
def test_the_exit_code_is_what_the_run_said_at_its_end(body, code, words):
    ended = run(body)
    assert (ended.returncode, bool(ended.stderr)) == (code, bool(words))
    assert words in ended.stderr


@starts_again
@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("supervise.close(0)", 0, ""),
        ("supervise.close(1); sys.exit(1)", 1, ""),
        ("os._exit(0)", 1, "FAIL: the process ended with exit code 0 before its verdict"),
        ("atexit.register(os._exit, 0); supervise.close(1); sys.exit(1)", 1, "its exit hooks changed that to 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "ended by SIGKILL before its verdict"),
    ],
)
def test_threads_that_run_do_not_leave_the_run_unwatched(body, code, words):
    ended = run(body, WITH_THREADS)
    assert (ended.returncode, bool(ended.stderr)) == (code, bool(words))
    assert words in ended.stderr


@starts_again
def test_a_runtime_that_a_plugin_imported_ends_as_it_should():
    """Its threads are lost in a fork, which it ends with SIGABRT: a run that passed would end with 134."""
    ended = run("supervise.close(0)", WITH_RUNTIME)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_process_that_is_left_behind_does_not_hold_the_run_up():
    ended = run("supervise.close(0)\nif os.fork() == 0:\n    os.close(1), os.close(2), time.sleep(30)")
    assert ended.returncode == 0


# A library's thread from before the fork may receive a signal in place of the thread that waits for it.
THREAD = WATCHED.replace(
    "code =", "import threading\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()\ncode ="
)


@pytest.mark.parametrize("times", range(3))
@pytest.mark.parametrize(("body", "code"), [("supervise.close(3); sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_end_of_a_child_is_not_missed_beside_another_thread(body, code, times):
    ended = subprocess.run([sys.executable, "-c", THREAD + body], capture_output=True, timeout=30, check=False)
    assert ended.returncode == code


def test_a_child_that_does_not_end_after_its_verdict_is_killed():
    hanging = WATCHED.replace("code =", "supervise.ENDING = 1\ncode =")
    body = "import atexit; atexit.register(time.sleep, 100); supervise.close(0)"
    ended = subprocess.run(
        [sys.executable, "-c", hanging + body], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 137
    assert "the run had its verdict (exit code 0), but did not end within 1 s of it" in ended.stderr


@pytest.mark.parametrize(
    ("body", "code", "saved"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 7, True),
        ("os._exit(0)", 7, True),
        ("supervise.close(1); sys.exit(1)", 1, False),
        ("sys.exit(4)", 4, False),
        ("supervise.close(0); os.kill(os.getpid(), signal.SIGSEGV)", 139, False),
    ],
)
def test_what_is_left_of_a_run_without_verdict_is_saved(body, code, saved):
    rescuing = WATCHED.replace("file=sys.stderr))", "file=sys.stderr), lambda child, said: print('SAVED', child) or 7)")
    ended = run(body, rescuing)
    assert ended.returncode == code
    assert ("SAVED" in ended.stdout) is saved
    if saved:
        child, after = ended.stdout.split("SAVED")
        assert int(child) == int(after)


def started(body, watched=WATCHED):
    process = subprocess.Popen(
        [sys.executable, "-c", watched + body],
        stdout=subprocess.PIPE, text=True, preexec_fn=small.hear_interrupts,
    )  # fmt: skip
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("watched", [WATCHED, pytest.param(WITH_THREADS, marks=starts_again)])
def test_an_interrupt_reaches_the_run_once_and_it_ends_in_its_own_way(watched):
    body = """
heard = 0
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    heard += 1
try:
    time.sleep(0.5)
except KeyboardInterrupt:
    heard += 1
supervise.close(2)
sys.exit(2 if heard == 1 else 99)
"""
    process, _ = started(body, watched)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 2


def test_a_run_that_is_killed_leaves_no_child():
    process, child = started("time.sleep(30)")
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{child}/stat", encoding="utf-8") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":  # dead, and nobody here to collect it
                return
        time.sleep(0.05)
    pytest.fail("the child outlived the run")


def test_debuggers_are_left_alone(monkeypatch):
    assert supervise.why_not() == ""
    monkeypatch.setitem(sys.modules, "pydevd", sys)
    assert supervise.why_not().startswith("pydevd is loaded")
