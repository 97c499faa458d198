"""Shards: cut in whole batches, made by several processes, killed, damaged, mixed up, checked and read."""

import errno
import importlib
import json
import os
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as some

from clipval import arrays, cli, datasets, embeddings, preprocess, reference
from clipval.backends import Identity
from clipval.datasets import shapes
from clipval.embeddings import Embeddings
from clipval.errors import BackendUnavailable, InputError, os_cause
from clipval.shards import again, cluster, files, pool
from clipval.shards.work import Device, Task
from clipval.spec import FOLDER
from clipval.towers import TEXT, VISION
from tests.shard_fakes import FakeDevice, FakeJob, embeddings_of
from tests.simulator import LIB, environment, tiny

SAMPLES, BATCH = 42, 4  # 11 batches, the last one of 2
KEY = {"model": "a"}


@pytest.fixture
def rows(tmp_path):
    """Prepared rows whose first token is their number."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(SAMPLES):
        np.save(folder / f"{n}_0.npy", np.full((1, 77), n, np.int64))
    return arrays.listed(folder, TEXT)


@pytest.fixture
def planned(tmp_path, rows):
    return files.plan(tmp_path / "out", rows, BATCH, 4, KEY)


@pytest.fixture
def job(tmp_path, planned, rows):
    files.prepare(planned)
    return lambda **faults: FakeJob(planned, rows, tmp_path / "log", **faults)


def made_here(planned, rows, numbers=None, device=0, wrong=None):
    """Make shards in this process."""
    backend = FakeDevice(Device(device, ""), FakeJob(planned, rows, os.devnull, wrong=wrong))
    for number in files.prepare(planned) if numbers is None else numbers:
        files.make(planned, number, backend, rows, f"fake:{device}")


def run(job, devices=(0, 1), tasks=None):
    """Make what is left in processes; results, and the pool."""
    with pool.Processes(job, pool.devices("fake", devices, on_host=False)) as workers:
        left = [Task(number) for number in files.prepare(job.planned)] if tasks is None else tasks
        return list(workers.run(left, "")), workers


def whole(rows):
    return embeddings_of(rows[:])


def calls(job):
    """The first token of each batch that was run, in order."""
    return sorted(int(line.split()[0]) for line in job.log.read_text().splitlines())


@given(count=some.integers(1, 300), batch=some.integers(1, 40), shards=some.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_shards_are_whole_batches_and_hold_every_sample_once(count, batch, shards):
    source = preprocess.RawRows(tuple(map(str, range(count))), ("",) * count, TEXT)
    cut = files.plan(arrays.Path("nowhere"), source, batch, shards, {})
    assert [name for n in range(len(cut)) for name in cut.samples(n)] == list(source.ids)
    assert all(edge % batch == 0 for edge in cut.edges[:-1])
    assert len(cut) == min(shards, -(-count // batch))
    sizes = [len(cut.samples(n)) for n in range(len(cut))]
    assert max(sizes) - min(sizes) < 2 * batch
    assert min(sizes) > 0


def test_several_processes_give_what_one_gives_to_the_bit(planned, rows, job):
    _, workers = run(job())
    shards = files.complete(planned)
    files.publish_index(planned, shards, {})
    where, found = files.read(planned.folder)
    assert found.ids == rows.ids
    assert found.values.tobytes() == whole(rows).tobytes()
    assert where == Identity("fake", "1", "Fake:0", "fp32")._replace(device=where.device)
    assert calls(job()) == list(range(0, SAMPLES, BATCH))  # each batch once
    assert not workers.retired


def test_a_killed_worker_costs_its_shard_only(planned, rows, job, capfd):
    deadly = job(deadly={16: 1})
    run(deadly)
    files.complete(planned)
    (hit,) = (n for n in range(len(planned)) if "16_0" in planned.samples(n))
    twice = range(planned.edges[hit], 17, BATCH)  # up to the batch in which it was killed
    assert calls(deadly) == sorted([*range(0, SAMPLES, BATCH), *twice])
    said = capfd.readouterr().err
    assert f"its process was ended by SIGKILL in shard {hit}; restarting it" in said
    assert (
        not [name for name in os.listdir(planned.folder) if name.endswith(files.BUILDING)]
        or files.prepare(planned) == []
    )


def test_a_shard_that_always_kills_ends_the_run_and_costs_no_other(planned, rows, job):
    deadly = job(deadly={16: 10**6})
    with pytest.raises(BackendUnavailable, match=r"shard \d: its process was ended 5 times, .* by SIGKILL|in a row"):
        run(deadly, devices=(0, 1, 2))
    (hit,) = (n for n in range(len(planned)) if "16_0" in planned.samples(n))
    assert hit in files.prepare(planned)
    before = len(calls(deadly))
    run(job())
    files.complete(planned)
    assert len(calls(deadly)) - before <= -(-SAMPLES // BATCH)


def test_a_device_that_fails_is_left_out_and_named(planned, job, capfd):
    _, workers = run(job(broken=1, after=1))
    files.complete(planned)
    assert list(workers.retired) == ["fake:1"]
    assert "fake:1: fake device 1 is lost; reset it; continuing without this device" in capfd.readouterr().err


def test_no_device_left(job):
    with pytest.raises(BackendUnavailable, match=r"^fake:1: fake device 1 is lost"):
        run(job(broken=1), devices=(1,))


def test_bad_input_in_a_worker_is_one_line(planned, rows, job):
    np.save(rows.folder / "17_0.npy", np.zeros((1, 5), np.int64))
    with pytest.raises(InputError, match=r"17_0.npy: <i8 \(1, 5\), expected <i8 \(1, 77\); run preprocess again"):
        run(job())


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_samples_are_embedded_again_on_another_device(planned, rows, job, wrong):
    made_here(planned, rows, [0, 1], 0, wrong)
    made_here(planned, rows, [2, 3], 1, wrong)
    shards = files.complete(planned)
    assert {shard.where for shard in shards} == {"fake:0", "fake:1"}
    drawn = again.draw(planned, shards, 16, seed=3)
    assert sum(map(len, drawn.values())) == 16
    found = []
    for task, where, value in run(job(wrong=wrong), tasks=list(drawn))[0]:
        found += again.compare(planned, task, drawn[task], where, value)
    assert all(one.made != one.again for one in found)
    assert len({one.id for one in found}) == 16
    assert [one.off for one in found] == [wrong is not None] * 16
    assert again.summary(found, 3)["equal_to_the_bit"] == (16 if wrong is None else 0)


def test_one_device_embeds_its_own_again(planned, rows, job):
    made_here(planned, rows)
    drawn = again.draw(planned, files.complete(planned), 3, seed=0)
    ((_, where, _), *_) = run(job(), devices=(0,), tasks=list(drawn))[0]
    assert where == "fake:0"


@pytest.mark.parametrize(
    ("same", "exact", "cosine", "off"),
    [
        (True, True, 1.0, False),
        (False, True, 1.0, True),  # the processor, with as many threads, gives the same bits
        (False, False, 1 - 1e-7, False),
        (False, False, 1 - 2e-6, True),
        (False, False, float("nan"), True),
    ],
)
def test_when_two_devices_disagree(same, exact, cosine, off):
    assert again.Drawn("a", "x:0", "x:1", cosine, same, exact).off is off


def test_only_what_is_missing_or_damaged_is_made_again(planned, rows):
    made_here(planned, rows)
    assert files.prepare(planned) == []
    with open(planned.place(1) / files.VALUES, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    (planned.place(3) / files.MANIFEST).unlink()
    (planned.folder / "00002-of-00004.x.building").mkdir()
    with pytest.raises(InputError, match=r"2 of 4 shards missing or damaged \(00001-of-00004\)"):
        files.complete(planned)
    assert files.prepare(planned) == [1, 3]
    assert sorted(os.listdir(planned.folder)) == ["00000-of-00004", "00002-of-00004"]


def test_a_shard_whose_inputs_changed_is_made_again(planned, rows):
    made_here(planned, rows)
    np.save(rows.folder / "40_0.npy", np.full((1, 77), 5, np.int64))
    os.utime(rows.folder / "40_0.npy", ns=(1, 1))
    assert files.prepare(files.plan(planned.folder, rows, BATCH, 4, KEY)) == [3]


def test_what_would_be_mixed_in_is_refused(planned, rows):
    made_here(planned, rows)
    with pytest.raises(InputError, match=r'of another run, whose model is "a", here "b"'):
        files.prepare(files.plan(planned.folder, rows, BATCH, 4, {"model": "b"}))
    with pytest.raises(InputError, match=r"holds shards of another cut, 0000\d-of-00004, this run makes 5"):
        files.prepare(files.plan(planned.folder, rows, BATCH, 5, KEY))
    other = rows.part(1, SAMPLES)
    with pytest.raises(InputError, match=r"00000-of-00004: of other samples \(0_0, ...\)"):
        files.prepare(files.plan(planned.folder, other, BATCH, 4, KEY))
    np.save(planned.folder / "7_0_0.npy", np.ones((1, 512), np.float32))
    with pytest.raises(InputError, match=r"holds embeddings that are not shards \(7_0_0.npy\)"):
        files.prepare(planned)


def test_shards_of_two_makers_are_refused(planned, rows):
    made_here(planned, rows)
    file = planned.place(2) / files.MANIFEST
    manifest = json.loads(file.read_text())
    for change in ({"version": "2"}, {"device": "Other:0"}, {"simulated": True}):
        file.write_text(json.dumps({**manifest, "made_by": {**manifest["made_by"], **change}}))
        with pytest.raises(InputError, match="shards from two backends"):
            files.complete(planned)


def test_a_full_disk_is_named_and_leaves_nothing(planned, rows, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    files.prepare(planned)
    made_here(planned, rows, [0])
    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError, match="No space") as failed:
        made_here(planned, rows, [1])
    assert os_cause(failed.value) == f"{planned.place(1)}: disk full; free some space or write to another place"
    assert os.listdir(planned.folder) == [planned.place(0).name]


@pytest.mark.parametrize(
    "change", [{"made_by": {}}, {"made_by": {"name": "onnx"}}, {"ids": []}, {"seconds": 0}, {"ids": 3}, {"key": None}]
)
def test_a_shard_whose_manifest_was_edited_is_made_again(planned, rows, change):
    made_here(planned, rows)
    file = planned.place(2) / files.MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert files.prepare(planned) == [2]


@pytest.mark.parametrize("damage", ["cut", "bit", "longer", "no manifest", "twice", "no index", "fewer"])
def test_damaged_shards_are_not_read(planned, rows, damage):
    made_here(planned, rows)
    files.publish_index(planned, files.complete(planned), {})
    assert files.read_any(planned.folder, 512).ids == rows.ids
    values, index = planned.place(2) / files.VALUES, planned.folder / files.INDEX
    content = values.read_bytes()
    if damage in ("cut", "bit", "longer"):
        changed = {"cut": content[:-9], "bit": content[:-1] + b"\x01", "longer": content + b"x"}
        values.write_bytes(changed[damage])
    elif damage == "no manifest":
        (planned.place(2) / files.MANIFEST).unlink()
    elif damage == "twice":
        shutil.rmtree(planned.place(2))
        shutil.copytree(planned.place(1), planned.place(2))
    elif damage == "no index":
        index.unlink()
    else:
        about = json.loads(index.read_text())
        index.write_text(json.dumps({**about, "shards": 3}))
    with pytest.raises(InputError, match="run embed again"):
        files.read_any(planned.folder)


def test_of_another_width(planned, rows):
    made_here(planned, rows)
    files.publish_index(planned, files.complete(planned), {})
    with pytest.raises(InputError, match="512 wide, expected 768"):
        files.read_any(planned.folder, 768)


def test_a_shard_that_was_published_meanwhile_is_kept(planned, rows):
    made_here(planned, rows)
    before = os.stat(planned.place(0)).st_ino
    made_here(planned, rows, [0])
    assert os.stat(planned.place(0)).st_ino == before


def rate(where, samples, seconds):
    return files.Rate(where, samples, seconds)


def test_a_slow_device_is_named():
    three = [rate("om:0", 1000, 10), rate("om:1", 600, 10), rate("om:2", 1020, 10)]
    assert files.slow(three) == ["om:1 is slow: 60.0 samples/s, 0.59 of the others' median"]
    assert files.slow([rate("om:0", 1000, 10), rate("om:1", 950, 10)]) == []
    assert files.slow([rate("om:0", 1000, 10), rate("om:1", 6, 0.1)]) == []  # it hardly worked
    assert files.slow([rate("om:0", 1000, 10)]) == []


def test_sets_of_cores_are_of_one_size(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    assert [one.cores for one in pool.devices("onnx", (0, 1), True)] == [(0, 1), (2, 3)]
    assert [one.cores for one in pool.devices("onnx", range(7), True)][5:] == [(0,), (1,)]
    assert [one.where for one in pool.devices("om", (3, 5), False)] == ["om:3", "om:5"]
    assert {one.cores for one in pool.devices("om", (3, 5), False)} == {()}


def test_raw_rows_are_what_preprocess_writes(tmp_path, seeded):
    shapes.write(tmp_path / "data", count=3)
    data = datasets.read(tmp_path / "data")
    contract = {"vision": VISION, "text": TEXT}
    prepared = preprocess.prepare(data, seeded, contract, tmp_path / "prepared")
    for tower in contract.values():
        raw = preprocess.raw(data, tower, seeded)
        assert raw.ids == prepared.rows[tower.name].ids
        assert raw[1:3].tobytes() == prepared.rows[tower.name][1:3].tobytes()
        assert raw[[2, 0]].tobytes() == prepared.rows[tower.name][[2, 0]].tobytes()
        assert raw.part(1, 3).stamp() != raw.part(0, 2).stamp()


# ---- the command


def clipval(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def arranged(tmp_path):
    """Prepared arrays of 21 captions and a small model."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for n, row in enumerate(tiny.rows(TEXT, 21)):
        np.save(texts / f"{n}_0.npy", row[None])
    return tmp_path, tiny.write(tmp_path / "b_text.onnx", TEXT)


def test_embed_in_shards_is_embed_to_the_bit(arranged, capsys):
    folder, model = arranged
    given = ["embed", "--model", model, "--input", folder / "texts", "--output", folder, "--threads", 1]
    assert clipval(*given, "--output-dirname", "one") == 0
    shards = [*given, "--output-dirname", "many", "--shards", 3, "--devices", "0,1"]
    assert clipval(*shards) == 0
    said = capsys.readouterr().out
    assert "21 embeddings of the text tower in 3 shards (3 made now) by onnx" in said
    assert "16 samples drawn" in said
    assert "16 bit-identical" in said
    one, many = embeddings.read(folder / "one"), files.read_any(folder / "many")
    assert many.ids == one.ids
    assert many.values.tobytes() == one.values.tobytes()
    shutil.rmtree(folder / "many" / "00001-of-00003")
    assert clipval(*shards) == 0
    assert "(1 made now)" in capsys.readouterr().out
    assert clipval(*shards) == 0
    assert "all 3 shards are complete" in capsys.readouterr().out
    assert files.read_any(folder / "many").values.tobytes() == one.values.tobytes()


@pytest.mark.parametrize(("what", "said"), [("model", "the model was changed"), ("input", "its inputs were changed")])
def test_what_changes_while_it_is_embedded_is_noticed(arranged, capsys, monkeypatch, what, said):
    folder, model = arranged
    complete = files.complete

    def changed(planned):
        if what == "model":
            os.replace(tiny.write(folder / "other.onnx", TEXT, recipe=True), model)
        else:
            os.utime(folder / "texts" / "20_0.npy", ns=(1, 1))
        return complete(planned)

    monkeypatch.setattr(files, "complete", changed)
    given = ["--model", model, "--input", folder / "texts", "--output", folder, "--output-dirname", "many"]
    assert clipval("embed", *given, "--threads", 1, "--shards", 2, "--again", 0) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "many" / files.INDEX).exists()


def test_one_run_at_a_time(arranged, capsys):
    folder, model = arranged
    (folder / "many").mkdir()
    given = ["--model", model, "--input", folder / "texts", "--output", folder, "--output-dirname", "many"]
    with FileLock(str(folder / "many" / ".lock")):
        assert clipval("embed", *given, "--shards", 2) == 2
    assert "another run is writing its shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ray", "127.0.0.1:1", "--devices", "0"], "leave out --devices"),
        (
            ["--shards", "2", "--onnx-providers", "cuda", "--onnx-provider-options", "device_id=1"],
            "select devices with --devices",
        ),
        (["--shards", "2", "--data-dir", "x"], "give either --input with prepared arrays or --data-dir"),
    ],
)
def test_wrong_usage(arranged, capsys, more, said):
    folder, model = arranged
    assert clipval("embed", "--model", model, "--input", folder / "texts", "--output", folder, *more) == 2
    assert said in capsys.readouterr().err


def test_a_data_set_is_embedded_without_arrays_on_the_disk_and_evaluated(tmp_path, capsys):
    shapes.write(tmp_path / "data", count=6)
    model = ["--model-name", FOLDER / "shapes-vit.json", "--pretrained", FOLDER / "shapes-vit.pt"]
    for tower, shards in (("vision", ["--shards", 2]), ("text", [])):
        given = ["--data-dir", tmp_path / "data", "--tower", tower, "--output", tmp_path, "--output-dirname", tower]
        assert clipval("embed", *model, *given, *shards, "--threads", 1) == 0
    assert files.read_any(tmp_path / "vision").ids == datasets.read(tmp_path / "data").image_ids
    capsys.readouterr()
    embeds = ["--vision-embeds", tmp_path / "vision", "--text-embeds", tmp_path / "text"]
    assert clipval("evaluate", *embeds, "--data-dir", tmp_path / "data") == 0
    assert "30 queries" in capsys.readouterr().out


def test_simulated_npus(arranged, monkeypatch, capsys):
    folder, model = arranged
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(LIB))  # a spawned process has its parent's path
    assert clipval("compile", "--model", model, "--batch-sizes", 4, "--soc-version", "Ascend910B4") == 0
    given = ["--model", folder / "b_text_bs4.om", "--input", folder / "texts", "--output", folder]
    assert clipval("embed", *given, "--output-dirname", "many", "--shards", 4, "--devices", "0,1") == 0
    said = capsys.readouterr().out
    assert "by om simulated" in said
    assert "batch 4" in said
    found = files.read_any(folder / "many")
    shards = [files._manifest(folder / "many" / f"0000{n}-of-00004") for n in range(4)]
    assert {shard.where for shard in shards} <= {"om:0", "om:1"}
    assert all(shard.identity.device == f"Ascend910B4:{shard.where[-1]}" for shard in shards)
    plain = embeddings.embed(_onnx(model), found.ids, arrays.listed(folder / "texts", TEXT), 4)
    assert np.allclose(found.values, plain.values, atol=2e-3)
    assert "16 bit-identical" in said


def _onnx(model):
    from clipval.backends import onnx

    return onnx.OnnxBackend(TEXT, model, threads=1)


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (None, r"--ray: No module named 'ray'; pip install 'clipval\[ray\]', which takes 'ray\[data\]>=2.51'"),
        ("2.10.0", r"--ray: needs Ray 2.51 or newer \(Python 3.9 on\); found 2.10.0"),
        ("2.60.0", r"--ray 127.0.0.1:\d+: cannot be reached \(.*\); give the address that `ray start --head` prints"),
    ],
)
def test_a_cluster_that_cannot_be_used(monkeypatch, installed, said):
    def find(name):
        if installed is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace(__version__=installed)

    monkeypatch.setattr(importlib, "import_module", find)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nothing listens there
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(BackendUnavailable, match=said):
            cluster.Cluster(address, None, "NPU").__enter__()


# ---- the reference


def test_a_killed_reference_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "SHARD", 8)
    monkeypatch.setattr(reference, "BATCH", 4)
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(20):
        np.save(folder / f"{n}_0.npy", np.full((1, 77), n, np.int64))
    rows = arrays.listed(folder, TEXT)
    log, place = tmp_path / "log", tmp_path / "reference"
    first = FakeDevice(Device(0, ""), FakeJob(None, rows, log, broken=0))

    def killed():
        if log.exists() and len(log.read_text().splitlines()) >= 2:
            return first
        return FakeDevice(Device(1, ""), FakeJob(None, rows, log))

    with pytest.raises(BackendUnavailable):
        reference.make(place, KEY, rows, killed)
    before = len(log.read_text().splitlines())
    reference.make(place, KEY, rows, lambda: FakeDevice(Device(0, ""), FakeJob(None, rows, log)))
    assert len(log.read_text().splitlines()) - before == 2  # the last two of five batches: one shard
    found = files.read(place)
    assert found.embeddings.values.tobytes() == whole(rows).tobytes()
    assert isinstance(found.embeddings, Embeddings)
