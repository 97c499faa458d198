"""The check of a host, with one piece taken away at a time."""

import os
import re
import shutil
import sys

import pytest

from clipval.ascend import aclruntime
from clipval.ascend import host as hosts
from clipval.errors import BackendUnavailable
from tests.simulator import BIN, LIB, environment

TOOLKIT = "usr/local/Ascend/ascend-toolkit"
REQUIRED = ["driver", "device files", "CANN", "set_env.sh", "atc", "aclruntime", "npu-smi", "chip"]


class Host:
    """A root directory and a process environment with every piece of an NPU host."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        self.write("usr/local/Ascend/driver/version.info", "Version=23.0.3\nascendhal_version=7.35\n")
        self.write(f"{TOOLKIT}/set_env.sh", "")
        self.write(f"{TOOLKIT}/latest/aarch64-linux/ascend_toolkit_install.info", "version=8.0.RC3\n")
        for name in ("davinci0", "davinci1", "davinci_manager"):
            self.write(f"dev/{name}", "")
        self.bin = root / "bin"
        self.bin.mkdir()
        for name in ("atc", "npu-smi"):
            (self.bin / name).symlink_to(BIN / name)
        (self.bin / "python3").symlink_to(sys.executable)
        self.switch()
        monkeypatch.syspath_prepend(str(LIB))

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def switch(self, **switches):
        variables = {**environment(**switches), "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin"}
        variables.update(ASCEND_TOOLKIT_HOME=f"/{TOOLKIT}/latest", ASCEND_HOME_PATH=f"/{TOOLKIT}/latest")
        for name, value in variables.items():
            self.monkeypatch.setenv(name, value)

    def check(self, device_id=0, runtime="aclruntime"):
        return {finding.name: finding for finding in hosts.check_host(device_id, self.root, runtime)}

    def lacking(self, runtime="aclruntime"):
        return [name for name, one in self.check(0, runtime).items() if not one.ok and one.required]


@pytest.fixture
def host(tmp_path, monkeypatch):
    before = {name: sys.modules.pop(name, None) for name in ("aclruntime", "acl")}
    yield Host(tmp_path, monkeypatch)
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_a_whole_host(host):
    found = host.check()
    assert [name for name, finding in found.items() if finding.required] == REQUIRED
    assert host.lacking() == []
    assert found["driver"].detail == "23.0.3"
    assert found["CANN"].detail == "8.0.RC3"
    assert found["device files"].detail == "davinci0, davinci1"
    assert found["chip"].detail == "Ascend910B4, NPU 0 chip 0 is device 0, health OK"
    assert found["idle"].detail == "2900 of 32768 MB in use, no process"
    assert not any(finding.advice for finding in found.values() if finding.ok)


def remove(path):
    def take(host):
        target = host.root / path
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()

    return take


def unset(*names):
    def take(host):
        for name in names:
            host.monkeypatch.delenv(name)

    return take


def fault(name):
    return lambda host: host.switch(fault=name)


def no_module(host):
    host.monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(LIB)])


@pytest.mark.parametrize(
    ("take", "lacking", "words"),
    [
        (remove("usr/local/Ascend/driver"), ["driver"], "install the NPU driver"),
        (remove("dev"), ["device files"], "load the driver"),
        (remove("dev/davinci_manager"), ["device files"], "no .*davinci_manager"),
        (remove(f"{TOOLKIT}/latest/aarch64-linux"), ["CANN"], "install the CANN toolkit"),
        (remove("usr/local/Ascend/ascend-toolkit"), ["CANN", "set_env.sh"], "install the CANN toolkit"),
        (unset("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"), ["set_env.sh"], "source .*set_env.sh in the shell"),
        (unset("ASCEND_OPP_PATH"), ["set_env.sh"], "ASCEND_OPP_PATH is not set"),
        (remove("bin/atc"), ["atc"], "set_env.sh"),
        (no_module, ["aclruntime"], "install its wheel|pyACL, which comes with CANN"),
        (fault("no_ascendcl"), ["aclruntime"], "libascendcl.so"),
        (remove("bin/npu-smi"), ["npu-smi", "chip"], "not found on PATH"),
        (fault("no_npu"), ["chip"], "no NPU card"),
    ],
)
def test_one_piece_less(host, take, lacking, words):
    take(host)
    assert host.lacking() == lacking
    finding = host.check()[lacking[0]]
    assert finding.advice
    assert re.search(words, f"{finding.detail} {finding.advice}"), finding


def test_busy_is_told_but_not_required(host):
    host.switch(fault="busy")
    assert host.lacking() == []
    idle = host.check()["idle"]
    assert not idle.ok
    assert "31415" in idle.detail


@pytest.mark.parametrize("release", ["8.5.0", "9.0.0", "9.1.0"])
def test_newer_cann_has_another_place_and_needs_operators(host, release):
    shutil.rmtree(host.root / TOOLKIT)
    home = f"usr/local/Ascend/cann-{release}"
    host.write(f"{home}/set_env.sh", "")
    host.write(f"{home}/aarch64-linux/ascend_toolkit_install.info", f"version={release}\n")
    (host.root / "usr/local/Ascend/cann").symlink_to(f"cann-{release}")
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        host.monkeypatch.setenv(name, f"/{home}")
    found = host.check()
    assert host.lacking() == []
    assert found["CANN"].detail == release
    assert "Ascend/cann/set_env.sh, sourced" in found["set_env.sh"].detail
    assert not found["CANN's operators"].ok
    assert "install the Ascend-cann-<chip>-ops package" in found["CANN's operators"].advice
    host.write(
        f"{home}/aarch64-linux/ascend_ops_install.info", f"package_name=Ascend-cann-310p-ops\nversion={release}\n"
    )
    assert host.check()["CANN's operators"].detail == f"Ascend-cann-310p-ops {release}"


def distribution(folder, name, version):
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


@pytest.mark.parametrize(
    ("parts", "packages", "ok", "words"),
    [
        ([], [], True, "not installed; clipval does not need it"),
        (["infer"], [("ais_bench", "0.0.2")], True, "the inference tool, 0.0.2"),
        (["infer"], [], True, "the inference tool, of unknown version"),
        (
            ["benchmark"],
            [("ais_bench_benchmark", "3.0.1")],
            False,
            "ais_bench_benchmark 3.0.1, which evaluates language",
        ),
        (["benchmark"], [], False, "evaluates language models"),
        (["infer", "benchmark"], [("ais_bench_benchmark", "3.0.1")], False, "overwritten the inference tool"),
        (["other"], [], False, "without the inference tool"),
    ],
)
def test_two_projects_are_called_ais_bench(host, tmp_path, parts, packages, ok, words):
    site = tmp_path / "site"
    for part in parts:
        (site / "ais_bench" / part).mkdir(parents=True)
        (site / "ais_bench/__init__.py").write_text("raise RuntimeError('doctor imports nothing')")
    for name, version in packages:
        distribution(site, name, version)
    host.monkeypatch.syspath_prepend(str(site))
    finding = host.check()["ais_bench"]
    assert (finding.ok, finding.required) == (ok, False)
    assert words in finding.detail
    assert ok or "ais_bench 0.0.2" in finding.advice


def test_pyacl_is_told_without_importing_it(host, tmp_path):
    assert "--om-runtime pyacl" in host.check()["pyACL"].detail
    assert "acl" not in sys.modules
    no_module(host)
    assert not host.check()["pyACL"].ok
    (tmp_path / "site").mkdir()
    (tmp_path / "site/acl.py").write_text("raise RuntimeError('doctor imports nothing')")
    host.monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "site/acl.py" in host.check()["pyACL"].detail


@pytest.mark.parametrize("python", [(3, 7), (3, 8), (3, 12)])
def test_pythons_with_a_wheel(python):
    assert aclruntime.wheel_advice(python) == "install its wheel (not on PyPI, see requirements-npu.txt)"


def test_pythons_without_a_wheel():
    advice = aclruntime.wheel_advice((3, 13))
    assert advice.startswith("it has wheels for Python 3.7 to 3.12, not for 3.13")
    assert "pyACL, which comes with CANN" in advice


def test_where_pyacl_runs_om_files_no_aclruntime_is_needed(host, monkeypatch):
    file = host.root / "modules" / "acl.py"
    host.write("modules/acl.py", "rt = mdl = None\n")
    no_module(host)
    assert host.lacking() == ["aclruntime"]
    found = host.check(runtime="pyacl")
    assert (found["pyACL"].ok, found["pyACL"].required) == (False, True)
    assert "source" in found["pyACL"].advice
    assert found["aclruntime"] == ("aclruntime", True, False, "not installed; --om-runtime pyacl does not need it", "")
    monkeypatch.syspath_prepend(str(file.parent))
    assert host.lacking("pyacl") == []
    assert host.check(runtime="pyacl")["pyACL"].detail == f"imports, {file}"


def test_another_module_called_acl_is_not_pyacl(host, monkeypatch):
    host.write("modules/acl.py", "")
    monkeypatch.syspath_prepend(str(host.root / "modules"))
    finding = host.check(runtime="pyacl")["pyACL"]
    assert not finding.ok
    assert "the module acl is not pyACL but" in finding.detail


def test_a_device_that_is_not_there(host):
    assert "no NPU has logic id 9" in host.check(9)["chip"].detail


def test_nothing_at_all(tmp_path, monkeypatch):
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "aclruntime", None)
    found = hosts.check_host(0, tmp_path)
    assert [finding.name for finding in found if finding.required and not finding.ok] == REQUIRED
    assert all(finding.advice for finding in found if not finding.ok)


def test_an_unexpected_error_hides_no_other_line(host, monkeypatch):
    def broken():
        raise OSError("input/output error")

    monkeypatch.setattr(hosts.npu_smi, "version", broken)
    assert host.lacking() == ["npu-smi"]
    assert "OSError: input/output error" in host.check()["npu-smi"].detail

    def unavailable(device_id):
        raise BackendUnavailable("npu-smi: gone; fix it")

    monkeypatch.setattr(hosts.npu_smi, "npu", unavailable)
    assert host.check()["chip"][3:] == ("npu-smi: gone", "fix it")
