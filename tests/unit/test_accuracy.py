"""Gates of accuracy by themselves: each passes on good evidence and fails on bad, and says where."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from clipval import arrays, retrieval, spec
from clipval.backends import Identity
from clipval.embeddings import Embeddings, Golden
from clipval.errors import InputError
from clipval.gates import artifacts, embeddings
from clipval.gates import retrieval as recalled
from clipval.towers import TEXT, VISION, towers

WHERE = Identity("onnx", "test", "cpu", "fp32")
SPEC = spec.load("vit-b-32-flickr30k")
BOUNDS = SPEC.bounds("onnx", "fp32", "text")
IDS = tuple(f"{n}_0" for n in range(64))


@pytest.fixture
def rows():
    values = np.random.default_rng(0).normal(size=(64, 512))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def verdicts(figures):
    return [figure.verdict for figure in figures]


def messages(figures):
    return "\n".join(figure.message for figure in figures)


def test_good_values_pass(rows):
    assert set(verdicts(embeddings.values(Embeddings(IDS, rows), WHERE, TEXT, BOUNDS, IDS))) == {"pass"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: np.where(np.arange(64)[:, None] == 5, np.nan, x), "first bad sample 5_0"),
        (lambda x: np.where(np.arange(64)[:, None] == 5, 65504.0, x), "first bad sample 5_0"),
        (lambda x: x * 2, "|L2 norm - 1| is 1 over 64, expected <= "),
        (lambda x: x * 2, "no embedding is of unit length: the file ends before the normalisation"),
        (lambda x: np.where(np.arange(64)[:, None] == 7, x * 1.001, x), "sample 7_0"),
        (lambda x: x[:, :511], "ids, count and width"),
    ],
)
def test_bad_values_fail(rows, change, words):
    found = embeddings.values(Embeddings(IDS, np.asarray(change(rows), np.float32)), WHERE, TEXT, BOUNDS, IDS)
    assert "fail" in verdicts(found)
    assert words in messages(found)


def test_a_lost_sample_fails(rows):
    found = embeddings.values(Embeddings(IDS[:-1], rows[:-1]), WHERE, TEXT, BOUNDS, IDS)
    assert verdicts(found)[0] == "fail"


def test_collapsed_embeddings_are_not_distinct(rows):
    same = np.repeat(rows[:1], 64, axis=0)
    found = embeddings.distinct(Embeddings(IDS, same), WHERE, TEXT, np.arange(64))
    assert verdicts(found) == ["fail", "fail"]
    assert "distinct/onnx/text" in messages(found)


def test_two_inputs_with_one_embedding_are_named(rows):
    rows[9] = rows[3]
    found = embeddings.distinct(Embeddings(IDS, rows), WHERE, TEXT, np.arange(64))
    assert "samples 3_0 and 9_0" in messages(found)


@pytest.mark.parametrize("block", [1, 7, 63, 64, 100])
def test_the_nearest_row_is_found_in_any_block(rows, block, monkeypatch):
    rows[40] = rows[3] + 1e-4
    unit = arrays.unit(rows)
    far = 1 - unit @ unit.T
    np.fill_diagonal(far, np.inf)
    monkeypatch.setattr(embeddings, "BLOCK", block)
    near, other = embeddings._nearest(unit)
    assert np.allclose(near, far.min(axis=1), rtol=0, atol=1e-14)
    assert list(other) == list(far.argmin(axis=1))


def test_one_input_twice_may_have_one_embedding(rows):
    rows[9] = rows[3]
    digests = np.arange(64)
    digests[9] = digests[3]
    assert verdicts(embeddings.distinct(Embeddings(IDS, rows), WHERE, TEXT, digests)) == ["pass", "pass"]


def seeded(rows, size=1e-3):
    """Embeddings as of an untrained network: all alike, up to a little of each input."""
    alike = rows[0] + size * rows
    return (alike / np.linalg.norm(alike, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("rounded", [np.float32, np.float16])
def test_an_untrained_network_is_held_to_what_the_reference_keeps_apart(rows, rounded):
    reference = Embeddings(IDS, seeded(rows))
    found = Embeddings(IDS, reference.values.astype(rounded).astype(np.float32))
    assert verdicts(embeddings.distinct(found, WHERE, VISION, np.arange(64)))[1] == "fail"
    assert verdicts(embeddings.distinct(found, WHERE, VISION, np.arange(64), reference)) == ["pass", "pass"]


def test_an_untrained_network_that_collapses_in_a_backend_fails(rows):
    reference = Embeddings(IDS, seeded(rows))
    nearer = Embeddings(IDS, seeded(rows, 5e-4))
    assert verdicts(embeddings.distinct(nearer, WHERE, VISION, np.arange(64), reference)) == ["pass", "fail"]
    two = reference.values.copy()
    two[9] = two[3]
    found = embeddings.distinct(Embeddings(IDS, two), WHERE, VISION, np.arange(64), reference)
    assert verdicts(found) == ["fail", "pass"]
    assert "samples 3_0 and 9_0" in messages(found)
    same = Embeddings(IDS, np.repeat(reference.values[:1], 64, axis=0))
    assert verdicts(embeddings.distinct(same, WHERE, VISION, np.arange(64), reference)) == ["fail", "fail"]
    assert verdicts(embeddings.distinct(same, WHERE, VISION, np.arange(64), same)) == ["fail", "fail"]


def test_invariance_compares_by_id(rows):
    whole = Embeddings(IDS, rows)
    picked = embeddings.invariance_samples(64)
    assert picked[-1] == 63
    names = tuple(IDS[n] for n in picked)
    good = Embeddings(names, rows[picked])
    turned = Embeddings(names[::-1], rows[picked][::-1])
    assert verdicts(embeddings.invariance(whole, good, turned, WHERE, VISION, BOUNDS)) == ["pass", "pass"]
    wrong = Embeddings(names[::-1], rows[picked])
    assert verdicts(embeddings.invariance(whole, good, wrong, WHERE, VISION, BOUNDS)) == ["pass", "fail"]
    assert verdicts(embeddings.invariance(whole, wrong, good, WHERE, VISION, BOUNDS)) == ["fail", "pass"]


def ranked(image_hits, text_hits):
    def direction(name, hits, count):
        ranks = np.where(np.arange(count) < hits, 1, 99)
        return retrieval.Direction(name, tuple(str(n) for n in range(count)), ranks, np.zeros(count), 6000 - count)

    return retrieval.Retrieval(
        direction("image_retrieval", image_hits, 5000), direction("text_retrieval", text_hits, 1000)
    )


@pytest.mark.parametrize(
    ("hits", "verdict", "words"),
    [
        (4415, "pass", ""),
        (4440, "pass", ""),
        (4441, "fail", "+26 of 5000 queries"),
        (4389, "fail", "-26 of 5000 queries"),
    ],
)
def test_recall_is_held_on_both_sides(hits, verdict, words):
    found = recalled.recall(ranked(hits, 963), WHERE, SPEC, "image_retrieval_recall@5")
    assert verdicts(found) == [verdict]
    assert words in messages(found)
    assert found[0].source.startswith("ModelZoo-PyTorch")


def test_om_is_held_to_its_own_column():
    where = WHERE._replace(name="om")
    (found,) = recalled.recall(ranked(4421, 962), where, SPEC, "image_retrieval_recall@5")
    assert found.reference == 0.8841


@pytest.mark.parametrize(
    ("precision", "hits", "verdict"),
    [("fp32", 4330, "fail"), ("w8a8", 4330, "pass"), ("w8a8", 4270, "fail"), ("w8a16", 4330, "fail")],
)
def test_a_quantised_backend_may_lose_what_its_precision_may_lose(precision, hits, verdict):
    where = WHERE._replace(name="onnx", precision=precision)
    (found,) = recalled.recall(ranked(hits, 962), where, SPEC, "image_retrieval_recall@5", precision)
    assert found.verdict == verdict
    assert (f"{precision} may lose" in found.message) == (precision != "fp32" and verdict == "fail")


def test_a_figure_without_tolerance_is_shown():
    reference = spec.Reference(metric="text_retrieval_recall@5", backend="pytorch", value=0.9, count=1000, source="x")
    loose = spec.Spec(name="s", title="s", model=SPEC.model, data=SPEC.data, references=[reference])
    (found,) = recalled.recall(ranked(4415, 1), WHERE, loose, "text_retrieval_recall@5")
    assert (found.verdict, found.measured) == ("info", 0.001)


@pytest.mark.parametrize(
    ("metric", "images", "captions", "words"),
    [
        ("image_retrieval_recall@5", 1000, 4999, "4999 queries among 1000 candidates, .* has 5000 among 1000"),
        ("image_retrieval_recall@5", 970, 5000, "5000 queries among 970 candidates"),
        ("text_retrieval_recall@5", 1001, 5000, "1001 queries among 5000 candidates"),
        ("text_retrieval_recall@5", 1000, 4750, "1000 queries among 4750 candidates, .* has 1000 among 5000"),
        ("text_retrieval_recall@1", 970, 4850, "970 queries among 4850 candidates"),
    ],
)
def test_recall_over_other_numbers_is_no_comparison(metric, images, captions, words):
    def direction(name, count, candidates):
        share = 0.8841 if name == "image_retrieval" else 0.962
        ranks = np.where(np.arange(count) < share * count, 1, 99)
        return retrieval.Direction(name, tuple(str(n) for n in range(count)), ranks, np.zeros(count), candidates)

    found = retrieval.Retrieval(
        direction("image_retrieval", captions, images), direction("text_retrieval", images, captions)
    )
    for where in (WHERE, WHERE._replace(name="om")):
        (figure,) = recalled.recall(found, where, SPEC, metric)
        assert figure.verdict == "fail"
        assert re.search(words, figure.message)


def test_paired_names_the_flips():
    bounds = SPEC.paired[1]
    (good,) = recalled.paired(ranked(4415, 963), ranked(4415, 960), WHERE, bounds)
    (bad,) = recalled.paired(ranked(4415, 963), ranked(4415, 959), WHERE, bounds)
    assert (good.verdict, bad.verdict) == ("pass", "fail")
    assert "0 gained, 4 lost" in bad.message
    assert "959" in bad.message


GOLDEN = spec.GoldenSpec(file="pins.npz", cosine_min=0.99999, vision_min=1 - 1e-11, text_min=1 - 1e-11)


def test_the_reference_is_held_to_pinned_embeddings(rows):
    pinned = Embeddings(IDS[8:4:-1], rows[8:4:-1])  # by id, in any order
    assert verdicts(embeddings.golden_of_data(pinned, Embeddings(IDS, rows), WHERE, TEXT, GOLDEN)) == ["pass"]
    rows = rows.copy()
    rows[6] += 0.001
    (found,) = embeddings.golden_of_data(pinned, Embeddings(IDS, rows), WHERE, TEXT, GOLDEN)
    assert (found.verdict, found.count) == ("fail", 4)
    assert "worst samples 6_0" in found.message


def test_a_pinned_sample_that_is_not_there_is_an_error(rows):
    with pytest.raises(InputError, match=r"pins.npz: sample 63_0 is not in the data; run clipval pin again"):
        embeddings.golden_of_data(Embeddings(IDS, rows), Embeddings(IDS[:-1], rows[:-1]), WHERE, TEXT, GOLDEN)


@pytest.mark.parametrize(
    ("off", "digest", "wanted"),
    [
        (0, "a", ["pass", "pass"]),
        (1e-6, "a", ["pass", "pass"]),
        (1e-4, "a", ["pass", "fail"]),
        (0, "b", ["fail", "pass"]),
    ],
)
def test_the_reference_is_held_to_pinned_probe_inputs(rows, off, digest, wanted):
    pinned = Golden(Embeddings((), rows[:0]), rows, "a")
    found = rows.copy()
    found[3] *= 1 + off * np.random.default_rng(0).normal(size=rows.shape[1])
    figures = embeddings.golden(pinned, Embeddings(IDS, found), digest, WHERE, TEXT, GOLDEN)
    assert verdicts(figures) == wanted


@pytest.mark.parametrize(("count", "batch_size"), [(1000, 8), (997, 64), (5000, 1), (60, 64)])
def test_two_whole_batches_and_a_partial_one(count, batch_size):
    picked = embeddings.batch_samples(count, batch_size)
    assert len(picked) == 2 * batch_size + (batch_size // 2 or 1)
    assert len(set(picked)) == min(count, len(picked))
    assert picked.max() < count


def test_a_wrong_row_of_a_batch_is_named(rows):
    picked = np.arange(20)
    reference = Embeddings(tuple(IDS[n] for n in picked), rows[picked])
    found = Embeddings(reference.ids, reference.values.copy())
    assert verdicts(embeddings.batches(reference, found, WHERE, TEXT, BOUNDS, 8)) == ["pass", "pass"]
    found.values[13] = found.values[12]
    figures = embeddings.batches(reference, found, WHERE, TEXT, BOUNDS, 8)
    assert verdicts(figures) == ["fail", "fail"]
    assert f"sample {IDS[13]}, row 5 of batch 1" in figures[0].message
    assert figures[0].gate == f"batches/{WHERE.name}/text/8"


@pytest.mark.parametrize("damage", [np.nan, 0.5])
def test_a_probe_names_its_input_and_its_seed(rows, damage):
    reference = Embeddings(IDS, rows)
    found = Embeddings(IDS, rows.copy())
    assert set(verdicts(embeddings.probe(reference, found, WHERE, TEXT, BOUNDS, 7))) == {"pass"}
    found.values[5, 0] = damage
    figures = embeddings.probe(reference, found, WHERE, TEXT, BOUNDS, 7)
    assert "fail" in verdicts(figures)
    failed = next(figure for figure in figures if figure.verdict == "fail")
    assert f"input {IDS[5]!r}; repeat with --probe-seed 7" in failed.message


def test_every_prepared_image_is_compared(monkeypatch):
    """The one among 997 that is not the transform's is found wherever it lies."""
    tower = towers(image_size=2)["vision"]

    class Rows:
        ids = tuple(f"image{n}" for n in range(997))

        def __init__(self):
            self.tower, self.off = tower, -1

        def __len__(self):
            return len(self.ids)

        def __getitem__(self, index):
            (n,) = index
            return np.full((1, 3, 2, 2), n + (n == self.off), np.float32)

    def pixels(path, *_):
        return np.full((3, 2, 2), path, np.float32)

    rows, dataset = Rows(), SimpleNamespace(image_paths=range(997))
    monkeypatch.setattr(artifacts, "pixels", pixels)
    monkeypatch.setattr(artifacts, "expected_pixels", pixels)
    one = spec.load("vit-b-32-flickr30k")
    assert set(verdicts(artifacts.prepared_images(rows, dataset, None, one, np.arange(997)))) == {"pass"}
    for rows.off in (1, 3, 500, 996):
        for found in artifacts.prepared_images(rows, dataset, None, one, np.arange(997))[:2]:
            assert (found.verdict, found.count) == ("fail", 997)
            assert f"sample image{rows.off}" in found.message
