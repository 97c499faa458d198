"""The JUnit file of a run whose process was killed."""

from xml.etree import ElementTree

from clipval import report
from clipval.results import Figure


def test_a_case_per_gate():
    figures = [
        Figure(gate="parity/om/text", metric="minimum cosine", unit="cosine", verdict="pass", measured=1.0),
        Figure(gate="parity/om/text", metric="device call", unit="", verdict="fail", message="a \0 <call> hung"),
        Figure(gate="parity/onnx/text", metric="minimum cosine", unit="cosine", verdict="pass", measured=1.0),
    ]
    run = report.Run(
        figures=figures, missing=["parity/om/text", "recall/om/x"], started="2026-11-25T10:00:00+0000", seconds=2
    )
    suite = ElementTree.fromstring(report.junit(run, "ended by SIGKILL")).find("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "time")} == {
        "tests": "3", "failures": "1", "errors": "1", "time": "2.000",
    }  # fmt: skip
    red, green, lost = suite.findall("testcase")
    assert (red.get("name"), red.find("failure").get("message")) == ("parity/om/text", "a ? <call> hung")
    assert (green.get("name"), len(green)) == ("parity/onnx/text", 0)
    assert lost.find("error").get("message") == "not evaluated: ended by SIGKILL"
