"""Every kind of annotation file gives what the recipe's file gives, and a kind is added with one file and one line."""

import csv
import json
import random
import sys
import unicodedata

import pytest
from PIL import Image

from clipval import datasets
from clipval.datasets import karpathy
from clipval.errors import InputError, UsageError

CAPTIONS = {
    "20.jpg": ['A man, "Bob", waves.', "Two ; dogs", "2 cats, sleeping"],
    "1.jpg": ["plain", "\u56fe\u7247 \u00e9", "a #1 sign"],
    "3.jpg": ["It's here", "Here. ", "x | y"],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in CAPTIONS:
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name)
    return tmp_path


def rows(header, separator, numbered=False):
    def write(folder):
        with open(folder / "captions.txt", "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
            if header:
                writer.writerow(header.split())
            for name, captions in CAPTIONS.items():
                writer.writerows((name, k, one) if numbered else (name, one) for k, one in enumerate(captions))

    return write


def lines(name, form, header=""):
    def write(folder):
        all_lines = [form.format(image, k, one) for image, some in CAPTIONS.items() for k, one in enumerate(some)]
        (folder / name).write_text(header + "\n".join(all_lines) + "\n", encoding="utf-8")

    return write


def karpathy_json(folder, name="dataset_flickr30k.json"):
    images = [
        {"filename": name, "split": "test", "imgid": n, "sentences": [{"raw": one, "tokens": []} for one in captions]}
        for n, (name, captions) in enumerate(CAPTIONS.items())
    ]
    other = {"filename": "9.jpg", "split": "train", "sentences": [{"raw": "of another split"}]}
    (folder / name).write_text(json.dumps({"images": [other, *images], "dataset": "flickr30k"}), encoding="utf-8")


def coco(folder, more=()):
    names = [*more, *CAPTIONS]
    annotations = [
        {"id": 100 * n + k, "image_id": n, "caption": one + "\n"}
        for n, name in enumerate(names)
        for k, one in enumerate(CAPTIONS.get(name, ["of another split"]))
    ]
    random.Random(0).shuffle(annotations)
    images = [{"id": n, "file_name": name, "height": 8} for n, name in enumerate(names)]
    root = {"info": {}, "images": images, "annotations": annotations}
    (folder / "captions_val2014.json").write_text(json.dumps(root), encoding="utf-8")


def coco_with_split(folder):
    coco(folder, more=("9.jpg", "8.jpg"))
    karpathy_json(folder, "dataset_coco.json")


def coco_as_unpacked(folder):
    """COCO's own archives: annotations/ beside the folders of images, the other kinds of annotation in it too."""
    coco(folder)
    (folder / "annotations").mkdir()
    (folder / "captions_val2014.json").rename(folder / "annotations" / "captions_val2014.json")
    boxes = {"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(boxes), encoding="utf-8")


def karpathy_csv(folder, columns=("raw", "sentids", "split", "filename", "img_id"), others=True):
    """As pandas writes it: lists as JSON in a cell."""
    given = [("9.jpg", ["of another split"], "train")] * others + [
        (name, some, "test") for name, some in CAPTIONS.items()
    ]
    cells = [
        {"raw": json.dumps(some), "sentids": "[1, 2]", "split": split, "filename": name, "img_id": n}
        for n, (name, some, split) in enumerate(given)
    ]
    with open(folder / "flickr_annotations_30k.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(cells)


def karpathy_csv_of_the_test_split(folder):
    karpathy_csv(folder, columns=("filename", "raw"), others=False)


def blip(folder):
    """Next to the file for training, and with a folder of images that is not there."""
    entries = [{"image": f"flickr30k-images/{name}", "caption": captions} for name, captions in CAPTIONS.items()]
    (folder / "flickr30k_test.json").write_text(json.dumps(entries), encoding="utf-8")
    training = [{"image": "flickr30k-images/9.jpg", "caption": "of another split", "image_id": "9"}]
    (folder / "flickr30k_train.json").write_text(json.dumps(training), encoding="utf-8")


FORMS = {
    "csv": ("karpathy", rows("image caption", ",")),
    "csv, no header": ("karpathy", rows("", ",")),
    "tsv": ("karpathy", rows("filepath title", "\t")),
    "semicolons": ("karpathy", rows("image caption", ";")),
    "semicolons, no header": ("karpathy", rows("", ";")),
    "captions.txt": ("kaggle", rows("image_name comment_number comment", ",", True)),
    "captions.txt, no header": ("kaggle", rows("", ",", True)),
    "results.csv": ("kaggle", lines("results.csv", "{}| {}| {} ", "image_name| comment_number| comment\n")),
    "token": ("kaggle", lines("results_20130124.token", "{}#{}\t{}")),
    "karpathy json": ("karpathy_json", karpathy_json),
    "karpathy csv": ("karpathy_csv", karpathy_csv),
    "karpathy csv, test split": ("karpathy_csv", karpathy_csv_of_the_test_split),
    "blip": ("blip", blip),
    "coco": ("coco", coco),
    "coco, as unpacked": ("coco", coco_as_unpacked),
    "coco and karpathy": ("coco", coco_with_split),
}


@pytest.fixture
def recipe(folder, tmp_path_factory):
    """The data set as the recipe's own file gives it."""
    file = tmp_path_factory.mktemp("recipe") / "set_karpathy.txt"
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(
            [("image", "caption"), *((n, one) for n, some in CAPTIONS.items() for one in some)]
        )
    return karpathy.read(folder, annotations=file)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("named", [False, True], ids=["recognised", "named"])
def test_as_the_recipes_file(folder, recipe, form, named):
    kind, write = FORMS[form]
    write(folder)
    found = datasets.read(folder, named=kind if named else None)
    for field in ("image_ids", "image_paths", "captions", "caption_ids"):
        assert getattr(found, field) == getattr(recipe, field)
    assert found.fingerprint() == recipe.fingerprint()


def test_kaggles_broken_row_is_read(folder):
    text = "image_name| comment_number| comment\n1.jpg| 0| a man\n1.jpg| 1   A dog runs across the grass .\n"
    (folder / "results.csv").write_text(text, encoding="utf-8")
    assert datasets.read(folder).captions == ("a man", "A dog runs across the grass .")


def test_columns_in_the_other_order(folder, recipe):
    turned = [("caption", "image"), *((one, name) for name, some in CAPTIONS.items() for one in some)]
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(turned)
    assert datasets.read(folder).fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("captions.json", "captions.json is of no known layout"),
        ("metadata.jsonl", "metadata.jsonl is JSON lines: write one CSV"),
        (
            "data/test-00000-of-00009.parquet",
            "data/test-00000-of-00009.parquet is a table of Parquet, as of Hugging Face",
        ),
        (
            "test/data-00000-of-00001.arrow",
            "is a table of Arrow, as of Hugging Face's datasets: write its images to files",
        ),
        ("00000.tar", "00000.tar is a shard of webdataset, as of img2dataset: unpack all shards"),
    ],
)
def test_a_layout_that_is_not_known_is_named(folder, name, words):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('[{"url": "1.jpg", "text": "a"}]', encoding="utf-8")
    with pytest.raises(InputError, match=f"no annotation file; expected images and .*; .*{words}"):
        datasets.read(folder)


def test_one_text_file_for_each_image_is_told(folder):
    for name in CAPTIONS:
        (folder / name).with_suffix(".txt").write_text("a caption", encoding="utf-8")
    with pytest.raises(InputError, match=r"\(1.txt, 20.txt, 3.txt\); each is of one image, as of img2dataset; gather"):
        datasets.read(folder)


def test_annotations_that_were_not_pulled_are_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 605000\n"
    (folder / "flickr30k_test_karpathy.txt").write_text(pointer, encoding="utf-8")
    with pytest.raises(InputError, match=r"karpathy.txt: a git-lfs pointer to a file of 0.605 MB"):
        datasets.read(folder)


def test_kaggles_captions_go_by_their_numbers(folder):
    (folder / "captions.txt").write_text("3.jpg,1,b\n1.jpg,0,c\n3.jpg,0,a\n", encoding="utf-8")
    assert datasets.read(folder).captions == ("a", "b", "c")


@pytest.mark.parametrize("form", [name for name, (kind, _) in FORMS.items() if kind != "karpathy"])
def test_clip_benchmarks_reading_is_for_the_recipes_file(folder, form):
    FORMS[form][1](folder)
    with pytest.raises(UsageError, match=r"is for \*_karpathy.txt; leave it out"):
        datasets.read(folder, captions_format="clip_benchmark")


def test_numbered_captions_are_never_taken_for_text(folder):
    rows("image_name comment_number comment", ",", True)(folder)
    with pytest.raises(InputError, match="three columns.*leave out --captions-format"):
        datasets.read(folder, named="karpathy", captions_format="clip_benchmark")


def test_several_kinds_are_named(folder):
    rows("image_name comment_number comment", ",", True)(folder)
    karpathy_json(folder)
    with pytest.raises(
        InputError, match=r"dataset_flickr30k.json \(karpathy_json\), captions.txt \(kaggle\).*--data-format"
    ):
        datasets.read(folder)
    assert datasets.read(folder, named="kaggle").captions == datasets.read(folder, expected="karpathy_json").captions
    rows("image caption", ",")(folder)
    assert len(datasets.read(folder).captions) == 9  # the spec's own kind needs no name


@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        (
            "karpathy_json",
            "a.json",
            '{"images": [{"split": "test", "sentences": []}]}',
            "missing required field `filename`",
        ),
        (
            "karpathy_json",
            "a.json",
            '{"images": [{"filename": "1.jpg", "split": "val", "sentences": []}]}',
            r"\(it has val\)",
        ),
        (
            "karpathy_json",
            "a.json",
            '{"images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": " "}]}]}',
            "1.jpg: the caption is empty",
        ),
        ("karpathy_json", "a.json", '{"images": [{"sentences"', "a.json: not the expected JSON"),
        ("karpathy_json", "a.txt", "1.jpg,a", "no annotation file; expected images and Karpathy's"),
        ("karpathy_csv", "a.csv", "filename,raw\n1.jpg,[a\n", "line 2: raw is not a JSON list of captions"),
        ("karpathy_csv", "a.csv", 'filename,raw\n1.jpg,"[""a"", "" ""]"\n', "image 1.jpg: the caption is empty"),
        (
            "karpathy_csv",
            "a.csv",
            'filename,raw,split\n1.jpg,"[""a""]",val\n',
            r"no image of the split 'test' \(it has val",
        ),
        ("blip", "a.json", '[{"image": "7.jpg", "caption": ["a"]}]', "a.json, entry 1: image '7.jpg' is not in"),
        ("blip", "a.json", '[{"image": "1.jpg", "caption": [1]}]', "a.json: not the expected JSON"),
        ("blip", "a.json", '[{"image": "1.jpg", "caption": "  "}]', "a.json, entry 1: the caption is empty"),
        (
            "coco",
            "a.json",
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "caption": "a"}]}',
            "no caption of image 1.jpg",
        ),
        (
            "coco",
            "a.json",
            '{"images": [{"id": 1, "file_name": "7.jpg"}], "annotations": [{"image_id": 1, "caption": "a", "id": 5}]}',
            "a.json, annotation 5: image '7.jpg' is not in",
        ),
        ("kaggle", "a.csv", "1.jpg| 0| a\n1.jpg, b\n", "line 2: expected image, number and caption"),
        ("kaggle", "a.txt", "1.jpg,0,a\n1.jpg,1,b, c\n", "line 2: .*put a caption with ','"),
        ("kaggle", "a.txt", '1.jpg,0,a\n1.jpg,1,"b\n', "line 2: not CSV"),
        ("kaggle", "a.txt", "1.jpg,0,a\n1.jpg,1,\n", "line 2: expected image, number and caption"),
    ],
)
def test_mistakes_are_named(folder, kind, name, content, words):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        datasets.read(folder, named=kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("there", "written", "differs"),
    [
        ("A.JPG", "a.jpg", "in case"),
        ("b.jpeg", "b.jpg", "in its suffix"),
        ("C.PNG", "c.jpg", "in its suffix"),
        (unicodedata.normalize("NFD", "\u00e9.jpg"), "\u00e9.jpg", "in its Unicode form"),
    ],
)
def test_a_name_that_nearly_matches_is_shown(folder, there, written, differs):
    Image.new("RGB", (8, 8)).save(folder / "images" / there, "PNG")
    (folder / "set_karpathy.txt").write_text(f"{written},a\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{there}' is there, which differs {differs}: rename it"):
        datasets.read(folder)


def test_absolute_paths_into_the_folder_are_those_images(folder):
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.jpg")
    (folder / "set_karpathy.txt").write_text(f"{folder.absolute() / 'images' / 'a.jpg'},x\n", encoding="utf-8")
    assert datasets.read(folder).image_paths == (folder / "images" / "a.jpg",)


def test_a_link_to_nothing_is_said(folder):
    (folder / "a.jpg").symlink_to(folder / "moved" / "a.jpg")
    (folder / "set_karpathy.txt").write_text("a.jpg,x\n", encoding="utf-8")
    with pytest.raises(InputError, match="it is a link to .*moved/a.jpg, which does not exist; copy"):
        datasets.read(folder)


SIDECAR = '''
"""A text file of captions beside each image."""

from clipval.datasets import Kind
from clipval.datasets.folder import Row, gather


def find(folder):
    return sorted(folder.glob("*.cap"))


def read(folder, captions_format="csv"):
    texts = {f"{path.stem}.jpg": path.read_text().split() for path in find(folder)}
    return gather(folder, folder, (Row("a word", name, one) for name, words in texts.items() for one in words))


KIND = Kind("sidecar", "a .cap file beside each image", find, read)
'''


@pytest.fixture
def sidecar(monkeypatch, tmp_path_factory):
    """A kind that a test adds: one file, one line."""
    there = tmp_path_factory.mktemp("kinds")
    (there / "sidecar_kind.py").write_text(SIDECAR, encoding="utf-8")
    monkeypatch.syspath_prepend(str(there))
    monkeypatch.setitem(datasets.MODULES, "sidecar", "sidecar_kind")
    yield
    sys.modules.pop("sidecar_kind", None)


def test_a_kind_is_one_file_and_one_line(sidecar, folder, tmp_path_factory):
    import argparse

    from clipval import chain, options, spec

    for name in ("1", "3"):
        (folder / f"{name}.cap").write_text("one two", encoding="utf-8")
    assert datasets.read(folder).caption_ids == ("1_0", "1_1", "3_0", "3_1")  # recognised
    text = (spec.FOLDER / "vit-b-32-flickr30k.toml").read_text(encoding="utf-8")
    own = tmp_path_factory.mktemp("spec") / "own.toml"
    text = text.replace('kind = "karpathy"', 'kind = "sidecar"').replace("images = 1000", "images = 2")
    own.write_text(text.replace("captions = 5000", "captions = 4"), encoding="utf-8")
    work = tmp_path_factory.mktemp("work")
    run = chain.Chain(options.Settings(spec=str(own), data_dir=folder, pretrained="random", workdir=work))
    assert run.dataset.captions == ("one", "two", "one", "two")
    parser = argparse.ArgumentParser()
    options.add_options(parser.add_argument, ["--data-format"])
    assert parser.parse_args(["--data-format", "sidecar"]).data_format == "sidecar"


def test_an_unknown_kind_is_refused(folder):
    with pytest.raises(UsageError, match="'tar': unknown; expected one of karpathy, "):
        datasets.read(folder, named="tar")
