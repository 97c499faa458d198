"""Workers in processes of this host, one per device; a killed one is restarted and its task repeated.

Processes are spawned, since a runtime's threads and devices do not survive a fork. `concurrent.futures` is not used:
its executors give up all processes when one is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Deque, Dict, Iterator, List, Optional, Sequence, Tuple
from typing import Counter as Counts

from tqdm import tqdm

from clipval import supervise
from clipval.errors import BackendUnavailable, ClipvalError, InputError, UsageError, one_line, os_cause
from clipval.shards.work import Device, Opener, Task

TRIES = 5  # how often a process may be killed in one task, or on one device in a row
PATIENCE = 10.0  # seconds for an idle worker to end when asked to
ERRORS = {one.kind: one for one in (InputError, UsageError, BackendUnavailable)}


def devices(name: str, numbers: Sequence[int], on_host: bool) -> List[Device]:
    """Devices of this host: accelerators, or equal sets of CPU cores.

    If there are fewer cores than devices, some share one.
    """
    cores = sorted(os.sched_getaffinity(0)) if on_host and hasattr(os, "sched_getaffinity") else []
    each = max(1, len(cores) // len(numbers))
    sets = [tuple(cores[start : start + each]) for start in range(0, len(cores), each)] or [()]
    return [Device(number, f"{name}:{number}", sets[n % len(sets)]) for n, number in enumerate(numbers)]


@dataclass
class Process:
    """The parent's state of a worker's process.

    Attributes:
        ready: its backend is open; task: the current one; ended: how often in a row it ended without finishing one.
    """

    device: Device
    process: Any
    connection: Connection
    ready: bool = False
    task: Optional[Task] = None
    ended: int = 0


class Processes:
    """Workers of this host; a context manager that ends them on exit.

    Args:
        opener: opens a worker in its process.
        devices: one process each.

    Attributes:
        retired: failed devices, and how; notes: of the backends, without duplicates; see `clipval.backends.Backend`.
    """

    def __init__(self, opener: Opener, devices: Sequence[Device]) -> None:
        self._opener = opener
        self._context = multiprocessing.get_context("spawn")
        self._workers: List[Process] = []
        self._lost: Counts[Task] = Counter()
        self._devices = devices
        self.retired: Dict[str, str] = {}
        self.notes: Dict[str, None] = {}

    def __enter__(self) -> Processes:
        self._workers = [self._start(device) for device in self._devices]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker.task is None and worker.ready:
                with suppress(OSError):
                    worker.connection.send(None)
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(PATIENCE)
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def run(self, tasks: Sequence[Task], describe: str) -> Iterator[Tuple[Task, str, Any]]:
        """Run tasks on whichever device is free.

        Yields:
            Each task, its device, and its result, as they complete.

        Raises:
            InputError, UsageError: raised by a worker; no more tasks are run.
            BackendUnavailable: no device is left, or one task killed its process too often.
        """
        left, bar = deque(tasks), tqdm(desc=describe, total=len(tasks), disable=None, leave=False)
        with bar:
            while left or any(worker.task for worker in self._workers):
                self._assign(left)
                for worker in self._heard():
                    done, told = worker.task, self._receive(worker, left)
                    if done is not None and told is not None:
                        bar.update()
                        yield done, worker.device.where, told[0]

    def _start(self, device: Device) -> Process:
        ours, theirs = self._context.Pipe()
        arguments = self._opener, device, theirs, os.getpid()
        process = self._context.Process(target=_serve, args=arguments, name=device.where, daemon=True)
        process.start()
        theirs.close()
        return Process(device, process, ours)

    def _assign(self, left: Deque[Task]) -> None:
        """Give each idle worker a task, but not one that should avoid its device while there is another."""
        names = {worker.device.where for worker in self._workers}
        for worker in self._workers:
            others = names - {worker.device.where}
            if worker.ready and worker.task is None:
                suits = (one for one in left if one.avoid != worker.device.where or not others)
                task = next(suits, None)
                if task is not None:
                    left.remove(task)
                    worker.task = task
                    with suppress(OSError):  # it is dead, which is noticed next
                        worker.connection.send(task)

    def _heard(self) -> List[Process]:
        ready = wait([worker.connection for worker in self._workers])
        return [worker for worker in self._workers if worker.connection in ready]

    def _receive(self, worker: Process, left: Deque[Task]) -> Optional[Tuple[Any]]:
        """A task's result; None for any other message, which is handled."""
        try:
            word, value = worker.connection.recv()
        except (EOFError, OSError):
            self._died(worker, left)
            return None
        if word == "ready":
            worker.ready = True
            self.notes.update(dict.fromkeys(value))
            return None
        if word == "done":
            worker.task, worker.ended = None, 0
            return (value,)
        kind, message = value
        if kind != BackendUnavailable.kind:
            raise ERRORS.get(kind, InputError)(message)
        self._retire(worker, message, left)
        return None

    def _died(self, worker: Process, left: Deque[Task]) -> None:
        """Restart a worker, and put its task back."""
        worker.process.join()
        how, task, where = _ending(worker.process.exitcode), worker.task, worker.device.where
        doing = f"in {task}" if task else "while it waited" if worker.ready else "while it was started"
        if worker.ended + 1 >= TRIES:
            self._retire(worker, f"its process was ended {TRIES} times in a row, the last time {how} {doing}", left)
            return
        if task is not None:
            self._lost[task] += 1
            if self._lost[task] >= TRIES:
                raise BackendUnavailable(
                    f"{task}: its process was ended {TRIES} times, the last time {how} on {where}; see what is printed "
                    f"above, and whether memory is left"
                )
            left.appendleft(task)
        worker.connection.close()
        print(f"{where}: its process was ended {how} {doing}; restarting it", file=sys.stderr)
        again = self._start(worker.device)
        again.ended = worker.ended + 1
        self._workers[self._workers.index(worker)] = again

    def _retire(self, worker: Process, message: str, left: Deque[Task]) -> None:
        """Continue without a device."""
        where = worker.device.where
        self.retired[where] = message
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        if not self._workers:
            raise BackendUnavailable(f"{where}: {message}")
        print(f"{where}: {message}; continuing without this device", file=sys.stderr)
        if worker.task is not None:
            left.appendleft(worker.task)


def _ending(code: Optional[int]) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"


def _serve(opener: Opener, device: Device, connection: Connection, parent: int) -> None:
    """A worker's main loop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    supervise.end_with(parent)
    if device.cores:
        os.sched_setaffinity(0, device.cores)  # before a runtime counts cores
    try:
        worker = opener(device)
        connection.send(("ready", worker.backend.notes))
        while True:
            task = connection.recv()
            if task is None:
                worker.close()
                return
            connection.send(("done", worker.do(task)))
    except EOFError:
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(("failed", described(error)))


def described(error: BaseException) -> Tuple[str, str]:
    """Kind of an error and a one-line message; unexpected errors are printed in full."""
    if isinstance(error, ClipvalError):
        return error.kind, str(error)
    if isinstance(error, OSError):
        return InputError.kind, os_cause(error)
    traceback.print_exception(type(error), error, error.__traceback__)
    return "error", f"a worker ended with {type(error).__name__}: {one_line(error)}"
