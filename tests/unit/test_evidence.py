"""What a report shows of figures: wording, tables, plots, and the samples behind them."""

import base64
import io
import re

import msgspec
import numpy as np
import pytest
from PIL import Image

from clipval import report
from clipval.errors import InputError
from clipval.report import Assets, panels, plots, tables
from clipval.results import Figure, Flip, Worst, number
from clipval.retrieval import interval
from tests.unit.runs import make, open_page, paired, parity, recall, throughput


def test_the_recall_table_is_the_recipes():
    known = [(0.8841, "R", "om"), (0.883, "R", "pytorch")]
    figures = [
        recall("onnx", "image_retrieval_recall@5", 4421, 5000, 0.8830, published=known),
        recall("pytorch", "image_retrieval_recall@5", 4415, 5000, 0.8830, published=known),
        recall("pytorch", "text_retrieval_recall@10", 983, 1000, 0.97, "fail"),
    ]

    text = report.markdown(make(figures=figures))

    expected = """\
| metric | pytorch | onnx | reference of pytorch | published om | published pytorch |
|---|---:|---:|---:|---:|---:|
| image_retrieval_recall@5 | 0.8830 (+0.00 pt, +0) | 0.8842 (+0.12 pt, +6) | 0.8830 | 0.8841 | 0.8830 |
| text_retrieval_recall@10 | 0.9830 (+1.30 pt, +13) FAIL |  | 0.9700 |  |  |
"""
    assert expected in text


def test_a_published_figure_of_one_batch_size_is_drawn():
    """A line of one point is none."""

    def marks(*sizes):
        (panel,) = panels.throughput_panels([throughput("onnx", "text", size, 1000.0) for size in sizes])
        return len(re.findall(r"<use[^>]*var\(--muted\)", panel["svg"]))

    assert (marks(8), marks(1, 8)) == (2, 0)  # in the plot and in the legend


def test_backends_with_one_reference_share_its_column():
    table = tables.recall_table(make().figures)

    assert table.published == ["reference of onnx", "reference of om"]
    same = [recall(name, "text_retrieval_recall@5", 962, 1000, 0.963) for name in ("onnx", "pytorch")]
    assert tables.recall_table(same).published == ["reference of pytorch, onnx"]


def test_the_throughput_table_is_the_recipes():
    figures = [
        throughput("onnx", "text", 8, 1500.4, "NOISY"),
        throughput("onnx", "text", 1, 64.26),
        throughput("om", "vision", 1, 150.0, execute=179.4),
        throughput("onnx", "text", 1, 65.26),  # measured again: the later one counts
    ]

    text = report.markdown(make(figures=figures))

    expected = """\
| batch size | vision om | vision om execute | vision published Ascend910B4 | text onnx | text published Ascend910B4 |
|---:|---:|---:|---:|---:|---:|
| 1 | 150 | 179.4 | 181 | 65.3 | 407 |
| 8 |  |  |  | 1,500 NOISY | 1,944 |
"""
    assert expected in text


def test_the_clock_that_decides_and_the_one_beside_it():
    """The form of the acceptance suite: the row with both clocks, then the same row against the baseline."""
    first = throughput("om", "vision", 1, 150.0, "BUSY", execute=179.4)
    second = msgspec.structs.replace(first, metric="undisturbed samples/s", detail=None, verdict="pass")

    found = [(one.name, one.value, one.verdict) for one in tables.rates([first, second])]

    assert found == [("om", 150.0, "BUSY"), ("om execute", 179.4, "VALID")]


def test_a_gate_without_backend_is_the_runs():
    found = panels.glance([Figure(gate="baseline/rows", metric="m", unit="rows", verdict="pass"), parity()], ["a/om/b"])

    assert found["columns"] == ["run", "onnx", "om"]
    assert [row["check"] for row in found["rows"]] == ["baseline", "parity", "a"]
    assert found["rows"][2]["cells"] == [{"total": 0, "passed": 0}] * 2 + [{"total": 1, "passed": 0}]


def test_a_gate_is_as_good_as_its_worst_figure():
    found = panels.glance([parity(verdict="fail"), parity()], [])

    assert found["rows"] == [{"check": "parity", "cells": [{"total": 1, "passed": 0}]}]


def test_a_published_curve_of_another_machine_says_so():
    on_cpu = [throughput("onnx", "vision", 1, 20.0)]
    simulated = [throughput("om", "vision", 1, 20.0, simulated=True)]

    for figures in (on_cpu, simulated):
        assert "published Ascend910B4, another machine" in report.markdown(make(figures=figures))
    assert "another machine" not in report.markdown(make(figures=[throughput("om", "vision", 1, 20.0)]))


@pytest.fixture
def assets(tmp_path):
    """Three images of which one is damaged, with their captions."""
    for name, size in (("img1", (400, 200)), ("img2", (90, 300))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    captions = {"img1_0": 'a "red" <field>', "img1_2": "the third caption", "img2_0": "a tall one"}
    return Assets(lambda name: tmp_path / f"{name}.png" if name in ("img1", "img2", "bad") else None, captions.get)


def test_worst_samples_are_shown_with_picture_and_caption(assets):
    page = open_page(make(figures=[parity(), parity(tower="text")]), assets)

    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 2
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert (picture.format, picture.size) == ("JPEG", (160, 80))
    assert '“a "red" <field>”' in page.text
    assert "“the third caption”" in page.text


def test_flips_show_what_was_retrieved_instead(assets):
    flip = Flip("img1_2", 4, 6, -1e-4, ["img2", "img1", "gone"])
    back = Flip("img2", 8, 2, 1e-4, ["img1_0", "img2_0"])
    figures = [paired(flips=[flip] * 12), paired("text_retrieval_recall@5", [back])]

    text = open_page(make(figures=figures), assets).text

    assert "“the third caption” ✗ lost : rank 4 → 6, margin -1.0e-04" in text
    assert "1. img2 2. ✓ the right one no picture of gone 3. gone" in text
    assert "2 more are in report.json." in text
    assert "✓ gained : rank 8 → 2, margin +1.0e-04" in text
    assert '1. a "red" <field> 2. ✓ a tall one' in text


@pytest.mark.parametrize("broken", ["image_path", "caption"])
def test_evidence_that_cannot_be_had_does_not_take_the_report_with_it(assets, broken):
    def missing(_):
        raise InputError("there is no data set")

    figures = [parity(worst=[Worst("bad", None, None), Worst("img1", 0.5, 0.1)])]

    page = open_page(make(figures=figures), assets._replace(**{broken: missing}))

    assert "no picture of bad" in page.text


def test_plots_are_labelled_and_take_the_pages_colours():
    figures = [*make().figures, throughput("onnx", "vision", 1, 20.0), throughput("onnx", "vision", 8, 30.0, "BUSY")]

    text = report.page(make(figures=figures), Assets())

    labels = re.findall(r'<svg class="plot" role="img" aria-label="([^"]*)"', text)
    assert labels[0] == "Histogram of cosine distances of 1000 vision embeddings, onnx against pytorch"
    assert "R@5 onnx 0.9500 \N{MINUS SIGN}13, -1.30 points" in labels[2]
    assert "onnx 1: 20, 8: 30; published Ascend910B4, another machine 1: 181, 8: 285" in labels[3]
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"(fill|stroke): #", drawn)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_one_destroyed_sample_is_drawn_as_such():
    good, bad = parity(), parity(verdict="fail", cosine=0.5)

    def bars(figure):
        found = panels.parity_panels([figure], panels.Gallery(Assets()))[0].svg
        return found.count('style="fill: var(--series-2)"'), found.count('style="fill: var(--bad)"')

    assert bars(good) == (1, 0)
    assert bars(bad) == (1, 1)


def test_a_row_that_is_not_valid_has_a_hollow_marker():
    def hollow(valid):
        return plots.throughput([plots.Curve("onnx", 1, [(1, 5.0, 4.0, 6.0, valid)])], "x").count("fill: var(--paper)")

    assert hollow(True) == 0
    assert hollow(False) > 0


def test_names_in_a_plot_are_neither_formulas_nor_markup():
    drawn = plots.throughput([plots.Curve("$\\frac{1}$ <b>", 1, [(1, 5.0, 4.0, 6.0, True)])], "x")

    assert "$\\frac{1}$ &lt;b&gt;</text>" in drawn


def test_the_interval_is_wilsons():
    share, n, z = 0.841, 1000, 1.959964

    found = interval(841, n)

    half = z * np.sqrt(share * (1 - share) / n + (z / n) ** 2 / 4) / (1 + z**2 / n)
    centre = (share + z**2 / n / 2) / (1 + z**2 / n)
    assert found == pytest.approx((centre - half, centre + half), abs=1e-6)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.9999989, "cosine", "1 - 1.1e-06"),
        (0.95, "cosine", "0.950000"),
        (1 - 1e-7, "cosine", "1 - 1e-07"),
        (1.0, "cosine", "1"),
        (1 + 2.3e-16, "cosine", "1 + 2.2e-16"),
        (None, "cosine", "none"),
        (float("nan"), "share", "none"),
        (0.88424, "share", "0.8842"),
        (1234.5, "samples/s", "1,234"),
        (299.6, "samples/s", "299.6"),
        (300.0, "samples/s", "300"),
        (20.0, "samples/s", "20.0"),
        (0.1234, "samples/s", "0.123"),
        (3.0, "samples", "3"),
        (1.234e-7, "absolute", "1.23e-07"),
    ],
)
def test_numbers_are_shown_so_that_bounds_stay_visible(value, unit, shown):
    assert number(value, unit) == shown
