"""The account of a run: its three files, the terminal table, and two runs side by side."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from clipval import report
from clipval.errors import InputError
from clipval.report import Assets, Run
from clipval.results import Figure
from tests.unit.runs import context, make, open_page, paired, parity, recall, throughput

HOSTILE = """<script>alert("x")</script> & 'q' | `c` $\\frac{1}$ </style></svg>"""
TABLE = """\
check                                                measured        reference    difference  verdict
parity/onnx/vision minimum cosine                 1 - 1.0e-08   >= 1 - 1.0e-06                pass
recall/onnx/image_retrieval_recall@5                   0.8842  0.8830 +- 0.005  +0.12 pt, +6  pass
recall/om/image_retrieval_recall@5                     0.8841  0.8841 +- 0.005  +0.00 pt, +0  pass
recall/onnx/text_retrieval_recall@5                    0.9500  0.9630 +- 0.005  -1.30 pt, -13  FAIL
"""


def test_the_files_are_written_and_read_back(tmp_path):
    run = make(figures=[*make().figures, throughput("onnx", "vision", 1, 20.0)])

    written = report.write(tmp_path / "deep" / "report", run, Assets())

    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    assert report.load(written[0]) == run
    assert json.loads(written[0].read_text(encoding="utf-8"))["schema"] == 1
    assert sorted(path.name for path in (tmp_path / "deep" / "report").iterdir()) == sorted(one.name for one in written)


def test_numpy_and_nan_do_not_break_the_json(tmp_path):
    detail = {"worst": [{"id": "img1", "cosine": float("nan")}], "cosine_mean": np.float64(0.5), "n": np.arange(2)}
    report.write(tmp_path, make(figures=[parity(detail=detail, cosine=None)]), Assets())

    found = report.load(tmp_path / "report.json").figures[0].detail

    assert found == {"worst": [{"id": "img1", "cosine": None}], "cosine_mean": 0.5, "n": [0, 1]}
    open_page(report.load(tmp_path / "report.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b'{"schema": 1, "figures": [', "truncated"),
        (b"\xff\xfe", "report.json"),
        (b'{"results": []}', "missing required field"),
        (b'{"schema": 2, "figures": []}', "schema 2, this clipval reads 1"),
        (b'{"schema": 1, "figures": [{"gate": 1}]}', "figures"),
    ],
)
def test_a_damaged_report_is_an_input_error(tmp_path, content, message):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=message):
        report.load(path)


def test_a_report_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="cannot be written"):
        report.write(tmp_path / "file", make(), Assets())


def test_a_failed_replacement_leaves_the_old_report_and_no_scratch(tmp_path, monkeypatch):
    report.write(tmp_path, make(), Assets())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.store.os, "replace", refuse)
    with pytest.raises(InputError, match="No space left"):
        report.write(tmp_path, make(title="another"), Assets())

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_verdict_comes_first_and_names_what_failed():
    run = make(
        missing=["artifact/onnx/text"], failures=[{"class": "environment", "test": "t2", "message": "no runtime"}]
    )

    text = open_page(run).text

    order = ["✗ FAIL", "3 of 5 gates passed, 1 failed, 1 not evaluated", "What failed", "recall is 0.95", "no runtime"]
    order += ["artifact/onnx/text", "What was not validated", "pytorch on cuda: no such device", "Parity with PyTorch"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_a_failed_gate_is_told_once():
    assert open_page(make()).text.count("recall is 0.95") == 1
    assert report.markdown(make()).count("recall is 0.95") == 1


def test_a_run_that_passed_says_so():
    page = open_page(make(verdict="pass", figures=[parity()], failures=[], not_validated=[]))

    assert "✓ PASS" in page.text
    assert "What failed" not in page.text
    assert "Nothing was left out." in page.text


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_an_empty_run_has_a_report(verdict):
    run = Run(verdict=verdict)

    assert "No figure was made." in open_page(run).text
    assert "no figure was made" in report.markdown(run)
    assert report.summary_table(run).endswith(f"{verdict.upper()}: 0 gates passed, 0 failed")
    assert "## Figures in both: 0" in report.compare(run, run)


def test_figures_without_detail_or_context_have_a_report():
    figures = [*make().figures, paired(), throughput("onnx", "text", 8, 10.0)]
    bare = [msgspec.structs.replace(one, detail={}, context={}) for one in figures]
    bare += [
        Figure(gate=gate, metric="m", unit="u", verdict="info") for gate in ("x", "recall/onnx", "throughput/a/b/c")
    ]

    open_page(make(figures=bare))
    assert "| throughput/onnx/text/8 | samples/s | 10.0 |" in report.markdown(make(figures=bare))
    report.compare(make(figures=bare), make())


def test_hostile_strings_are_text_everywhere():
    flip = {"id": HOSTILE, "was": 4, "now": 6, "margin": None, "retrieved": [HOSTILE]}
    context_ = {"backend": HOSTILE, "version": HOSTILE, "device": HOSTILE, "simulated": True, "batch_size": 1}
    worst = {**parity().detail, "worst": [{"id": HOSTILE, "cosine": 0.5}]}
    figures = [
        Figure(gate=f"{check}/{HOSTILE}/{HOSTILE}", metric=HOSTILE, unit=unit, verdict="fail", message=HOSTILE, **more)
        for check, unit, more in [
            ("parity", "cosine", {"measured": 0.5, "detail": worst, "context": context_}),
            (
                "recall",
                "share",
                {"measured": 0.5, "reference": 0.4, "count": 9, "source": HOSTILE, "context": context_},
            ),
            ("paired", "share", {"detail": {"flips": [flip]}}),
            ("throughput", "samples/s", {"measured": 5.0, "detail": {"reason": HOSTILE}, "context": context_}),
        ]
    ]
    failure = {"class": HOSTILE, "test": HOSTILE, "message": HOSTILE + "!"}
    words = {"title": HOSTILE, "started": HOSTILE, "spec": {"model": HOSTILE}, "options": {HOSTILE: HOSTILE}}
    run = make(figures=figures, failures=[failure], missing=[HOSTILE], not_validated=[HOSTILE], **words)

    page = open_page(run, Assets(caption=lambda _: HOSTILE))

    assert page.text.count(HOSTILE) > 20
    assert "<script" not in report.markdown(run)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in report.markdown(run).splitlines() if line[:5] == "| thr"}
    assert widths <= {8}


def test_what_was_simulated_is_said_loudly():
    om = parity("om", context=context("om", simulated=True))
    run = make(figures=[om, parity()])

    page = open_page(run)
    text = report.markdown(run)

    assert "SIMULATED. om (simulated) ran on a simulated device." in page.text
    assert "om (simulated), vision" in page.text
    assert "**SIMULATED**: om (simulated) ran" in text
    assert "| parity/om/vision (simulated) |" in text
    assert "pass simulated" in report.summary_table(run).splitlines()[1]
    assert "pass simulated" in report.compare(run, run)
    assert "simulated" not in open_page(make()).text.lower()


def test_the_terminal_table():
    run = make(missing=[f"values/onnx/{n}" for n in range(12)])

    lines = report.summary_table(run).splitlines()

    assert [line.split() for line in lines[:5]] == [line.split() for line in TABLE.splitlines()]
    assert len({line.index(line.split()[-1]) for line in lines[:5]}) == 1
    assert lines[-3].split() == ["...", "and", "2", "more", "gates", "MISSING"]
    assert lines[-2:] == [
        "not validated: pytorch on cuda: no such device",
        "FAIL: 3 gates passed, 1 failed, 12 not evaluated",
    ]


def test_the_terminal_table_is_narrow_and_leaves_out_what_gates_nothing_but_throughput():
    long = Figure(gate="values/onnx/vision", metric="embeddings " * 20, unit="share", verdict="pass", measured=1.0)
    beside = Figure(gate="paired/onnx/x", metric="flips", unit="share", verdict="info", measured=1.0)
    row = throughput("onnx", "vision", 1, 20.0, "NOISY")
    run = make(figures=[*make().figures, long, beside, row], not_validated=[])

    table = report.summary_table(run)

    assert max(map(len, table.splitlines())) < 100
    assert "values/onnx/vision embeddings" in table
    assert ".. " in table
    assert table.splitlines()[-2].split() == ["throughput/onnx/vision/1", "samples/s", "20.0", "NOISY"]
    assert "flips" not in table
    assert table.isascii()


def test_two_runs_side_by_side():
    first = make(
        figures=[
            recall("onnx", "text_retrieval_recall@5", 962, 1000, 0.963),
            throughput("onnx", "text", 8, 100.0),
            parity(tower="text"),
            recall("onnx", "image_retrieval_recall@1", 10, 20, 0.5),
        ],
        verdict="pass",
    )
    second = make(
        figures=[
            recall("onnx", "text_retrieval_recall@5", 950, 1000, 0.963, "fail", message="too low"),
            throughput("onnx", "text", 8, 110.0),
            parity(),
            recall("onnx", "image_retrieval_recall@1", 10, 40, 0.5),
        ],
        missing=["parity/onnx/text"],
        environment={"python": "3.12", "packages": {"numpy": "1.24"}, "git": "abc"},
    )

    expected = """\
# Comparison

- before: PASS, A model, 2026-01-02T03:04:05, 4 figures
- after: FAIL, A model, 2026-01-02T03:04:05, 4 figures

## Verdicts that changed

| figure                              | before |  after |    difference | verdict      |
| :---------------------------------- | -----: | -----: | ------------: | :----------- |
| recall/onnx/text_retrieval_recall@5 | 0.9620 | 0.9500 | -1.20 pt, -12 | pass -> FAIL |

- too low

## Figures that vanished

- parity/onnx/text minimum cosine: promised and not evaluated

## Figures that appeared

- parity/onnx/vision minimum cosine: pass

## Figures in both: 3

| figure                               | before |  after |    difference | verdict      |
| :----------------------------------- | -----: | -----: | ------------: | :----------- |
| recall/onnx/text_retrieval_recall@5  | 0.9620 | 0.9500 | -1.20 pt, -12 | pass -> FAIL |
| throughput/onnx/text/8 samples/s     |    100 |    110 |       +10.0 % | VALID        |
| recall/onnx/image_retrieval_recall@1 | 0.5000 | 0.2500 |     -25.00 pt | pass         |

## What else differs

- python: 3.11 -> 3.12
"""
    assert report.compare(first, second) == expected


def test_a_row_that_is_no_longer_valid_is_a_changed_verdict():
    first, second = (
        make(figures=[throughput("onnx", "text", 8, 100.0, verdict)]) for verdict in ("VALID", "THROTTLED")
    )
    changed = report.compare(first, second).split("## ")[1]
    assert "VALID -> THROTTLED" in changed


def test_the_page_says_how_a_row_was_measured():
    cold = {"load_seconds": 1.234, "first_inference_seconds": 0.0567, "batch_size": 1}
    more = {"cold_start": cold, "cores": 1.96, "samples_per_second_mean": 98.7}
    page = open_page(make(figures=[throughput("onnx", "text", n, 100.0, **more) for n in (1, 8)]))
    for once in ("1.23", "56.7"):  # where it was measured
        assert page.text.count(f" {once} ") == 1
    assert page.text.count(" 98.7 ") == 2
    assert page.text.count(" 2.0 ") == 2
    assert page.text.count(" 100, 200 ") == 2  # p90 and p95, in ms; too few rounds for p99


def test_advice_is_given_everywhere():
    run = make(advice=["2 rows are faster"])
    assert "advice: 2 rows are faster" in report.summary_table(run)
    assert "## Advice\n\n- 2 rows are faster" in report.markdown(run)
    assert "Advice 2 rows are faster" in open_page(run).text
    assert "Advice" not in open_page(make()).text + report.markdown(make())


def test_the_terminal_table_has_a_line_a_gate():
    def figure(gate, metric, verdict="pass"):
        return Figure(gate=gate, metric=metric, unit="share", verdict=verdict, measured=1.0)

    good = [figure("values/onnx/text", name) for name in ("count", "NaN", "norm")]
    bad = [figure("values/onnx/vision", name, verdict) for name, verdict in (("count", "pass"), ("NaN", "fail"))]
    rows = [figure("throughput/onnx/text/8", name) for name in ("samples/s", "against the baseline")]
    lines = report.summary_table(make(figures=[*good, *bad, *rows], not_validated=[])).splitlines()
    assert [" ".join(line.split()[:2]) for line in lines[1:-1]] == [
        "values/onnx/text count",
        "values/onnx/vision NaN",
        "throughput/onnx/text/8 samples/s",
        "throughput/onnx/text/8 against",
    ]
    assert lines[-1] == "FAIL: 2 gates passed, 1 failed"


def test_norms_that_are_not_numbers_are_said():
    norms = {"min": None, "mean": None, "max": None}
    lost = msgspec.structs.replace(parity(), detail={**parity().detail, "norms": norms})
    assert "norms not a number" in open_page(make(figures=[lost])).text
    assert "norms 0.5 to 1.5" in open_page(make(figures=[parity()])).text


def test_a_run_against_itself_differs_in_nothing():
    text = report.compare(make(), make())

    assert text.endswith("## What else differs\n\nnothing\n")
    assert "## Verdicts that changed\n\nnone\n" in text
    assert text.count(" = | ") == len(make().figures)


def test_the_same_run_gives_the_same_bytes_in_another_process(tmp_path):
    figures = [*make().figures, throughput("onnx", "vision", 1, 20.0), paired()]
    report.write(tmp_path, make(figures=figures), Assets())
    code = (
        "import sys; from pathlib import Path; from clipval import report;"
        "assert not {'jinja2', 'matplotlib', 'scipy', 'PIL'} & set(sys.modules), 'imported too early';"
        "folder = Path(sys.argv[1]);"
        "report.write(folder / 'again', report.load(folder / 'report.json'), report.Assets())"
    )
    root = str(Path(report.__file__).parent.parent)
    environment = {"PYTHONHASHSEED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(Path.home()), "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment, check=True)

    for name in (report.JSON, report.MARKDOWN, report.HTML):
        first, again = (hashlib.sha256((folder / name).read_bytes()) for folder in (tmp_path, tmp_path / "again"))
        assert first.hexdigest() == again.hexdigest(), name
