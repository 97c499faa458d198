"""Integrity of a run under pytest: the promised gates, no skips, the record of figures, the verdict.

Backends named by --backends are required: a skip, a missing runtime or a gate that was not evaluated is a failure.
Acceptance tests name their gate, `@pytest.mark.gate(VALUES)`; its cases become parameters and its kind a mark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, Generator, List, Optional, Sequence, Tuple

import msgspec
import pytest

from clipval import gates, options, promise, report, rescue, supervise
from clipval.ascend import process, watchdog
from clipval.chain import Chain
from clipval.errors import ClipvalError
from clipval.report import Failure
from clipval.report.wording import row_verdict
from clipval.results import FAIL, Figure, from_json, to_json
from clipval.run import Account, Message
from clipval.towers import TOWER_NAMES

CHAIN: pytest.StashKey[Chain] = pytest.StashKey()
ACCOUNT: pytest.StashKey[Account] = pytest.StashKey()
STARTED: pytest.StashKey[float] = pytest.StashKey()
UNWATCHED: pytest.StashKey[str] = pytest.StashKey()
FIGURES: pytest.StashKey[List[Figure]] = pytest.StashKey()
BEGUN: pytest.StashKey[bool] = pytest.StashKey()
PASSED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    options.pytest_addoption(parser)  # for runs without an installed clipval, or from another folder


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, None]:
    """Run under supervision, and with our pytest.ini.

    pytest picks another root directory if an option's value is an existing path outside this project; it does so before
    any plugin is loaded, so the only fix is to start again.
    """
    ini, args = _root(config) / "pytest.ini", [str(argument) for argument in config.invocation_params.args]
    if args == sys.argv[1:] and not hasattr(config, "workerinput"):  # not for a program that calls pytest.main
        if config.inipath != ini and config.option.inifilename is None:
            os.execv(sys.executable, [sys.executable, "-m", "pytest", "-c", str(ini), *args])
        config.stash[UNWATCHED] = supervise.why_not()
        began = time.time()
        again = [sys.executable, *getattr(sys, "orig_argv", ["", "-m", "pytest", *args])[1:]]
        save = partial(_save, config, began)
        code = None if config.stash[UNWATCHED] else supervise.start(again, partial(_say, config), save)
        if code is not None:
            os._exit(code)  # the child has already run all exit hooks
    elif not hasattr(config, "workerinput"):
        config.stash[UNWATCHED] = "another program runs pytest"
    outcome = yield
    if outcome.excinfo is None:
        if outcome.get_result() in PASSED and config.stash.get(BEGUN, False) and config.stash[ACCOUNT].failed:
            _say(config, "clipval: FAIL: the run failed, but something changed its exit code to that of a pass")
            outcome.force_result(pytest.ExitCode.TESTS_FAILED)
        supervise.close(outcome.get_result())


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    config.stash[BEGUN] = not hasattr(config, "workerinput") and not config.option.collectonly


def _say(config: pytest.Config, line: str) -> None:
    capture = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
        print(line, file=sys.stderr, flush=True)


def _save(config: pytest.Config, began: float, child: int, ended: str) -> Optional[int]:
    """Save what is left of a run without a verdict; another exit code, if that is known better."""
    try:
        found = rescue.save(Chain(options.Settings.of(config.option)), _line(config), child, ended, began)
    except Exception as error:  # the run has failed already; what the exit code says must stay
        _say(config, f"clipval: no report of the run could be written ({error})")
        return None
    for line in found.lines if found else ():
        _say(config, line)
    return found.code if found else None


def _root(config: pytest.Config) -> Path:
    """The folder of the conftest.py that uses this plugin."""
    found = next(one for one in config.pluginmanager.get_plugins() if __name__ in getattr(one, "pytest_plugins", ()))
    return Path(str(found.__file__)).parent


def _acceptance(config: pytest.Config) -> Path:
    return (_root(config) / "tests" / "acceptance").resolve()


def pytest_configure(config: pytest.Config) -> None:
    process.keep_torch_npu_out()
    settings = _shared_threads(config, options.Settings.of(config.option))
    config.stash[STARTED] = getattr(config, "workerinput", {}).get("clipval_started", time.time())
    if not config.option.verbose and hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # its tables by the host's clock: the summary has one by each row's own
    reports = not hasattr(config, "workerinput") and not config.option.collectonly
    try:
        config.stash[CHAIN] = Chain(settings, config.stash[STARTED] if settings.rebuild else None)
        config.stash[ACCOUNT] = promise.account(config.stash[CHAIN], _line(config))
        if reports:
            promise.check_outputs(config.option)
    except ClipvalError as error:
        raise pytest.UsageError(str(error)) from None
    unwatched = config.stash.get(UNWATCHED, "")
    if unwatched:
        config.stash[ACCOUNT].notes.append(f"the exit code: nothing watches this process, since {unwatched}")
    watched = os.getppid() if supervise.watched() else None
    watchdog.tell(results=str(config.stash[ACCOUNT].file.absolute()), also=watched, say=os.dup(2))
    if reports:
        config.pluginmanager.register(Keeper(config))  # without a name, so that -p no:NAME cannot disable it


def _line(config: pytest.Config) -> promise.Line:
    return promise.Line(
        config.option,
        folder=config.invocation_params.dir,
        acceptance=_acceptance(config),
        distributed=_distributed(config),
        timer=config.pluginmanager.has_plugin("benchmark"),
    )


def _shared_threads(config: pytest.Config, settings: options.Settings) -> options.Settings:
    """Divide the cores among xdist workers: with all threads in each, torch's threads mostly wait for each other."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1 and settings.threads is None:
        return dataclasses.replace(settings, threads=max(1, (os.cpu_count() or 1) // workers))
    return settings


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["clipval_started"] = node.config.stash[STARTED]


def _distributed(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput") or bool(getattr(config.option, "numprocesses", None))


def _gate(item: pytest.Item) -> Optional[gates.Gate]:
    marker = item.get_closest_marker("gate")
    return marker.args[0] if marker else None


def _gate_id(item: pytest.Item) -> str:
    """Id of the gate that a test evaluates; empty for any other test."""
    gate = _gate(item)
    if gate is None:
        return ""
    given = item.callspec.params if gate.params else {}  # type: ignore[attr-defined]
    return gate.of(*(given[name] for name in gate.params))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case of its gate; if the gate does not apply to this run, one that is dropped later."""
    marker = metafunc.definition.get_closest_marker("gate")
    if marker is None or not marker.args[0].params:
        return
    params = marker.args[0].params
    cases = marker.args[0].cases(promise.plan(metafunc.config.stash[CHAIN]))
    names = ["-".join(f"bs{one}" if isinstance(one, int) else one for one in case) for case in cases]
    metafunc.parametrize(params, cases or [("absent",) * len(params)], ids=names or ["absent"])


def pytest_itemcollected(item: pytest.Item) -> None:
    gate = _gate(item)
    if gate is not None:
        item.add_marker(gate.kind)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Drop what does not apply: recall of random weights, gates of a lone backend, perf with several workers."""
    here, chosen = promise.plan(config.stash[CHAIN]), config.stash[ACCOUNT].chosen

    def applies(item: pytest.Item) -> bool:
        gate = _gate(item)
        if chosen is not None:
            return _gate_id(item) in chosen
        if gate is None:
            return True
        return _gate_id(item) in gate.ids(here) and not (gate.kind == gates.PERF and _distributed(config))

    dropped = [item for item in items if not applies(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if applies(item)]
    _by_backend(items, here.backends)


def _by_backend(items: List[pytest.Item], backends: Sequence[str]) -> None:
    """Group the gates by backend, the reference first, so that each backend is opened only once."""
    places = [n for n, item in enumerate(items) if _gate(item) is not None]

    def turn(item: pytest.Item) -> Tuple[bool, int]:
        gate, name = _gate(item), _given(item).get("backend_name")
        return gate is not None and gate.kind == gates.PERF, backends.index(name) if name else -1

    for n, item in zip(places, sorted((items[n] for n in places), key=turn)):
        items[n] = item


def _given(item: pytest.Item) -> Dict[str, Any]:
    """Parameter values of a gate's test."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def _expect(chain: Chain, item: pytest.Item) -> None:
    """Announce what a gate's test will open."""
    gate, given = _gate(item), _given(item)
    if gate is not None and "backend_name" in given:
        towers = [given["tower_name"]] if "tower_name" in given else TOWER_NAMES
        sizes = {given.get("batch_size", chain.accuracy_batch), *gate.also_in_batches_of}
        for tower, size in itertools.product(towers, sizes):
            chain.pool.expect(given["backend_name"], tower, size)


def pytest_collection_finish(session: pytest.Session) -> None:
    selected = [name for name in map(_gate_id, session.items) if name]
    for item in session.items:
        _expect(session.config.stash[CHAIN], item)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["clipval_selected"] = selected
    elif not _distributed(session.config):  # the controller of xdist collects nothing
        session.config.stash[ACCOUNT].selected = selected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    selected = getattr(node, "workeroutput", {}).get("clipval_selected")
    if selected is not None:
        node.config.stash[ACCOUNT].selected = selected


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """One clear error for data or weights that are missing or wrong, before anything is built of them."""
    config, account = session.config, session.config.stash[ACCOUNT]
    known = account.selected is not None or not account.deliberate
    if account.expected and known and not hasattr(config, "workerinput") and not config.option.collectonly:
        try:
            promise.check_inputs(config.stash[CHAIN], account.expected, alone=not _distributed(config))
        except ClipvalError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    watchdog.tell(gate=_gate_id(item))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    if "hypothesis" not in sys.modules and plugins.has_plugin("hypothesispytest"):
        plugins.unregister(name="hypothesispytest")  # imports the whole package to sum up no tests: a second or two


class Recorder:
    """Records the figures of one test in the results, the JUnit file and the report."""

    def __init__(self, item: pytest.Item) -> None:
        self.item = item

    def __call__(self, figures: Sequence[Figure]) -> None:
        """Record figures, and fail the test if one of them failed."""
        self.item.stash.setdefault(FIGURES, []).extend(figures)
        self.item.user_properties.extend((f"{one.gate} {one.metric}", one.measured) for one in figures)
        rows = [(f"{one.gate} is", row_verdict(one)) for one in figures]
        self.item.user_properties.extend(row for row in rows if row[1])
        failed = [one.message for one in figures if one.verdict == FAIL]
        assert figures, "a gate without a figure"
        if failed:
            pytest.fail("\n".join([*failed, _again(self.item)]), pytrace=False)


def _again(item: pytest.Item) -> str:
    return f"to judge this gate alone: {item.config.stash[ACCOUNT].again} --gate={_gate_id(item)}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Attach figures to the report (also from an xdist worker), show our errors on one line, and fail skips."""
    outcome = yield
    made = outcome.get_result()
    if _gate(item) is None:
        return
    error = call.excinfo.value if call.excinfo is not None else None
    if isinstance(error, ClipvalError):
        made.longrepr = f"{error}\n{_again(item)}"
    if isinstance(error, pytest.fail.Exception) and not error.pytrace:
        made.longrepr = str(error)
    if made.skipped:  # also an expected failure
        made.outcome = "failed"
        made.longrepr = f"{item.name}: skipped, and a gate must not be skipped: {made.longrepr}\n{_again(item)}"
    if made.when == "call":
        made.clipval_figures = [to_json(figure) for figure in item.stash.get(FIGURES, [])]
    if made.failed and _again(item) not in str(made.longrepr):  # below a traceback
        made.sections.append(("clipval", _again(item)))
    if made.failed:
        made.clipval_failure = msgspec.to_builtins(_failure(item, call))  # in a form that xdist can send


def _failure(item: pytest.Item, call: pytest.CallInfo[None]) -> Failure:
    failed = [figure.failure for figure in item.stash.get(FIGURES, []) if figure.verdict == FAIL]
    error = call.excinfo.value if call.excinfo is not None else "passed, expected to fail"
    kind = failed[0] if failed else getattr(error, "kind", "error")
    message = str(error).replace(f"\n{_again(item)}", "")
    return Failure(kind, item.nodeid, message, _gate_id(item))


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    """A gate module that skips itself fails."""
    outcome = yield
    made = outcome.get_result()
    if made.skipped and _acceptance(collector.config) in collector.path.parents:
        made.outcome = "failed"
        made.longrepr = f"{collector.nodeid}: skipped, and gates must not be skipped: {made.longrepr}"


class Keeper:
    """Keeps the record of a run in the process that reports it: the only one, or xdist's controller."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.account = config.stash[ACCOUNT]
        self.run: Optional[report.Run] = None
        self.written: Sequence[object] = ()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.account.add([from_json(text) for text in getattr(report, "clipval_figures", ())])
        if hasattr(report, "clipval_failure"):
            failure = Failure(**report.clipval_failure)
            if isinstance(report.longrepr, str):
                first = [one.gate for one in self.account.failures if one.message == failure.message]
                report.longrepr = Message(report.longrepr, f"the same error as {first[0]}" if first else "")
            self.account.failures.append(failure)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(report.nodeid, str(report.longrepr))

    def _failed(self, test: str, message: str) -> None:
        self.account.failures.append(Failure("error", test, message))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """A promised gate without a figure fails the run, whatever pytest's own result (no tests ran, all passed)."""
        if exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR) and not self.account.failures:
            self._failed("session", "the run ended before its tests did")
        if exitstatus != pytest.ExitCode.USAGE_ERROR and self._concerned():
            self.run = self.account.run(self.config.stash[CHAIN])
            self.written = self._write(self.run)
        if self.account.failed and exitstatus in PASSED:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        if self.run is None:
            return
        terminalreporter.section("clipval")
        terminalreporter.write_line(report.summary(self.run, self.config.option.verbose > 0))
        if self.account.figures:
            terminalreporter.write_line(f"figures: {self.account.file}")
        if self.written:
            terminalreporter.write_line(f"report: {', '.join(map(str, self.written))}")

    def _concerned(self) -> bool:
        """Whether the run is about gates: not if the given paths hold only other tests."""
        account = self.account
        others = "the paths given" in account.narrowed_by
        return bool(account.figures or account.expected or (account.left_out and not others))

    def _write(self, run: report.Run) -> Sequence[object]:
        chain = self.config.stash[CHAIN]
        if chain.settings.report is None:
            return []
        try:
            assets = report.Assets(lambda one: chain.dataset.image_path(one), lambda one: chain.dataset.caption(one))
            return report.write(chain.settings.report, run, assets)
        except ClipvalError as error:  # e.g. the disk is full by now, or the folder is gone
            self._failed("session", str(error))
            return [error]
