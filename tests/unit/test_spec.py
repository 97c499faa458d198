"""Specs: the shipped ones hold together, and a user's mistakes are named."""

import csv

import pytest

from clipval import spec
from clipval.errors import InputError, UsageError

GOOD = """
name = "mine"
title = "Mine"
[model]
name = "ViT-B-16"
[data]
name = "flickr30k"
[[references]]
metric = "image_retrieval_recall@5"
backend = "pytorch"
value = 0.5
count = 10
candidates = 5
source = "me"
"""


@pytest.mark.parametrize("name", spec.names())
def test_shipped_specs_are_complete(name):
    found = spec.load(name)
    metrics = {reference.metric for reference in found.references if reference.within is not None}
    assert {"image_retrieval_recall@5", "text_retrieval_recall@5"} <= metrics
    assert all(reference.source and (reference.because or reference.within is None) for reference in found.references)
    assert all(bounds.because for bounds in found.parity)
    for backend, precision in (("pytorch", "fp32"), ("onnx", "fp32"), ("om", "fp16"), ("om", "fp32")):
        assert all(found.bounds(backend, precision, tower).because for tower in found.towers)
    assert {bounds.metric for bounds in found.paired} == {"image_retrieval_recall@5", "text_retrieval_recall@5"}


def test_the_recipes_figures():
    found = spec.load("vit-b-32-flickr30k")
    figures = {(one.metric, one.backend): one.value for one in found.references}
    assert figures["image_retrieval_recall@5", "pytorch"] == 0.883
    assert figures["text_retrieval_recall@5", "pytorch"] == 0.963
    assert round(figures["image_retrieval_recall@5", "om"], 3) == 0.884
    assert figures["text_retrieval_recall@5", "om"] == 0.962
    curves = {curve.tower: curve.fps for curve in found.throughput.published}
    assert curves["vision"] == {1: 181, 4: 251, 8: 285, 16: 306, 32: 319, 64: 326}
    assert curves["text"] == {1: 407, 4: 1031, 8: 1944, 16: 2999, 32: 4139, 64: 4502}


def test_a_backend_without_figures_takes_pytorchs():
    found = spec.load("vit-b-32-flickr30k")
    assert found.reference("image_retrieval_recall@5", "onnx").value == 0.883
    assert found.reference("image_retrieval_recall@5", "om").value == 0.8841
    assert found.reference("no_such_metric", "om") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[model]", "[modell]"), "unknown field `modell`"),
        (('name = "ViT-B-16"', 'nmae = "ViT-B-16"'), "nmae|name"),
        (("count = 10", 'count = "ten"'), r"Expected `int`, got `str` - at `\$.references"),
        (("candidates = 5", ""), "image_retrieval_recall@5: give the number of its candidates, or data.images"),
        (("value = 0.5", "value = 50.0"), r"Expected `float` <= 1.0 - at `\$.references\[0\].value"),
        (("value = 0.5", "value = 0.5\nwithin = 2.0"), "Expected `float` < 1.0 - at .*within"),
        (('source = "me"', 'source = "me"\ntolerance = 0.1'), "unknown field `tolerance`"),
        (('[data]\nname = "flickr30k"', '[data]\nname = "flickr30k"\nkind = "tar"'), "data.kind is 'tar'"),
        (("title =", "title"), "spec .*mine.toml"),
        (
            (
                'source = "me"',
                'source = "me"\n[[paired]]\nmetric = "text_retrieval_recall@5"\nprecision = "w8a8"\n'
                'within = 0.01\nbecause = "int8"',
            ),
            "paired text_retrieval_recall@5: each has a precision; add one without",
        ),
        (('source = "me"', 'source = "me"\n[throughput]\nbatch_sizes = [0]'), "batch_sizes"),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    assert change[0] in GOOD
    file = tmp_path / "mine.toml"
    file.write_text(GOOD.replace(*change), encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        spec.load(str(file))
    assert "\n" not in str(caught.value).strip()
    assert str(file) in str(caught.value)


def test_a_users_spec_loads(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(GOOD, encoding="utf-8")
    found = spec.load(str(file))
    assert (found.model.name, found.references[0].within) == ("ViT-B-16", None)


def test_bytes_that_are_not_text(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="mine.toml"):
        spec.load(str(file))


def test_an_unknown_spec_names_the_shipped_ones():
    with pytest.raises(UsageError, match="shapes, vit-b-32-flickr30k"):
        spec.load("vitb32")


def test_published_figures_by_model_weights_and_data():
    rows = spec.published("ViT-B-32", "laion2b_s34b_b79k", "flickr30k")
    recalls = {row.recalls["image_retrieval_recall@5"] for row in rows}
    assert recalls == {0.8836, 0.8838}
    assert all(row.source for row in rows)


def test_the_table_has_121_models_on_both_data_sets():
    with open(spec.FOLDER / "reference_recall.csv", encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if "open_clip" in row["source"]]
    for data in ("flickr30k", "mscoco_captions"):
        assert len({(row["model"], row["pretrained"]) for row in rows if row["dataset"] == data}) == 121


@pytest.mark.parametrize("name", ["parity", "references", "paired"])
def test_two_tables_of_one_key_are_refused(tmp_path, name):
    """The first would win without a word."""
    text = (spec.FOLDER / "shapes.toml").read_text(encoding="utf-8")
    start = text.index(f"[[{name}]]")
    table = text[start : text.index("\n\n", start)]
    file = tmp_path / "twice.toml"
    file.write_text(f"{text}\n{table}\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"two \[\[{name}\]\] of .*; keep one"):
        spec.load(str(file))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("cosine_min = 0.9999999998\n", "cosine_min = 0.5\n", "parity onnx: cosine_min 0.5 cannot fail"),
        ("max_abs = 5e-6\n", "max_abs = 0.9\n", "parity onnx: max_abs 0.9 cannot fail"),
        ("norm = 5e-3\n", "norm = 0.99\n", "norm 0.99 cannot fail"),
        ("invariance = 2e-3\n", "invariance = 0.5\n", "invariance 0.5 cannot fail"),
        ("text_min = 0.99999999999\n", "text_min = 0.1\n", "golden: cosine 0.1 cannot fail"),
        ("within = 0.005\n", "within = 0.9\n", "image_retrieval_recall@5: within 0.9 cannot fail"),
        ("within = 0.002\n", "within = 0.5\n", "image_retrieval_recall@5: within 0.5 cannot fail"),
        ("[throughput]\n", "[throughput]\nfloor = 0\n", "throughput: floor 0 cannot fail"),
        ("[throughput]\n", "[throughput]\nfloor = -3\n", "Expected `float` >= 0"),
        ("captions = 5005\n", "captions = 5005\nduplicates = 5000\n", "data: duplicates 5000 cannot fail"),
    ],
)
def test_bounds_that_a_broken_model_meets_are_refused(tmp_path, old, new, words):
    text = (spec.FOLDER / "shapes.toml").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "wide.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        spec.load(str(file))


def test_a_tower_has_bounds_of_its_own_or_those_of_both():
    found = spec.load("shapes")
    assert found.bounds("onnx", "fp32", "text").cosine_min > found.bounds("onnx", "fp32", "vision").cosine_min
    assert found.bounds("om", "fp16", "text") is found.bounds("om", "fp16", "vision")
