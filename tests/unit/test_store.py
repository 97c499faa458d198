"""The store: built once, never half, never stale, under several processes too."""

import errno
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipval import store
from clipval.errors import ClipvalError, InputError
from clipval.store import Store, files


def build_text(text, log=None):
    def build(folder):
        if log is not None:
            log.append(text)
        (folder / "a.txt").write_text(text, encoding="utf-8")

    return build


def test_builds_once_per_key(tmp_path):
    log = []
    for _ in range(2):
        folder = Store(tmp_path).get("kind", {"n": 1}, build_text("x", log))
    other = Store(tmp_path).get("kind", {"n": 2}, build_text("y", log))
    assert (folder / "a.txt").read_text(encoding="utf-8") == "x"
    assert other != folder
    assert log == ["x", "y"]
    assert files(folder)["a.txt"]["size"] == 1


@pytest.mark.parametrize("damage", ["change", "delete", "add", "manifest"])
def test_a_damaged_artifact_is_built_again(tmp_path, damage):
    folder = Store(tmp_path).get("kind", {}, build_text("right"))
    if damage == "change":
        (folder / "a.txt").write_text("wrong", encoding="utf-8")
    elif damage == "delete":
        (folder / "a.txt").unlink()
    elif damage == "add":
        (folder / "b.txt").write_text("stray", encoding="utf-8")
    else:
        (folder / "manifest.json").write_text("{", encoding="utf-8")
    again = Store(tmp_path).get("kind", {}, build_text("right"))
    assert sorted(path.name for path in again.iterdir()) == ["a.txt", "manifest.json"]
    assert (again / "a.txt").read_text(encoding="utf-8") == "right"


def test_rebuild_builds_once_a_run(tmp_path):
    log = []
    Store(tmp_path).get("kind", {}, build_text("old", log))
    started = time.time()
    for _ in range(2):  # two processes of one run
        Store(tmp_path, rebuild_before=started).get("kind", {}, build_text("new", log))
    assert log == ["old", "new"]


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half", encoding="utf-8")
        raise ClipvalError("no")

    with pytest.raises(ClipvalError, match="no"):
        Store(tmp_path).get("kind", {}, fail)
    assert not [path for path in (tmp_path / "kind").iterdir() if path.suffix != ".lock"]


def test_a_build_that_resumes_finds_what_was_left(tmp_path):
    found = []

    def build(folder):
        found.append(sorted(path.name for path in folder.iterdir()))
        (folder / f"{len(found)}.txt").write_text("x", encoding="utf-8")
        if len(found) < 3:
            raise InputError("stopped")

    for _ in range(2):
        with pytest.raises(InputError, match="stopped"):
            Store(tmp_path).get("kind", {}, build, resumes=True)
    folder = Store(tmp_path).get("kind", {}, build, resumes=True)
    assert found == [[], ["1.txt"], ["1.txt", "2.txt"]]
    assert set(files(folder)) == {"1.txt", "2.txt", "3.txt"}
    assert Store(tmp_path).get("kind", {"other": 1}, build, resumes=True) != folder
    assert found[-1] == []


def test_a_full_disk_is_one_line(tmp_path):
    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))

    with pytest.raises(InputError, match="disk full; free some space"):
        Store(tmp_path).get("kind", {}, fail)


def test_a_work_directory_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "w").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        Store(tmp_path / "w").get("kind", {}, build_text("x"))


def slow(root, log):
    def build(folder):
        with open(log, "a", encoding="utf-8") as stream:
            stream.write("built\n")
        (folder / "half").write_text("half", encoding="utf-8")
        time.sleep(0.3)
        (folder / "a.txt").write_text("whole", encoding="utf-8")

    Store(root).get("kind", {}, build)


def test_processes_build_once(tmp_path):
    log = tmp_path / "log"
    processes = [multiprocessing.Process(target=slow, args=(tmp_path, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text(encoding="utf-8") == "built\n"


def test_a_killed_build_is_not_used(tmp_path):
    log = tmp_path / "log"
    process = multiprocessing.Process(target=slow, args=(tmp_path, log))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    slow(tmp_path, log)
    (folder,) = [path for path in (tmp_path / "kind").iterdir() if path.is_dir()]
    assert (folder / "a.txt").read_text(encoding="utf-8") == "whole"
    assert log.read_text(encoding="utf-8") == "built\nbuilt\n"


def test_paths_of_any_script(tmp_path):
    folder = Store(tmp_path / "工作 目录").get("种类", {"名": "值"}, build_text("x"))
    assert (folder / "a.txt").is_file()


def test_threads_that_ask_for_one_file_read_it_once(tmp_path, monkeypatch):
    (tmp_path / "atc").write_bytes(b"a compiler")
    read, real = [], store.sha256

    def slow(path):
        read.append(path)
        time.sleep(0.2)
        return real(path)

    monkeypatch.setattr(store, "sha256", slow)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(store.once, [tmp_path / "atc"] * 4))
    assert found == {real(tmp_path / "atc")}
    assert len(read) == 1


def test_what_failed_is_not_built_again_by_the_same_run(tmp_path):
    tries = []

    def build(folder):
        tries.append(folder)
        raise InputError("a compiler that takes minutes to fail")

    kept = Store(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match="minutes to fail"):
            kept.get("om", {"batch": 8}, build)
    assert len(tries) == 1
    with pytest.raises(InputError):
        Store(tmp_path).get("om", {"batch": 8}, build)
    assert len(tries) == 2


STAGES = {
    "preprocess": {"arrays", "datasets.images", "model", "preprocess", "towers"},
    "export": {"export", "model", "towers"},
    "embeddings": {"arrays", "embeddings", "towers"},
    "backends.pytorch": {"backends", "backends.pytorch", "towers"},
    "datasets.shapes": {"datasets.shapes"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_artifact_depends_on_what_its_stage_imports(stage):
    found = {name[len("clipval.") :] for name in store.stage_modules(f"clipval.{stage}")}
    assert STAGES[stage] <= found
    assert not {"options", "spec", "chain"} & found, "every change of an option would build all artifacts again"


@pytest.mark.parametrize(("changed", "counts"), [("a", True), ("b", True), ("sub.c", True), ("d", False), ("e", False)])
def test_code_of_another_module_counts_where_it_is_imported(changed, counts, tmp_path, monkeypatch):
    package = f"stages_{changed.replace('.', '_')}"
    folder = tmp_path / package
    (folder / "sub").mkdir(parents=True)
    files = {
        "__init__": "",
        "a": f"from {package} import b",
        "b": f"def later():\n    from {package}.sub.c import value",
        "sub/__init__": "",
        "sub/c": f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {package}.d\nvalue = 1",
        "d": "",
        "e": "",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = store.code_hash.__wrapped__(f"{package}.a")
    with open(folder / f"{changed.replace('.', '/')}.py", "a", encoding="utf-8") as stream:
        stream.write("\n# changed")
    assert (store.code_hash.__wrapped__(f"{package}.a") != before) == counts
