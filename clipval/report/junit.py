"""A run as a JUnit file, one case per gate, for a run that pytest could not report."""

from __future__ import annotations

from xml.etree import ElementTree

from clipval.report.run import Run
from clipval.results import FAIL


def junit(run: Run, ended: str) -> bytes:
    """The file's content; a promised gate that was not evaluated is an error.

    Args:
        ended: how the run ended, as text.
    """
    gates = list(dict.fromkeys([*(one.gate for one in run.figures), *run.missing]))
    failed = {gate: [one.message for one in run.figures if one.gate == gate and one.verdict == FAIL] for gate in gates}
    suite = ElementTree.Element("testsuite", name="clipval", timestamp=run.started, time=f"{run.seconds:.3f}")
    suite.set("tests", str(len(gates)))
    suite.set("failures", str(sum(map(bool, failed.values()))))
    suite.set("errors", str(sum(gate in run.missing and not failed[gate] for gate in gates)))
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", classname="clipval", name=gate)
        if failed[gate]:
            ElementTree.SubElement(case, "failure", message=_clean("\n".join(failed[gate])))
        elif gate in run.missing:
            ElementTree.SubElement(case, "error", message=_clean(f"not evaluated: {ended}"))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    return bytes(ElementTree.tostring(root, encoding="utf-8"))


def _clean(text: str) -> str:
    """Remove control characters other than tab and line ends, which XML forbids and a runtime's message may have."""
    return "".join(one if one in "\t\n\r" or one.isprintable() else "?" for one in text)
