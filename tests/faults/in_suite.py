"""Faults of the run itself: gates that are skipped, lost, left out or cut short."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

import msgspec
import pytest

from clipval.backends.onnx import OnnxBackend
from clipval.gates import parity
from clipval.plugin import Keeper, Recorder
from tests.faults.in_backends import output
from tests.faults.table import ACCURACY, fault


@fault("a gate that is skipped", "parity/onnx/text", "a gate must not be skipped")
def skipped_gate() -> None:
    return None  # done when tests are collected


@fault("a gate that is not collected", "parity/onnx/text", "not evaluated",
       arguments=(*ACCURACY, "--backends=pytorch,onnx"))  # fmt: skip
def lost_gate() -> None:
    return None  # done when tests are collected


@fault("an empty run", "prepared/data/vision", "not evaluated",
       arguments=(*ACCURACY, "--backends=pytorch,onnx", "-k", "nothing"))  # fmt: skip
def empty_run() -> None:
    return None


@fault("the file of the parity gates is ignored", "parity/onnx/text", "not evaluated",
       arguments=(*ACCURACY, "--ignore=tests/acceptance/test_parity.py"))  # fmt: skip
def ignored_file() -> None:
    return None


@fault("a gate that is deselected", "parity/onnx/text", "not evaluated",
       arguments=(*ACCURACY, "--deselect=tests/acceptance/test_parity.py::test_parity"))  # fmt: skip
def deselected_gate() -> None:
    return None


@fault("gates that are planned and not run", "values/pytorch/vision", "not evaluated",
       arguments=(*ACCURACY, "--setup-plan"))  # fmt: skip
def planned_only() -> None:
    return None


@fault("a gate that is expected to fail", "parity/onnx/text", "a gate must not be skipped")
def expected_failure() -> None:
    output(lambda rows: -rows)  # and the mark is set when tests are collected


@fault("a run that is ended early with exit code 0", "invariance/onnx/text", "not evaluated")
def ended_early() -> None:
    OnnxBackend.run = lambda self, rows: pytest.exit("done", returncode=0)  # type: ignore[method-assign]


@fault("a gate file that does not import", "values/pytorch/vision", "tests.acceptance.test_parity", "not evaluated",
       code=2)  # fmt: skip
def broken_import() -> None:
    sys.modules["tests.acceptance.test_parity"] = None  # type: ignore[assignment]


@fault("a runtime that ends the process with exit code 0", "clipval: FAIL", "before its verdict")
def process_ended() -> None:
    OnnxBackend.run = lambda self, rows: os._exit(0)  # type: ignore[method-assign]


@fault("an exit hook that turns exit code 1 into 0", "parity/onnx/text", "its exit hooks changed that to 0")
def exit_code_changed() -> None:
    output(lambda rows: -rows)
    atexit.register(os._exit, 0)


def recorded(keep: Any) -> None:
    """Record only some of a gate's figures."""
    real = Recorder.__call__
    Recorder.__call__ = lambda self, figures: real(self, keep(figures))  # type: ignore[method-assign]


@fault("only the first figure of each gate recorded", "values/onnx/text", "not evaluated")
def first_figure_only() -> None:
    recorded(lambda figures: figures[:1])


@fault("figures that fail not recorded", "values/onnx/text", "not evaluated")
def failed_figures_dropped() -> None:
    output(lambda rows: rows * 1.01)
    recorded(lambda figures: [one for one in figures if one.verdict != "fail"])


@fault("a figure for a gate that no test promised", "parity/onnx/other", "no test promised")
def unpromised_figure() -> None:
    real = parity.agreement

    def agreement(*arguments: Any) -> Any:
        figures = real(*arguments)
        return [*figures, msgspec.structs.replace(figures[0], gate="parity/onnx/other")]

    parity.agreement = agreement


@fault("a plugin that sets the exit code to 0 when the tests are done", "parity/onnx/text",
       "something changed its exit code")  # fmt: skip
def exit_code_reset() -> None:
    output(lambda rows: -rows)  # and the plugin comes when tests are collected


@fault("a plugin that takes the account of the run away", "clipval: FAIL", "something changed its exit code")
def account_lost() -> None:
    return None  # done when tests are collected


THREADED = (*ACCURACY, "-p", "tests.faults.threaded")


@fault("a runtime that ends the process with exit code 0, beside threads of other plugins", "clipval: FAIL",
       "before its verdict", arguments=THREADED)  # fmt: skip
def process_with_threads_ended() -> None:
    process_ended()


@fault("an exit hook that turns exit code 1 into 0, beside threads of other plugins", "parity/onnx/text",
       "its exit hooks changed that to 0", arguments=THREADED)  # fmt: skip
def exit_code_changed_with_threads() -> None:
    exit_code_changed()


class ResetsExitCode:
    """A plugin, as those that let failures pass in a pipeline."""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: Any) -> None:
        session.exitstatus = 0


def collected(items: Any, name: str) -> None:
    """Do to the collected tests what a fault says."""
    plugins = items[0].config.pluginmanager if items else None
    if name == "exit_code_reset":
        plugins.register(ResetsExitCode())
    elif name == "account_lost":
        for plugin in [one for one in plugins.get_plugins() if isinstance(one, Keeper)]:
            plugins.unregister(plugin)
    parity = [item for item in items if item.name.startswith("test_parity[")]
    if name == "skipped_gate":
        for item in parity:
            item.add_marker(pytest.mark.skip(reason="no time"))
    elif name == "expected_failure":
        for item in parity:
            item.add_marker(pytest.mark.xfail(reason="known", strict=False))
    elif name == "lost_gate":
        items[:] = [item for item in items if item not in parity]
