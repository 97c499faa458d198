"""What of a spec holds for the weights and data under test: figures, pinned embeddings, transform, activation."""

import re
import shutil

import pytest

from clipval import library, spec, subject, weights
from clipval.chain import Chain
from clipval.errors import InputError, UsageError
from clipval.options import Settings

from .conftest import CONFIG

OWN = spec.FOLDER / "shapes-vit.pt"
RECIPE = "vit-b-32-flickr30k"


def of(**given):
    return subject.of(Settings(**given))


@pytest.fixture
def other(tmp_path):
    """A checkpoint that is not the spec's."""
    import torch

    state = torch.load(str(OWN), weights_only=True)
    state["logit_scale"] = state["logit_scale"] + 1
    torch.save(state, tmp_path / "other.pt")
    return str(tmp_path / "other.pt")


@pytest.mark.parametrize("name", [None, CONFIG])
def test_the_specs_own_weights_by_path_keep_everything(name, tmp_path):
    shutil.copyfile(OWN, tmp_path / "copy.bin")
    found = of(model_name=name, pretrained=str(tmp_path / "copy.bin"))
    assert found.spec.golden is not None
    assert found.spec.references == spec.load("shapes").references
    assert found.left_out == ()


def test_a_folder_that_holds_the_specs_own_weights_is_known_too(tmp_path):
    shutil.copyfile(OWN, tmp_path / "open_clip_pytorch_model.bin")
    assert of(pretrained=str(tmp_path)).left_out == ()


def test_a_file_known_by_its_hash_takes_its_tags_published_figures(other, monkeypatch):
    url = library.tag_config("ViT-B-32-quickgelu", "openai")["url"]
    monkeypatch.setattr(subject, "sha256", lambda _: url.split("/")[-2])
    found = of(spec=RECIPE, model_name="ViT-B-32-quickgelu", pretrained=other)
    rows = spec.published("ViT-B-32", "openai", "flickr30k")
    assert found.spec.references[0].value in {value for row in rows for value in row.recalls.values()}
    monkeypatch.setattr(subject, "sha256", lambda _: "0" * 64)
    assert of(spec=RECIPE, model_name="ViT-B-32-quickgelu", pretrained=other).spec.references == []


def test_other_weights_lose_figures_and_golden_and_are_told_why(other):
    found = of(pretrained=other)
    assert found.spec.golden is None
    assert found.spec.references == []
    golden, recall = found.left_out
    assert golden.startswith("golden: the spec's embeddings are not for other.pt (sha256 ")
    assert recall.startswith("recall: not gated, the spec's figures are not of other.pt")


def test_other_data_lose_them_too(tmp_path):
    found = of(data_dir=tmp_path)
    assert (found.spec.golden, found.spec.references) == (None, [])
    assert "other data" in found.left_out[0]


def test_another_architecture_takes_published_figures():
    found = of(spec=RECIPE, model_name="ViT-B-16", pretrained="laion2b_s34b_b88k")
    figures = {one.metric: one for one in found.spec.references}
    rows = spec.published("ViT-B-16", "laion2b_s34b_b88k", "flickr30k")
    assert figures["image_retrieval_recall@5"].value in {row.recalls["image_retrieval_recall@5"] for row in rows}
    assert figures["text_retrieval_recall@5"].count == 1000
    assert all(one.within >= 0.01 and one.source for one in figures.values())
    assert found.spec.preprocess is None
    assert "held to published ones" in found.left_out[-1]


def test_a_tag_of_a_quickgelu_twin_takes_the_same_rows():
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        assert of(spec=RECIPE, model_name=name, pretrained="openai").spec.references, name


def test_unpublished_weights_are_not_gated():
    found = of(spec=RECIPE, model_name="ViT-B-16", pretrained="no_such_tag")
    assert found.spec.references == []
    assert "not gated" in found.left_out[-1]


def test_a_file_is_what_pretrained_cfg_says(other):
    found = of(spec=RECIPE, pretrained=other, pretrained_cfg="laion2b_s34b_b79k")
    assert found.spec.references == spec.load(RECIPE).references
    assert of(spec=RECIPE, pretrained=other).spec.references == []


def test_a_files_hash_in_the_spec(other, tmp_path):
    from clipval.store import sha256

    text = (spec.FOLDER / f"{RECIPE}.toml").read_text(encoding="utf-8")
    assert text.count("1bd3c7172de5") == 1
    known = text.replace("1bd3c7172de5b207ceac554f5ab5266166f3b9baccc9af5989bc801016d080ad", sha256(other))
    (tmp_path / "mine.toml").write_text(known, encoding="utf-8")
    assert of(spec=str(tmp_path / "mine.toml"), pretrained=other).spec.references


def test_seeded_weights_keep_the_transform_and_no_figures():
    found = of(spec=RECIPE, pretrained="random")
    assert found.spec.preprocess == spec.load(RECIPE).preprocess
    assert found.spec.golden is None


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        ("mean", "mean = [0.5, 0.5, 0.5]", "mean 0.5 0.5 0.5, but .* with 0.481455 0.457827 0.408211"),
        ("std", "std = [0.5, 0.5, 0.5]", "std 0.5 0.5 0.5, but"),
        ("resize_mode", 'resize_mode = "squash"', "resize_mode squash, but .* with shortest"),
        ("interpolation", 'interpolation = "bilinear"', "interpolation bilinear, but .* with bicubic"),
        ("mean", "mean = [0.4815, 0.4578, 0.4082]", ""),
        ("interpolation", 'interpolation = "random"', ""),
    ],
)
def test_a_spec_that_contradicts_the_weights_own_transform(line, other, words, tmp_path):
    text = (spec.FOLDER / f"{RECIPE}.toml").read_text(encoding="utf-8")
    changed, count = re.subn(rf"^{line} = .*$", other, text, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "mine.toml").write_text(changed, encoding="utf-8")
    found = of(spec=str(tmp_path / "mine.toml"))
    known = weights.identify(*found.weights_asked)  # by its tag, without a download
    if not words:
        assert found.transform_of(known) is known.preprocess
        return
    with pytest.raises(InputError, match=rf"mine.toml: \[preprocess\] has {words}"):
        found.transform_of(known)


def test_a_transform_that_only_the_spec_states_is_said(other, tmp_path):
    text = (spec.FOLDER / "shapes.toml").read_text(encoding="utf-8")
    text = text.replace('"shapes-vit.json"', f'"{CONFIG}"').replace('"shapes-vit.pt"', f'"{other}"')
    head, rest = text[: text.index("[golden]")], text[text.index("[[references]]") :]
    (tmp_path / "mine.toml").write_text(head + rest, encoding="utf-8")
    chain = Chain(Settings(spec=str(tmp_path / "mine.toml"), workdir=tmp_path))
    (line,) = chain.subject.assumed(chain.weights)
    assert line.startswith("transform: only the spec states it (shortest, bicubic, mean 0.481455")


def test_what_nothing_states_is_said_as_assumed(other, tmp_path):
    chain = Chain(Settings(pretrained=other, workdir=tmp_path))
    lines = chain.subject.assumed(chain.weights)
    assert [line.partition(";")[0] for line in lines] == [
        "transform assumed: shortest, bicubic, mean 0.481455 0.457827 0.408211, std 0.26863 0.261303 0.275777",
        "activation assumed: gelu",
    ]
    own = Chain(Settings(workdir=tmp_path))
    assert own.subject.assumed(own.weights) == []


PAIRS = [("ViT-B-32", "openai"), ("RN50", "yfcc15m"), ("ViT-H-14", "dfn5b"), ("ViT-B-32", "laion400m_e32")]


@pytest.mark.parametrize(("name", "tag"), PAIRS)
def test_a_tag_of_another_activation_names_the_right_architecture(name, tag):
    """Before anything is downloaded, and also when it is said of a file."""
    if tag not in library.tags(name):
        pytest.skip(f"this open_clip has no {tag}")
    with pytest.raises(InputError, match=f"QuickGELU.*the architecture computes GELU; give --model-name {name}-quick"):
        weights.find_weights(name, tag)
    with pytest.raises(InputError, match=f"give --model-name {name}-quickgelu"):
        weights.find_weights(name, str(OWN), tag)


def test_the_right_architecture_passes():
    for name, tag in (("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")):
        assert weights.identify(name, tag).quick_gelu == name.endswith("quickgelu")


def test_every_pair_of_another_activation_is_refused():
    """28 of open_clip 3.3's pairs; one of them has no other architecture."""
    refused = 0
    for name, tag in library.import_open_clip().list_pretrained():
        if library.tag_is_quick(name, tag) != library.is_quick(name):
            other = library.twin(name)
            if not other:
                other = "a json config" if library.tag_is_quick(name, tag) else ""
            if not other:
                assert name == "roberta-ViT-B-32"
                continue
            refused += 1
            with pytest.raises(InputError, match=f"give (--model-name )?{other}"):
                weights.identify(name, tag)
    assert refused == 27 or library.open_clip_version() != "3.3.0"


def test_a_spec_states_the_activation():
    with pytest.raises(InputError, match="trained with QuickGELU, the architecture computes GELU; give a json config"):
        weights.identify(CONFIG, str(OWN), activation="quick_gelu")
    assert weights.identify(CONFIG, str(OWN), activation="gelu").quick_gelu is False
    assert weights.identify(CONFIG, str(OWN)).quick_gelu is None


def test_a_file_is_known_by_the_hash_in_its_address(monkeypatch):
    """OpenAI's own file in the architecture that computes GELU."""
    url = library.tag_config("ViT-B-32", "openai")["url"]
    monkeypatch.setattr(weights, "sha256", lambda _: url.split("/")[-2])
    with pytest.raises(InputError, match="tag openai"):
        weights.find_weights("ViT-B-32", str(OWN))
    assert weights.find_weights("ViT-B-32-quickgelu", str(OWN)).tag == "openai"


def test_pretrained_cfg_must_be_a_tag():
    with pytest.raises(UsageError, match="no weight tag of ViT-B-32"):
        weights.find_weights("ViT-B-32", str(OWN), "no_such_tag")
    found = weights.identify(CONFIG, str(OWN), "ViT-L-14/laion2b_s32b_b82k")
    assert found.preprocess.mean == (0.5, 0.5, 0.5)


def test_recall_that_gates_nothing_is_said(tmp_path):
    text = (spec.FOLDER / "shapes.toml").read_text(encoding="utf-8").replace('"shapes-', f'"{spec.FOLDER}/shapes-')
    lines = [line for line in text.splitlines() if not line.startswith("within = 0.0") or "captions: at" in line]
    shown = tmp_path / "shown.toml"
    head, _, rest = "\n".join(lines).partition("[[paired]]")
    shown.write_text(head + rest[rest.index("[throughput]") :], encoding="utf-8")
    assert [line.partition(",")[0] for line in of(spec=str(shown)).left_out] == [
        "recall: shown and not gated",
        "paired: the spec has no [[paired]]",
    ]
