"""Shards on a Ray cluster on this machine: a head, and a second node with two simulated NPUs."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipval import arrays, embeddings
from clipval.errors import BackendUnavailable
from clipval.shards import again, cluster, files
from clipval.shards.work import Task
from clipval.towers import TEXT
from tests.shard_fakes import FakeJob, embeddings_of
from tests.simulator import environment, tiny

pytest.importorskip("ray", reason="no Ray for this Python (3.9 on), or not installed; requirements.txt has it")
pytestmark = pytest.mark.proof
ROOT = Path(__file__).parents[2]
SAMPLES, BATCH, SHARDS = 61, 4, 8


@pytest.fixture(scope="module")
def address():
    """A cluster whose nodes see the simulated host."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(environment(), RAY_USAGE_STATS_ENABLED="0")
    os.environ["PYTHONPATH"] += os.pathsep + str(ROOT)  # the fake device's module
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # it looks for pyACL on each node
    small = {"object_store_memory": 10**8}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small})
    made.add_node(num_cpus=2, resources={"NPU": 2}, **small)
    yield made.address
    made.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, row in enumerate(tiny.rows(TEXT, SAMPLES)):
        row[0] = n  # the fake device goes by it
        np.save(folder / f"{n}_0.npy", row[None])
    return arrays.listed(folder, TEXT)


def clipval(folder, *arguments):
    command = [sys.executable, "-m", "clipval", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_om_files_on_every_npu_of_the_cluster(address, rows, tmp_path):
    """By relative paths, as a person gives them; the nodes have another working directory."""
    tiny.write(tmp_path / "b_text.onnx", TEXT)
    assert clipval(tmp_path, "compile", "--model", "b_text.onnx", "--batch-sizes", BATCH, "--soc-version=Ascend910B4")
    given = ["embed", "--model", "b_text_bs4.om", "--input", "texts", "--output", ".", "--output-dirname"]
    one = clipval(tmp_path, *given, "one")
    assert one.returncode == 0, one.stderr
    many = clipval(tmp_path, *given, "many", "--shards", SHARDS, "--ray", address)
    assert many.returncode == 0, many.stderr
    assert f"in {SHARDS} shards ({SHARDS} made now) by om simulated" in many.stdout
    assert "16 bit-identical" in many.stdout
    wanted, found = embeddings.read(tmp_path / "one"), files.read_any(tmp_path / "many")
    assert found.ids == wanted.ids
    assert found.values.tobytes() == wanted.values.tobytes()
    shards = [files._manifest(place) for place in sorted((tmp_path / "many").glob("*-of-*"))]
    assert {shard.where[-5:] for shard in shards} <= {"NPU 0", "NPU 1"}
    assert {shard.identity.device for shard in shards} == {"Ascend910B4:0"}  # always the first that is left visible
    shutil.rmtree(tmp_path / "many" / f"00003-of-0000{SHARDS}")
    again_ = clipval(tmp_path, *given, "many", "--shards", SHARDS, "--ray", address)
    assert again_.returncode == 0, again_.stderr
    assert "(1 made now)" in again_.stdout
    assert files.read_any(tmp_path / "many").values.tobytes() == wanted.values.tobytes()


def test_a_killed_actor_costs_its_shard_only(address, rows, tmp_path):
    planned = files.plan(tmp_path / "out", rows, BATCH, SHARDS, {})
    left = files.prepare(planned)
    job = FakeJob(planned, rows, tmp_path / "log", deadly={16: 1}, seconds=0.05)
    with cluster.Cluster(address, job, "NPU") as workers:
        assert {task.number for task, _, _ in workers.run([Task(number) for number in left], "")} == set(left)
        shards = files.complete(planned)
        drawn = again.draw(planned, shards, 16, seed=1)
        found = []
        for task, where, value in workers.run(list(drawn), ""):
            found += again.compare(planned, task, drawn[task], where, value)
    assert len({shard.where for shard in shards}) == 2
    assert all(one.same and one.made != one.again for one in found)
    files.publish_index(planned, shards, {})
    assert files.read(planned.folder).embeddings.values.tobytes() == embeddings_of(rows[:]).tobytes()
    calls = [int(line.split()[0]) for line in job.log.read_text().splitlines()]
    assert calls.count(16) >= 2


def test_a_device_that_fails_is_one_line(address, rows, tmp_path):
    planned = files.plan(tmp_path / "out", rows, BATCH, SHARDS, {})
    job = FakeJob(planned, rows, tmp_path / "log", broken=0)  # inside an actor each device is number 0
    files.prepare(planned)
    with cluster.Cluster(address, job, "NPU") as workers, pytest.raises(BackendUnavailable) as told:
        list(workers.run([Task(0)], ""))
    assert str(told.value).endswith(": fake device 0 is lost; reset it")
    assert "\n" not in str(told.value)


def test_a_cluster_without_such_a_device(address, rows, tmp_path):
    with pytest.raises(BackendUnavailable, match="the cluster has no (free )?GPU"), cluster.Cluster(
        address, None, "GPU"
    ):
        pass


def test_a_cluster_that_is_not_there():
    with pytest.raises(BackendUnavailable, match=r"--ray 127.0.0.1:9: cannot be reached"):
        cluster.Cluster("127.0.0.1:9", None, "NPU").__enter__()
