"""Synthetic runs for the tests of reports, and a page as a browser would take it."""

import re
from html.parser import HTMLParser

from clipval import report
from clipval.report import Assets, Run
from clipval.results import Figure

NO_ASSETS = Assets()
VOID = {"meta", "br", "img", "input", "hr", "link"}


def context(backend, **more):
    device = "Ascend910B4:0" if backend == "om" else "cpu"
    return {"backend": backend, "version": "1.0", "device": device, "precision": "fp32", "simulated": False, **more}


def parity(backend="onnx", tower="vision", cosine=1 - 1e-8, verdict="pass", **more):
    edges = [round(-0.5 + n / 4, 2) for n in range(67)]
    counts = [0] * 66
    counts[34], counts[4] = 999, int(verdict == "fail")
    worst = [{"id": "img1" if tower == "vision" else "img1_2", "cosine": cosine, "max_abs": 0.1}]
    detail = {
        "cosine_percentiles": {"0": cosine, "1": 0.99, "50": 0.9999999, "100": 1.0},
        "cosine_mean": 0.9999999,
        "histogram": {"edges": edges, "counts": counts},
        "norms": {"min": 0.5, "mean": 1.0, "max": 1.5},
        "relative_error": 1e-4,
        "worst": worst,
    }
    message = f"parity/{backend}/{tower}: minimum cosine is {cosine}" if verdict == "fail" else ""
    values = {"measured": cosine, "count": 1000, "bound": ">=", "limit": 0.999999, "context": context(backend)}
    values.update({"detail": detail, "verdict": verdict, "message": message, **more})
    return Figure(gate=f"parity/{backend}/{tower}", metric="minimum cosine", unit="cosine", **values)


def recall(backend, metric, hits, count, reference, verdict="pass", **more):
    values = {"measured": hits / count, "count": count, "reference": reference, "source": "the recipe", "limit": 0.005}
    values.update({"bound": "within", "verdict": verdict, "context": context(backend), **more})
    return Figure(gate=f"recall/{backend}/{metric}", metric=metric, unit="share", **values)


def paired(metric="image_retrieval_recall@5", flips=(), **more):
    detail = {"gains": 1, "losses": 2, "p_value": 1.0, "flips": list(flips)}
    values = {"measured": -0.0002, "count": 5000, "reference": 0.0, "bound": "within", "limit": 0.002}
    values.update({"verdict": "pass", "detail": detail, "context": context("onnx"), **more})
    return Figure(gate=f"paired/onnx/{metric}", metric=f"{metric} less pytorch's", unit="share", **values)


def throughput(backend, tower, size, rate, verdict="VALID", **more):
    fps = {"vision": {1: 181, 8: 285}, "text": {1: 407, 8: 1944}}[tower][size]
    detail = {
        "samples_per_second": rate,
        "interval": [rate * 0.98, rate * 1.02],
        "scope": "inference",
        "median_seconds": size / rate,
        "p90": 0.1,
        "p95": 0.2,
        "p99": None,
        "cv": 0.01,
        "rounds": 100,
        "verdict": verdict,
        "reason": "" if verdict == "VALID" else "the clock fell",
        "published": {"chip": "Ascend910B4", "fps": fps, "source": "the recipe's table"},
        **more,
    }
    values = {"measured": rate, "count": 100, "verdict": "info", "context": context(backend, batch_size=size)}
    gate = f"throughput/{backend}/{tower}/{size}"
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
        "spec": {"name": "s", "model": "ViT", "pretrained": "w", "data": "d", "images": 1000, "captions": 5000},
        "options": {"backends": "onnx"},
        "environment": {"python": "3.11", "packages": {"numpy": "1.24"}, "git": "abc"},
        "verdict": "fail",
        "figures": figures,
        "expected": [one.gate for one in figures],
        "not_validated": ["pytorch on cuda: no such device"],
        "failures": [{"class": "model", "test": "t", "message": "recall is 0.95"}],
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
