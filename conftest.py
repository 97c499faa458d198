"""Pytest wiring over `clipval`: options, parameters, fixtures, and the ledger that keeps a run honest.

What --backends names is required: a skip, a missing runtime or a gate that was not evaluated is a failure.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from clipval import evidence, gates, ledger, options, perf, report
from clipval.backends import REFERENCE, kind
from clipval.chain import Chain
from clipval.errors import ClipvalError
from clipval.results import FAIL, from_json, to_json
from clipval.throughput import baseline
from clipval.towers import TOWER_NAMES

ROOT = Path(__file__).parent
ACCEPTANCE = ROOT / "tests" / "acceptance"
ABSENT = "absent"
CHAIN, LEDGER, STARTED, FIGURES = (pytest.StashKey() for _ in range(4))


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.has_plugin("clipval-options"):  # clipval is run from its folder without being installed
        options.pytest_addoption(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Start again with our pytest.ini where pytest took another folder of the command line for the tests' root.

    It does so for the value of an option that is an existing path outside this project, before any plugin is loaded.
    """
    ini, args = ROOT / "pytest.ini", [str(argument) for argument in config.invocation_params.args]
    if config.inipath != ini and config.option.inifilename is None and args == sys.argv[1:]:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", "-c", str(ini), *args])


def pytest_configure(config):
    settings = _shared_threads(config, options.Settings.of(config.option))
    config.option.markexpr = config.option.markexpr or "not proof and not sweep"
    config.stash[STARTED] = getattr(config, "workerinput", {}).get("clipval_started", time.time())
    config.stash[CHAIN] = Chain(settings, config.stash[STARTED] if settings.rebuild else None)
    json_file = getattr(config.option, "benchmark_json", None)
    if json_file:  # pytest-benchmark would lose every figure at the end for want of its folder
        file = json_file if isinstance(json_file, Path) else Path(json_file.name)  # pytest-benchmark 4 opens it itself
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        promised = _promise(config)
    except ClipvalError as error:
        raise pytest.UsageError(str(error)) from None
    notes = ["throughput: several workers cannot measure it"] if _distributed(config) else []
    config.stash[LEDGER] = ledger.Ledger(promised, ledger.results_file(settings.workdir), notes)
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(Keeper(config, config.stash[LEDGER]), "clipval-keeper")


def _shared_threads(config, settings):
    """Workers of xdist share the cores: with all threads in each, torch spends its time waiting for its own threads."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1 and settings.threads is None:
        return dataclasses.replace(settings, threads=max(1, (os.cpu_count() or 1) // workers))
    return settings


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["clipval_started"] = node.config.stash[STARTED]


def _promise(config):
    """Gates that this run must evaluate; a selection of tests promises nothing unless backends are named."""
    chain, settings = config.stash[CHAIN], config.stash[CHAIN].settings
    spec = chain.spec  # read here, so that a mistake in it is a usage error of any run
    narrowed = config.option.keyword or config.getoption("lf", False) or _selected_paths(config)
    if hasattr(config, "workerinput") or config.option.collectonly:
        return []
    kinds = ledger.kinds(config.option.markexpr)
    compared = _compared(settings, kinds)
    if narrowed and not settings.strict:
        return compared
    if _distributed(config) and gates.PERF in kinds:
        if settings.strict or compared or gates.ACCURACY not in kinds:
            raise pytest.UsageError("throughput cannot be measured by several workers at once; run perf without -n")
        kinds.remove(gates.PERF)
    return gates.expected(spec, settings.validated, chain.batch_sizes, kinds, chain.trained) + compared


def _compared(settings, kinds):
    """The gate that a baseline promises, which is read now: a comparison that was asked for is made, or fails."""
    if settings.baseline is None:
        return []
    baseline.load(settings.baseline)
    if gates.PERF not in kinds:
        raise pytest.UsageError("--baseline compares throughput, which -m leaves out; add perf to it")
    return [perf.BASELINE_ROWS]


def _selected_paths(config):
    """Tests that were named on the command line, less those that name all of them."""
    given = [Path(str(name).split("::")[0]).absolute() for name in config.option.file_or_dir or ()]
    return [path for path in given if path not in (ROOT, ROOT / "tests", ACCEPTANCE)]


def _distributed(config):
    return hasattr(config, "workerinput") or bool(getattr(config.option, "numprocesses", None))


def pytest_generate_tests(metafunc):
    if ACCEPTANCE not in Path(str(metafunc.definition.path)).parents:
        return
    chain = metafunc.config.stash[CHAIN]
    validated = chain.settings.validated
    axes = {
        "tower_name": list(TOWER_NAMES),
        "backend_name": list(validated),
        "candidate_name": [name for name in validated if name != REFERENCE],
        "onnx_backend": [name for name in validated if kind(name).takes_onnx],
        "golden_tower": list(TOWER_NAMES) if chain.spec.golden else [],
        "batch_size": list(chain.batch_sizes),
        "metric": gates.gated_metrics(chain.spec),
        "baseline_file": [chain.settings.baseline] if chain.settings.baseline else [],
        "paired_metric": [bounds.metric for bounds in chain.spec.paired],
    }
    for name, found in axes.items():
        if name in metafunc.fixturenames:
            found = found or [ABSENT]
            metafunc.parametrize(name, found, ids=[f"bs{one}" if name == "batch_size" else str(one) for one in found])


def pytest_collection_modifyitems(config, items):
    """Leave out what cannot apply: recall of random weights, gates of a lone backend, perf under several workers."""
    trained = config.stash[CHAIN].trained
    drop = []
    for item in items:
        absent = hasattr(item, "callspec") and any(value is ABSENT for value in item.callspec.params.values())
        recall = not trained and item.path == ACCEPTANCE / "test_recall.py"
        perf = _distributed(config) and item.get_closest_marker("perf") is not None
        if absent or recall or perf:
            drop.append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = [item for item in items if item not in drop]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """One clear error for missing data or weights, before anything is built."""
    if session.config.stash[LEDGER].expected:
        try:
            session.config.stash[CHAIN].check_inputs()
        except ClipvalError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def chain(pytestconfig):
    """The chain of this session: every artifact and backend, each built or opened once."""
    yield pytestconfig.stash[CHAIN]
    pytestconfig.stash[CHAIN].close()


@pytest.fixture
def record(request):
    """Take the figures of a gate: into the results, the JUnit file and the report; fail when one of them failed."""

    def record(figures):
        request.node.stash.setdefault(FIGURES, []).extend(figures)
        request.node.user_properties.extend((f"{one.gate} {one.metric}", one.measured) for one in figures)
        rows = [(f"{one.gate} is", evidence.row_verdict(one)) for one in figures]
        request.node.user_properties.extend(row for row in rows if row[1])
        failed = [one.message for one in figures if one.verdict == FAIL]
        assert figures, "a gate without a figure"
        if failed:
            pytest.fail("\n".join(failed), pytrace=False)

    return record


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Send figures along with the report (also from an xdist worker), one line for our errors, and no skips."""
    outcome = yield
    made = outcome.get_result()
    if ACCEPTANCE not in item.path.parents:
        return
    if call.excinfo is not None and isinstance(call.excinfo.value, ClipvalError):
        made.longrepr = str(call.excinfo.value)
    if made.skipped:  # an expected failure too
        made.outcome = "failed"
        made.longrepr = f"{item.name}: skipped, and a gate must not be skipped: {made.longrepr}"
    if made.when == "call":
        made.clipval_figures = [to_json(figure) for figure in item.stash.get(FIGURES, [])]
    if made.failed:
        made.clipval_failure = _failure(item, call)


def _failure(item, call):
    failed = [figure.failure for figure in item.stash.get(FIGURES, []) if figure.verdict == FAIL]
    kind = failed[0] if failed else getattr(getattr(call.excinfo, "value", None), "kind", "error")
    return {
        "class": kind,
        "test": item.nodeid,
        "message": str(getattr(call.excinfo, "value", "passed, expected to fail")),
    }


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """A gate module that skips itself is a failure too."""
    outcome = yield
    made = outcome.get_result()
    if made.skipped and ACCEPTANCE in Path(str(collector.path)).parents:
        made.outcome = "failed"
        made.longrepr = f"{collector.nodeid}: skipped, and gates must not be skipped: {made.longrepr}"


class Keeper:
    """Keeps the account of a run in the process that reports it: the only one, or the controller of xdist."""

    def __init__(self, config, account):
        self.config = config
        self.account = account

    def pytest_runtest_logreport(self, report):
        self.account.add([from_json(text) for text in getattr(report, "clipval_figures", ())])
        if hasattr(report, "clipval_failure"):
            self.account.failures.append(report.clipval_failure)

    def pytest_collectreport(self, report):
        if report.failed:
            self.account.failures.append({"class": "error", "test": report.nodeid, "message": str(report.longrepr)})

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session, exitstatus):
        """A promised gate without a figure fails the run, whatever pytest makes of it (no tests ran, all passed)."""
        if exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR) and not self.account.failures:
            message = "the run ended before its tests did"
            self.account.failures.append({"class": "error", "test": "session", "message": message})
        if self.account.failed and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        account = self.account
        if exitstatus == pytest.ExitCode.USAGE_ERROR or not (account.figures or account.expected):
            return
        terminalreporter.section("clipval")
        run = account.run(self.config.stash[CHAIN])
        terminalreporter.write_line(report.summary_table(run))
        if account.figures:
            terminalreporter.write_line(f"figures: {account.file}")
        for path in self._write(run):
            terminalreporter.write_line(f"report: {path}")

    def _write(self, run):
        chain = self.config.stash[CHAIN]
        if chain.settings.report is None:
            return []
        try:
            return report.write(chain.settings.report, run, report.Assets(chain.image_path, chain.caption))
        except ClipvalError as error:
            return [str(error)]
