"""Workers on a Ray cluster: Ray Data makes the shards with one actor per device, in a folder shared by all nodes.

Inside an actor the device is always number 0: Ray restricts it to one device by ASCEND_RT_VISIBLE_DEVICES or
CUDA_VISIBLE_DEVICES, and reports the host's ids. Ray restarts killed actors and repeats their tasks. Needs Ray 2.51
(`ActorPoolStrategy` in `compute`), which has wheels for Python 3.9 on.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import socket
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from tqdm import tqdm

from clipval.errors import BackendUnavailable, ClipvalError, InputError, one_line
from clipval.shards.pool import ERRORS, described
from clipval.shards.work import Device, Opener, Task

KNOCK_SECONDS = 10.0
RESOURCES = {"NPU": "NPU", "GPU": "GPU", "": "CPU"}  # Ray's resource of an actor, by kind of device


class Actor:
    """A worker inside Ray; errors are returned as values, since Ray would repeat a task that raises."""

    def __init__(self, opener: Opener, accelerator: str) -> None:
        self._worker: Any = None
        self._error: Optional[Tuple[str, str]] = None
        self._where = _here(accelerator)
        try:
            self._worker = opener(Device(0, self._where))
        except Exception as error:
            self._error = described(error)

    def where(self) -> str:
        """The node and device of this worker."""
        return self._where

    def do(self, task: Task) -> Tuple[Optional[Tuple[str, str]], Any]:
        """A task's error, or None and its result."""
        if self._error is not None:
            return self._error, None
        try:
            return None, self._worker.do(task)
        except Exception as error:
            return described(error), None

    def __call__(self, batch: Dict[str, Any]) -> Dict[str, List[Any]]:
        """A batch of Ray Data with one shard: its number in, the kind of its error and its message out."""
        error, _ = self.do(Task(int(batch["number"][0])))
        kind, message = error or ("", "")
        return {"number": list(batch["number"]), "where": [self._where], "kind": [kind], "message": [message]}


def _here(accelerator: str) -> str:
    """Node and device of an actor, by the host's device number; on the CPU its process."""
    ray = _import_ray()
    context = ray.get_runtime_context()
    node = f"{ray.util.get_node_ip_address()} ({context.get_node_id()[:6]})"
    ids = context.get_accelerator_ids().get(accelerator, [])
    return f"{node} {accelerator} {','.join(ids)}" if accelerator else f"{node} process {os.getpid()}"


class Cluster:
    """Workers on a Ray cluster; a context manager that disconnects from the cluster on exit.

    Args:
        address: of the cluster, for `ray.init`.
        opener: opens a worker in its actor; must use absolute paths.
        accelerator: `NPU`, `GPU`, or empty for the CPU; an actor uses one.
        cores: CPU cores per actor.

    Attributes:
        retired, notes: as in `clipval.shards.pool.Processes`; always empty.

    Raises:
        BackendUnavailable: Ray is missing or too old, the cluster cannot be reached, or has no such device.
    """

    def __init__(self, address: str, opener: Opener, accelerator: str, cores: int = 1) -> None:
        self._address = address
        self._arguments = {"opener": opener, "accelerator": accelerator}
        self._resource, self._cores = RESOURCES[accelerator], cores
        self._size = 0
        self.retired: Dict[str, str] = {}
        self.notes: Dict[str, None] = {}

    def __enter__(self) -> Cluster:
        ray = _import_ray()
        _knock(self._address)
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's warnings about its own actors
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # ConnectionError, ValueError, RuntimeError, by what is wrong
            raise BackendUnavailable(
                f"--ray {self._address}: cannot be reached ({one_line(error)}); give the address of "
                f"`ray start --head`, with the same versions of Ray and Python"
            ) from error
        each = self._cores if self._resource == "CPU" else 1
        self._size = int(ray.cluster_resources().get(self._resource, 0)) // each
        if not self._size:
            ray.shutdown()
            raise BackendUnavailable(
                f"--ray {self._address}: the cluster has no free {self._resource} for {each}; start its nodes "
                f"with --resources='{{\"{self._resource}\": N}}' if Ray does not detect them"
            )
        return self

    def __exit__(self, *_: object) -> None:
        _import_ray().shutdown()

    def run(self, tasks: Sequence[Task], describe: str) -> Iterator[Tuple[Task, str, Any]]:
        """See `clipval.shards.pool.Processes.run`."""
        found = self._again(tasks) if tasks and tasks[0].avoid else self._made(tasks)
        try:
            yield from tqdm(found, desc=describe, total=len(tasks), disable=None, leave=False)
        except ClipvalError:
            raise
        except Exception as error:  # Ray's own: an actor that cannot be started, a node that is gone
            raise BackendUnavailable(
                f"--ray {self._address}: {one_line(error, 600)}; every node needs clipval in the same version, the "
                f"model file and the folders at the same paths, and `ray status` shows the cluster"
            ) from error

    def _options(self) -> Dict[str, Any]:
        """Ray's options of an actor."""
        if self._resource == "GPU":
            return {"num_cpus": self._cores, "num_gpus": 1}
        return {"num_cpus": self._cores, **({"resources": {"NPU": 1}} if self._resource == "NPU" else {})}

    def _made(self, tasks: Sequence[Task]) -> Iterator[Tuple[Task, str, Any]]:
        if not tasks:
            return
        ray = _import_ray()
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs its plans
        ray.data.DataContext.get_current().enable_progress_bars = False
        size = min(self._size, len(tasks))
        rows = ray.data.from_items([{"number": task.number} for task in tasks], override_num_blocks=len(tasks))
        done = rows.map_batches(
            Actor,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            fn_constructor_kwargs=self._arguments,
            **self._options(),
        )
        for row in done.iter_rows():
            if row["message"]:
                _fail(row["where"], row["kind"], row["message"])
            yield Task(int(row["number"])), row["where"], None

    def _again(self, tasks: Sequence[Task]) -> Iterator[Tuple[Task, str, Any]]:
        ray = _import_ray()
        actors: List[Any] = [ray.remote(**self._options())(Actor).remote(**self._arguments) for _ in range(self._size)]
        places = ray.get([actor.where.remote() for actor in actors])
        waiting = []
        for n, task in enumerate(tasks):
            elsewhere = [one for one in zip(actors, places) if one[1] != task.avoid] or list(zip(actors, places))
            actor, where = elsewhere[n % len(elsewhere)]
            waiting.append((task, where, actor.do.remote(task)))
        for task, where, promised in waiting:
            error, found = ray.get(promised)
            if error is not None:
                _fail(where, *error)
            yield task, where, found


def _knock(address: str) -> None:
    """Check at once whether something listens at an address; Ray itself retries for minutes.

    Raises:
        BackendUnavailable: nothing does.
    """
    named = re.match(r"(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)$", address)
    if named is None:
        return  # `auto` and the like, which Ray looks up
    try:
        socket.create_connection((named["host"].strip("[]"), int(named["port"])), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise BackendUnavailable(
            f"--ray {address}: cannot be reached ({one_line(error)}); give the address that `ray start --head` prints"
        ) from error


def _fail(where: str, kind: str, message: str) -> None:
    found = ERRORS.get(kind, InputError)
    raise found(f"{where}: {message}")


def _import_ray() -> Any:
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise BackendUnavailable(
            f"--ray: {one_line(error)}; pip install 'clipval[ray]', which takes 'ray[data]>=2.51' (Python 3.9 on)"
        ) from error
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < (2, 51):
        raise BackendUnavailable(f"--ray: needs Ray 2.51 or newer (Python 3.9 on); found {ray.__version__}")
    return ray
