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

from clipval import report, store
from clipval.backends import Identity
from clipval.backends.pool import ColdStart
from clipval.errors import InputError
from clipval.report import Assets, Failure, Run, Subject, causes
from clipval.results import Figure, Flip, PairedDetail, Worst
from tests.unit.runs import diagnosis, made_by, make, open_page, paired, parity, recall, throughput

HOSTILE = """<script>alert("x")</script> & 'q' | `c` $\\frac{1}$ </style></svg>"""
GREEN = """\
PASS: 23 gates passed, 0 failed
recall, hit rate           pytorch    onnx      om  published pytorch  published om
image_retrieval_recall@1    0.8842  0.8842  0.8842             0.8830        0.8841
image_retrieval_recall@5    0.8842  0.8842  0.8842             0.8830        0.8841
image_retrieval_recall@10   0.8842  0.8842  0.8842             0.8830        0.8841
text_retrieval_recall@1     0.8842  0.8842  0.8842             0.8830        0.8841
text_retrieval_recall@5     0.8842  0.8842  0.8842             0.8830        0.8841
text_retrieval_recall@10    0.8842  0.8842  0.8842             0.8830        0.8841
 samples/s   vision                                       text
batch size  pytorch  onnx   om  om execute  published  pytorch  onnx   om  om execute  published
         1      100   100  100       179.4        181      100   100  100       179.4        407
         8      800  800*  800       1,435        285      800  800*  800       1,435      1,944
* not VALID: 2 NOISY; published: Ascend910B4
parity onnx vision  minimum cosine 1 - 1e-08 (>= 1 - 1e-06)  max |difference| 3e-07 (<= 2e-05)
parity onnx text    minimum cosine 1 - 1e-08 (>= 1 - 1e-06)  max |difference| 3e-07 (<= 2e-05)
parity om vision    minimum cosine 1 - 1e-08 (>= 1 - 1e-06)  max |difference| 3e-07 (<= 2e-05)
parity om text      minimum cosine 1 - 1e-08 (>= 1 - 1e-06)  max |difference| 3e-07 (<= 2e-05)
near its bound: invariance/om/text |difference| is 0.0092 (<= 0.01)
not validated: pytorch on cuda: no such device
"""
WHAT_FAILED = """\
FAIL parity/onnx/vision: minimum cosine is 0.930000, expected >= 1 - 1e-06 (worst samples a (0.93))
     therefore also recall/onnx/image_retrieval_recall@1, recall/onnx/text_retrieval_recall@1 and 5 more
FAIL parity/onnx/text: minimum cosine is 0.930000, expected >= 1 - 1e-06 (worst samples a (0.93))
environment: distinct/onnx/vision and 1 more: onnx: device lost
not evaluated: values/onnx/vision, values/onnx/text
not validated: pytorch on cuda: no such device
to judge them alone: pytest --spec=s --gate=parity/onnx/vision,parity/onnx/text,distinct/onnx/vision
"""


def test_the_files_are_written_and_read_back(tmp_path):
    run = make(figures=[*make().figures, throughput("onnx", "vision", 1, 20.0)])

    written = report.write(tmp_path / "deep" / "report", run, Assets())

    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    assert report.load(written[0]) == run
    assert json.loads(written[0].read_text(encoding="utf-8"))["schema"] == 2
    assert sorted(path.name for path in (tmp_path / "deep" / "report").iterdir()) == sorted(one.name for one in written)


def test_numpy_and_nan_do_not_break_the_json(tmp_path):
    detail = msgspec.structs.replace(parity().detail, worst=[Worst("img1", float("nan"), None)], mean=np.float64(0.5))
    report.write(tmp_path, make(figures=[parity(detail=detail, cosine=None)]), Assets())

    found = report.load(tmp_path / "report.json").figures[0].detail

    assert (found.worst, found.mean) == ([Worst("img1", None, None)], 0.5)
    open_page(report.load(tmp_path / "report.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b'{"schema": 1, "figures": [', "truncated"),
        (b"\xff\xfe", "report.json"),
        (b'{"results": []}', "missing required field"),
        (b'{"schema": 1, "figures": []}', "schema 1, this clipval reads 2"),
        (b'{"schema": 2, "figures": [{"gate": 1}]}', "figures"),
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

    monkeypatch.setattr(store.os, "replace", refuse)
    with pytest.raises(InputError, match="No space left"):
        report.write(tmp_path, make(title="another"), Assets())

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_verdict_comes_first_and_names_what_failed():
    run = make(missing=["artifact/onnx/text"], failures=[Failure("environment", "t2", "no runtime")])

    text = open_page(run).text

    order = [
        "✗ FAIL",
        "3 of 5 gates passed, 1 failed, 1 not evaluated",
        "What failed",
        "recall/onnx/text_retrieval_recall@5",
        "no runtime",
    ]
    order += ["artifact/onnx/text", "What was not validated", "pytorch on cuda: no such device", "Parity with PyTorch"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_a_failed_gate_is_told_once():
    assert open_page(make()).text.split("At a glance")[0].count("0.9500") == 1
    assert report.markdown(make()).count("recall is 0.95") == 1


def test_a_run_that_passed_says_so():
    page = open_page(make(verdict="pass", figures=[parity()], failures=[], not_validated=[]))

    assert "✓ PASS" in page.text
    assert "What failed" not in page.text
    assert "Nothing was left out." in page.text


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_an_empty_run_has_a_report(verdict):
    run = Run(verdict=verdict)

    assert "No figures." in open_page(run).text
    assert "no figures" in report.markdown(run)
    assert report.summary(run) == f"{verdict.upper()}: 0 gates passed, 0 failed"
    assert "## Figures in both: 0" in report.compare(run, run)


def test_figures_without_detail_or_context_have_a_report():
    figures = [*make().figures, paired(), throughput("onnx", "text", 8, 10.0)]
    bare = [msgspec.structs.replace(one, detail=None, made_by=None) for one in figures]
    bare += [
        Figure(gate=gate, metric="m", unit="u", verdict="info") for gate in ("x", "recall/onnx", "throughput/a/b/c")
    ]

    open_page(make(figures=bare))
    assert "| throughput/onnx/text/8 | samples/s | 10.0 |" in report.markdown(make(figures=bare))
    report.compare(make(figures=bare), make())
    report.summary(make(figures=bare))


def test_hostile_strings_are_text_everywhere():
    where = Identity(HOSTILE, HOSTILE, HOSTILE, HOSTILE, True)
    row = throughput("onnx", "text", 8, 5.0, HOSTILE).detail
    row = msgspec.structs.replace(row, row=msgspec.structs.replace(row.row, made_by=where))
    figures = [
        Figure(gate=f"{check}/{HOSTILE}/{HOSTILE}", metric=HOSTILE, unit=unit, verdict="fail", message=HOSTILE, **more)
        for check, unit, more in [
            (
                "parity",
                "cosine",
                {"measured": 0.5, "detail": parity(worst=[Worst(HOSTILE, 0.5, None)]).detail, "made_by": where},
            ),
            (
                "recall",
                "share",
                {"measured": 0.5, "reference": 0.4, "count": 9, "source": HOSTILE, "made_by": where},
            ),
            ("paired", "share", {"detail": PairedDetail(1, 0, 1.0, [Flip(HOSTILE, 4, 6, None, [HOSTILE])])}),
            ("throughput", "samples/s", {"measured": 5.0, "detail": row, "made_by": where}),
        ]
    ]
    failure = Failure(HOSTILE, HOSTILE, HOSTILE + "!")
    words = {"title": HOSTILE, "started": HOSTILE, "spec": Subject(model=HOSTILE), "options": {HOSTILE: HOSTILE}}
    run = make(figures=figures, failures=[failure], missing=[HOSTILE], not_validated=[HOSTILE], **words)

    page = open_page(run, Assets(caption=lambda _: HOSTILE))

    assert page.text.count(HOSTILE) > 20
    assert "<script" not in report.markdown(run)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in report.markdown(run).splitlines() if line[:5] == "| thr"}
    assert widths <= {8}


def test_what_was_simulated_is_said_loudly():
    om = parity("om", made_by=made_by("om", simulated=True))
    run = make(figures=[om, parity()])

    page = open_page(run)
    text = report.markdown(run)

    assert "SIMULATED. om (simulated) ran on a simulated device." in page.text
    assert "om (simulated), vision" in page.text
    assert "**SIMULATED**: om (simulated) ran" in text
    assert "| parity/om/vision (simulated) |" in text
    assert "on a simulated device" in report.summary(run).splitlines()[0]
    assert "pass simulated" in report.summary(run, verbose=True)
    assert "pass simulated" in report.compare(run, run)
    assert "simulated" not in open_page(make()).text.lower()


def both_kinds():
    """Figures of both kinds on three backends, all of them good."""
    found = []
    for backend in ("pytorch", "onnx", "om"):
        for tower in ("vision", "text"):
            if backend != "pytorch":
                first = parity(backend, tower)
                more = {"unit": "absolute", "bound": "<=", "limit": 2e-5, "measured": 3e-7, "detail": None}
                found += [first, msgspec.structs.replace(first, metric="max |difference|", **more)]
            for size in (1, 8):
                worth = "NOISY" if (backend, size) == ("onnx", 8) else "VALID"
                clock = {"execute": 179.4 * size} if backend == "om" else {}
                found.append(throughput(backend, tower, size, 100.0 * size, worth, **clock))
        for k in (1, 5, 10):
            known = [(0.883, "R", "pytorch"), (0.8841, "R", "om")]
            for name in ("image", "text"):
                found.append(recall(backend, f"{name}_retrieval_recall@{k}", 4421, 5000, 0.883, published=known))
    return found


def test_a_green_run_is_its_verdict_the_recipes_tables_and_parity():
    close = {"gate": "invariance/om/text", "metric": "|difference|", "unit": "absolute", "bound": "<=", "limit": 0.01}
    shown = report.summary(make(figures=both_kinds(), verdict="pass", failures=[]))
    assert "near" not in shown
    figures = [*both_kinds(), Figure(**close, verdict="pass", measured=0.0092)]
    shown = report.summary(make(figures=figures, verdict="pass", failures=[]))
    assert shown + "\n" == GREEN
    assert len(shown.splitlines()) + 5 <= 25  # with the six batch sizes of a shipped spec, and the line of the results
    assert shown.isascii()


def red(backends=("onnx",)):
    """A run whose embeddings are off, and their recall with them."""
    bad = []
    for backend in backends:
        off = {"cosine": 0.93, "verdict": "fail"}
        towers = [parity(backend, tower, **off) for tower in ("vision", "text")]
        bad += [msgspec.structs.replace(one, worst="worst samples a (0.93), b (0.94)") for one in towers]
        names = [f"{name}_retrieval_recall@{k}" for k in (1, 5, 10) for name in ("image", "text")]
        bad += [recall(backend, name, 3000, 5000, 0.883, "fail") for name in names]
        bad.append(paired(backend=backend, verdict="fail"))
    known = {one.gate for one in bad}
    lost = [f"{check}/onnx/{tower}" for check in ("values", "distinct") for tower in ("vision", "text")]
    errors = [Failure("environment", "t", "onnx: device lost", gate) for gate in lost[2:]]
    figures = [*bad, *(one for one in both_kinds() if one.gate not in known)]
    expected = [*lost, *known]
    return make(figures=figures, missing=lost, failures=errors, expected=expected, again="pytest --spec=s")


def test_what_failed_is_told_by_its_cause():
    shown = report.summary(red())
    assert shown.splitlines()[0] == "FAIL: 14 gates passed, 9 failed, 4 not evaluated"
    assert shown + "\n" == shown[: -len(WHAT_FAILED) + 1] + WHAT_FAILED
    assert "image_retrieval_recall@1    0.8842  0.6000 FAIL  0.8842" in shown


def test_a_red_run_stays_on_one_screen_and_names_are_whole():
    many = [Failure("error", f"t{n}", f"message {n}") for n in range(30)]
    lost = [f"recall/om:{n}/image_retrieval_recall@10" for n in range(60)]
    run = red(("onnx", "om", "fourth"))
    run = msgspec.structs.replace(run, failures=[*run.failures, *many], missing=lost, not_validated=["a", "b", "c"])
    lines = report.summary(run).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) < 130
    assert ".." not in "".join(lines).replace("... and", "")
    assert re.search(r"image_retrieval_recall@10,? and \d+ more$", "\n".join(lines), re.MULTILINE)


def test_every_gate_is_shown_where_that_was_asked_for():
    beside = Figure(gate="paired/onnx/x", metric="flips", unit="share", verdict="info", measured=1.0)
    shown = report.summary(make(figures=[*both_kinds(), beside], verdict="pass"), verbose=True)
    assert shown.count("parity/om/text") == 2
    assert shown.count(" NOISY\n") == 2
    assert "flips" not in shown


def test_what_was_left_out_stands_in_the_verdict():
    narrowed = {"left_out": ["a/b/c", "a/b/d"], "narrowed_by": ["-k 'x'"], "verdict": "pass", "failures": []}
    run = make(figures=[parity()], **narrowed)
    assert report.summary(run).splitlines()[0] == "PASS of 1 of 3 gates; 2 left out by -k 'x'"
    others = make(figures=[], expected=[], **narrowed)
    assert report.summary(others) == "no gate was evaluated; 2 left out by -k 'x'"
    assert "2 gates were left out by -k 'x'" in report.markdown(run)
    assert "2 gates, left out by -k 'x'" in open_page(run).text
    alone = msgspec.structs.replace(run, narrowed_by=["--gate"])
    assert report.summary(alone).splitlines()[0].endswith("2 left out by --gate and not judged")


def test_what_nobody_promised_is_named():
    run = make(figures=[parity()], failures=[Failure(report.UNPROMISED, "x/y/z", "x/y/z: a figure of no gate")])
    assert "x/y/z: a figure of no gate" in report.summary(run).splitlines()


def test_a_diagnosis_stands_with_what_failed():
    figures = [parity(verdict="fail", cosine=0.5)]
    figures = [msgspec.structs.replace(figures[0], message="parity is off\ndiagnosis: diverges in attn")]
    run = make(figures=figures, failures=[])
    assert "     diagnosis: diverges in attn" in report.summary(run).splitlines()
    assert "diagnosis: diverges in attn" in open_page(run).text
    assert "diagnosis: diverges in attn" in report.markdown(run)


def test_the_page_draws_the_ladder_of_a_diagnosis(tmp_path):
    run = make(figures=[parity(verdict="fail", cosine=0.5, diagnosis=diagnosis())])
    report.write(tmp_path, run, Assets())
    page = open_page(report.load(tmp_path / "report.json"))  # infinity and all are read back
    (drawn,) = [value for name, value in page.attributes if name == "aria-label" and "over depth" in value]
    start = "visual.transformer.resblocks.1.mlp (6)"
    assert (
        drawn == f"Relative error of 11 tensors over depth, onnx, vision against pytorch, the error starts at {start}"
    )
    for curve in ("candidate", "its twin in fp16", "PyTorch, fp32", "starts here", "no excess, up to 4×"):
        assert curve in page.text
    assert "Seen: its bias is nowhere in it" in page.text
    rows = re.findall(r"<tr( class=\"fail\")?><th scope=\"row\">(visual\S+ \(\d+\))</th>", report.page(run, Assets()))
    assert [name for marked, name in rows if marked] == [start]
    assert len(rows) == 11
    assert "not finite" in page.text
    assert "<script" not in report.page(run, Assets())


def test_a_diagnosis_without_taps_or_start_has_its_sentence():
    for more in ({"ladder": (), "first": "", "precision": ""}, {"first": ""}):
        text = open_page(make(figures=[parity(verdict="fail", diagnosis=diagnosis(**more))])).text
        assert "onnx vision: diverges in mlp" in text
        assert "starts here" not in text


def test_the_page_has_a_card_a_cause_with_what_follows_folded_away():
    text = report.page(red(), Assets())
    failed = text[text.index('id="failed"') : text.index('id="unvalidated"')]
    assert failed.count("<li>") == 4  # two causes, an error, what was not evaluated
    assert "7 more gates failed because of it" in failed
    assert failed.index("Reason for the bound") > failed.index("0.930000")
    assert "--gate=parity/onnx/vision</code>" in failed


@pytest.mark.parametrize(
    ("bound", "limit", "reference", "near", "far"),
    [
        ("<=", 2e-5, None, 1.9e-5, 1.7e-5),
        (">=", 1e-3, None, 1.05e-3, 1.2e-3),
        ("within", 0.005, 0.9, 0.9048, 0.9042),
        (">=", 1 - 1e-7, None, 1 - 0.95e-7, 1 - 0.8e-7),
        ("<=", 0, None, None, 0.0),
    ],
)
def test_what_is_near_its_bound(bound, limit, reference, near, far):
    unit = "cosine" if limit > 0.9 else "absolute"
    known = {"metric": "m", "unit": unit, "verdict": "pass", "bound": bound, "limit": limit, "reference": reference}
    figures = [Figure(gate=f"g/onnx/{name}", measured=one, **known) for name, one in (("near", near), ("far", far))]
    assert [one.gate for one in causes.near(figures)] == ["g/onnx/near"] * (near is not None)


def test_causes_are_of_the_same_backend_of_the_data_or_of_the_reference():
    def failed(gate):
        return Figure(gate=gate, metric="m", unit="share", verdict="fail")

    names = ["recall/onnx/r", "recall/om/r", "paired/om/r", "parity/om/text", "invariance/onnx/text"]
    found = {one.gate: [other.gate for other in one.consequences] for one in causes.causes(map(failed, names))}
    apart = {"recall/onnx/r": [], "parity/om/text": ["recall/om/r", "paired/om/r"], "invariance/onnx/text": []}
    assert found == apart
    for shared in ("prepared/data/text", "golden/pytorch/text"):
        found = causes.causes([failed(shared), *map(failed, names[:3])])
        assert [(one.gate, len(one.consequences)) for one in found] == [(shared, 3)]


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

## Figures no longer present

- parity/onnx/text minimum cosine: promised and not evaluated

## New figures

- parity/onnx/vision minimum cosine: pass

## Figures in both: 3

| figure                               | before |  after |    difference | verdict      |
| :----------------------------------- | -----: | -----: | ------------: | :----------- |
| recall/onnx/text_retrieval_recall@5  | 0.9620 | 0.9500 | -1.20 pt, -12 | pass -> FAIL |
| throughput/onnx/text/8 samples/s     |    100 |    110 |       +10.0 % | VALID        |
| recall/onnx/image_retrieval_recall@1 | 0.5000 | 0.2500 |     -25.00 pt | pass         |

## Other differences

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
    more = {"cold_start": ColdStart(1.234, 0.0567, 1), "cores": 1.96}
    page = open_page(make(figures=[throughput("onnx", "text", n, 100.0, **more) for n in (1, 8)]))
    for once in ("1.23", "56.7"):  # where it was measured
        assert page.text.count(f" {once} ") == 1
    assert page.text.count(" 98.7 ") == 2
    assert page.text.count(" 2.0 ") == 2
    assert page.text.count(" 100, 200 ") == 2  # p90 and p95, in ms; too few rounds for p99


def test_advice_is_given_everywhere():
    run = make(advice=["2 rows are faster"])
    assert "advice: 2 rows are faster" in report.summary(run)
    assert "## Advice\n\n- 2 rows are faster" in report.markdown(run)
    assert "Advice 2 rows are faster" in open_page(run).text
    assert "Advice" not in open_page(make()).text + report.markdown(make())


def test_norms_that_are_not_numbers_are_said():
    detail = msgspec.structs.replace(parity().detail, smallest_norm=None, largest_norm=None)
    lost = msgspec.structs.replace(parity(), detail=detail)
    assert "norms not a number" in open_page(make(figures=[lost])).text
    assert "norms 0.5 to 1.5" in open_page(make(figures=[parity()])).text


def test_a_run_against_itself_differs_in_nothing():
    text = report.compare(make(), make())

    assert text.endswith("## Other differences\n\nnothing\n")
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
    root = str(Path(report.__file__).parents[2])
    environment = {"PYTHONHASHSEED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(Path.home()), "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment, check=True)

    for name in (report.JSON, report.MARKDOWN, report.HTML):
        first, again = (hashlib.sha256((folder / name).read_bytes()) for folder in (tmp_path, tmp_path / "again"))
        assert first.hexdigest() == again.hexdigest(), name
