"""Synthetic runs for the tests of reports, and a page as a browser would take it."""

import re
from html.parser import HTMLParser

import msgspec

from clipval import report
from clipval.backends import Identity
from clipval.diagnose.finding import DIVERGENCE, Finding
from clipval.diagnose.locate import Rung
from clipval.report import Assets, Failure, Run, Subject
from clipval.results import (
    Figure,
    PairedDetail,
    ParityDetail,
    Published,
    PublishedRate,
    RecallDetail,
    ThroughputDetail,
    Worst,
)
from clipval.throughput.row import Judged, Row
from clipval.throughput.statistics import Timing
from clipval.throughput.timing import WarmUp

NO_ASSETS = Assets()
VOID = {"meta", "br", "img", "input", "hr", "link"}


def made_by(backend, simulated=False):
    return Identity(backend, "1.0", "Ascend910B4:0" if backend == "om" else "cpu", "fp32", simulated)


def parity(backend="onnx", tower="vision", cosine=1 - 1e-8, verdict="pass", worst=None, **more):
    edges = [round(-0.5 + n / 4, 2) for n in range(67)]
    counts = [0] * 66
    counts[34], counts[4] = 999, int(verdict == "fail")
    worst = worst or [Worst("img1" if tower == "vision" else "img1_2", cosine, 0.1)]
    percentiles = {"0": cosine, "1": 0.99, "50": 0.9999999, "100": 1.0}
    detail = ParityDetail(percentiles, 0.9999999, 1e-4, edges, counts, 0.5, 1.5, worst)
    message = f"parity/{backend}/{tower}: minimum cosine is {cosine}" if verdict == "fail" else ""
    values = {"measured": cosine, "count": 1000, "bound": ">=", "limit": 0.999999, "made_by": made_by(backend)}
    values.update({"detail": detail, "verdict": verdict, "message": message, **more})
    return Figure(gate=f"parity/{backend}/{tower}", metric="minimum cosine", unit="cosine", **values)


def diagnosis(**more):
    """A finding as figures hold it: twelve taps of three blocks, the second bad, one absent, the last not finite."""
    rungs = []
    for n in range(12):
        off = 1e-3 if n < 6 else 0.2 if n < 11 else float("inf")
        name, noise = f"visual.transformer.resblocks.{n // 4}.mlp ({n})", 1e-3 * (1 + n)
        tap = Rung(name, None if n == 3 else off, noise, pytorch=1e-7, node=f"/mlp/MatMul_{n}", module=name[:-4])
        rungs.append(tap)
    values = {"module": "visual.transformer.resblocks.1.mlp", "node": "/mlp/MatMul_6", "first": rungs[6].name}
    values.update({"causes": ("its bias is nowhere in it",), "precision": "fp16", "ladder": tuple(rungs), **more})
    return Finding(DIVERGENCE, "onnx vision", "onnx vision: diverges in mlp", **values).detail()


def recall(backend, metric, hits, count, reference, verdict="pass", published=(), **more):
    values = {"measured": hits / count, "count": count, "reference": reference, "source": "the recipe", "limit": 0.005}
    detail = RecallDetail([Published(*one) for one in published])
    values.update({"bound": "within", "verdict": verdict, "made_by": made_by(backend), "detail": detail, **more})
    return Figure(gate=f"recall/{backend}/{metric}", metric=metric, unit="share", **values)


def paired(metric="image_retrieval_recall@5", flips=(), backend="onnx", **more):
    values = {"measured": -0.0002, "count": 5000, "reference": 0.0, "bound": "within", "limit": 0.002}
    detail = PairedDetail(1, 2, 1.0, list(flips))
    values.update({"verdict": "pass", "detail": detail, "made_by": made_by(backend), **more})
    return Figure(gate=f"paired/{backend}/{metric}", metric="recall less pytorch's", unit="share", **values)


def timing(size, rate, scope="inference"):
    """A hundred even calls; of too few to tell the 99th percentile."""
    at = size / rate
    spread = (rate * 0.98, rate * 1.02)
    known = (scope, size, 100, rate, rate * 0.987, spread, rate, at, 0.01, 100, 0.0)
    return Timing(*known, p90=0.1, p95=0.2, p99=None)


def throughput(backend, tower, size, rate, verdict="VALID", execute=None, simulated=False, **more):
    """A row by the host's clock, and by the device's where `execute` is its mean samples/s."""
    fps = {"vision": {1: 181, 8: 285}, "text": {1: 407, 8: 1944}}[tower][size]
    clocks = {"inference": Judged(timing(size, rate), verdict, "" if verdict == "VALID" else "the clock fell")}
    if execute is not None:
        own = msgspec.structs.replace(timing(size, execute, "execute"), samples_per_second_mean=execute)
        clocks["execute"] = Judged(own, "VALID", "")
    warm, where = WarmUp(3, 1.0, 0.1, True), made_by(backend, simulated)
    row = Row(made_by=where, tower=tower, batch_size=size, clocks=clocks, warm_up=warm, attempts=1, **more)
    published = PublishedRate("Ascend910B4", float(fps), "the recipe's table", False)
    values = {"measured": rate, "count": 100, "verdict": "info", "made_by": where}
    gate, detail = f"throughput/{backend}/{tower}/{size}", ThroughputDetail(row, 4, published)
    return Figure(gate=gate, metric="samples/s", unit="samples/s", detail=detail, **values)


def make(**more):
    """A run that failed in one figure, with something of everything."""
    figures = [
        parity(),
        recall("onnx", "image_retrieval_recall@5", 4421, 5000, 0.8830),
        recall("om", "image_retrieval_recall@5", 4421, 5000, 0.8841, measured=0.8841),
        recall("onnx", "text_retrieval_recall@5", 950, 1000, 0.9630, "fail", message="recall is 0.95", failure="model"),
    ]
    values = {
        "title": "A model",
        "started": "2026-01-02T03:04:05",
        "seconds": 65.0,
        "spec": Subject("s", "ViT", "w", "d", 1000, 5000),
        "options": {"backends": "onnx"},
        "environment": {"python": "3.11", "packages": {"numpy": "1.24"}, "git": "abc"},
        "verdict": "fail",
        "figures": figures,
        "expected": [one.gate for one in figures],
        "not_validated": ["pytorch on cuda: no such device"],
        "failures": [Failure("model", "t", "recall is 0.95", figures[-1].gate)],
    }
    return Run(**{**values, **more})


class Page(HTMLParser):
    """What a browser would take from the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def open_page(run, assets=NO_ASSETS):
    """The page, after the checks that hold for every page: balanced, self-contained, without script."""
    text = report.page(run, assets)
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))
        if name == "style":
            assert not re.search(r"url\((?!#)", value)
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    return page
