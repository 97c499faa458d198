"""The reader: awkward captions come through whole, and bad folders are named down to the line."""

import csv
import gzip
import io
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipval import datasets
from clipval.datasets import RetrievalDataset, karpathy, shapes
from clipval.errors import InputError, UsageError

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path):
    for name in ("1.jpg", "20.jpg", "3.jpg"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def annotate(folder, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    (folder / "set_karpathy.txt").write_bytes(data)
    return folder


def test_awkward_captions(folder):
    text = 'image,caption\r\n20.jpg,"A man, ""Bob"", waves."\r\n1.jpg,  plain \r\n20.jpg,"two\nlines"\r\n\r\n'
    text += "3.jpg,图片\r\n"
    found = karpathy.read(annotate(folder, b"\xef\xbb\xbf" + text.encode()))
    assert found.image_ids == ("20", "1", "3")
    assert found.captions == ('A man, "Bob", waves.', "two\nlines", "plain", "图片")
    assert found.caption_ids == ("20_0", "20_1", "1_0", "3_0")
    assert found.image_of_caption.tolist() == [0, 0, 1, 2]
    assert [path.name for path in found.image_paths] == ["20.jpg", "1.jpg", "3.jpg"]


@pytest.mark.parametrize("header", ["", "image,caption\n", "\n \nImage, Caption\n", '\ufeff"image","caption"\r\n'])
def test_header_or_none(folder, header):
    assert karpathy.read(annotate(folder, header + "1.jpg,a\n3.jpg,b\n")).captions == ("a", "b")


def test_one_caption_twice_keeps_two_ids(folder):
    found = karpathy.read(annotate(folder, "1.jpg,a\n3.jpg,a\n1.jpg,a\n"))
    assert found.captions == ("a", "a", "a")
    assert found.caption_ids == ("1_0", "1_1", "3_0")


def test_an_image_without_a_caption_is_not_part_of_the_set(folder):
    assert karpathy.read(annotate(folder, "1.jpg,a\n")).image_ids == ("1",)


def test_the_locale_does_not_matter(folder, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    assert karpathy.read(annotate(folder, "1.jpg,图片 é\n")).captions == ("图片 é",)


def test_clip_benchmarks_own_reading(folder):
    text = 'image,caption\n1.jpg,"A man, ""Bob"", waves."\n3.jpg,b\n'
    found = karpathy.read(annotate(folder, text), captions_format="clip_benchmark")
    assert found.captions == ('"A man, ""Bob"", waves."', "b")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_clip_benchmark_skips_the_first_line_whatever_it_says(folder, end):
    found = karpathy.read(
        annotate(folder, end.join(["1.jpg,lost", "3.jpg, b ", "", "1.jpg,c"])), captions_format="clip_benchmark"
    )
    assert found.image_ids == ("3", "1")
    assert found.captions == (" b", "c")  # its strip takes the ends of the line only


def test_an_unknown_format_is_refused(folder):
    with pytest.raises(UsageError, match="'tsv': unknown; expected csv or clip_benchmark"):
        karpathy.read(annotate(folder, "1.jpg,a\n"), captions_format="tsv")


def test_clip_benchmark_cannot_read_another_ending(folder):
    with pytest.raises(InputError, match="line 2: 0 times '.jpg,'.*--captions-format csv"):
        karpathy.read(annotate(folder, "image,caption\n1.png,b\n"), captions_format="clip_benchmark")


@FUZZ
@given(
    st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1), min_size=1)
)
def test_any_caption_comes_back(folder, captions):
    kept = [caption for caption in captions if caption.strip()]
    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([("image", "caption"), *(("1.jpg", caption) for caption in kept)])
    if kept:
        assert karpathy.read(annotate(folder, rows.getvalue())).captions == tuple(one.strip() for one in kept)


@FUZZ
@given(
    st.one_of(st.binary(), st.text('1.jpg,"\n\r图a', max_size=60).map(str.encode)),
    st.sampled_from(["csv", "clip_benchmark"]),
)
def test_any_bytes_give_a_data_set_or_one_line(folder, content, captions_format):
    try:
        found = karpathy.read(annotate(folder, content), captions_format=captions_format)
    except InputError:
        with pytest.raises(InputError, match="set_karpathy.txt"):
            karpathy.read(folder, captions_format=captions_format)
    else:
        assert len(found.captions) == len(found.image_of_caption) == len(set(found.caption_ids)) > 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,caption\n", "no captions in it"),
        ("", "no captions in it"),
        ("image,caption\n1.jpg,a, b\n", "line 2: 3 columns, expected 2.*double quotes"),
        ("image,caption\n1.jpg\n", "line 2: 1 columns"),
        ("image,caption\n1.jpg,\n", "line 2: the caption is empty"),
        ("image,caption\n9.jpg,a\n", "line 2: image '9.jpg' is not in"),
        ('image,caption\n1.jpg,"a\nb"\n\n9.jpg,a\n', "line 5: image '9.jpg' is not in"),
        ("image,caption\n,a\n", "line 2: the image is empty"),
        ("image;caption\n1.jpg;a\n3.jpg;b;c\n", "line 3: 3 columns, .*caption with ';'"),
        ("image caption\n1.jpg a\n", "line 1: 1 columns"),
        (
            "sub/1.jpg,a\n",
            "'sub/1.jpg' is not in .*'1.jpg' is there, which differs in its folder: change",
        ),
        ("a/../1.jpg,a\n", "is not below the data folder"),
        ("..\\1.jpg,a\n", "is not below the data folder"),
        ("\\etc\\1.jpg,a\n", "is not below the data folder"),
        (".,a\n", "is not below the data folder"),
        (f"{'9' * 5000}.jpg,a\n", "line 1: image '9+' is not in"),
        (f"1.jpg,{'a' * 200_000}\n", "line 1: not CSV .*field limit"),
        ('1.jpg,"a" b\n', "line 1: not CSV"),
        (b"\xef\xbb\xbfimage,caption\n\xff,a\n", "line 2: not UTF-8"),
        ("image,caption\n1.jpg,a\n".encode("utf-16"), "line 1: not UTF-8 but UTF-16; save the file as UTF-8"),
        (gzip.compress(b"image,caption\n1.jpg,a\n" * 9, mtime=0), "set_karpathy.txt: a gzip file; unpack it"),
        (b"PK\x03\x04\xff\xff", "set_karpathy.txt: a zip archive; unpack it"),
        ("raw,sentids,split,filename,img_id\nx,x,x,1.jpg,1\n", "5 columns, .* keep those two alone, with one caption"),
        ("image,caption\n1.jpg,a\n".encode("utf-16-le"), "NUL bytes"),
        ("image,caption\n../1.jpg,a\n", "line 2: image '../1.jpg' is not below the data folder"),
        ("image,caption\n/etc/1.jpg,a\n", "is not below the data folder"),
        ('image,caption\n1.jpg,"a\n3.jpg,b\n', "line 2: not CSV"),
        (b"image,caption\n1.jpg,a\n3.jpg,\xff\n", "line 3: not UTF-8"),
        (b"image,caption\n1.jpg,\0\n", "NUL bytes"),
    ],
)
def test_mistakes_are_named(folder, content, words):
    with pytest.raises(InputError, match=words) as caught:
        karpathy.read(annotate(folder, content))
    assert "\n" not in str(caught.value)


def test_images_in_sub_folders(folder):
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a" / "7.jpg")
    found = karpathy.read(annotate(folder, "7.jpg,by name\n1.jpg,x\na/7.jpg,by path\n"))
    assert found.image_paths[0] == folder / "a" / "7.jpg"
    assert found.caption_ids == ("7_0", "7_1", "1_0")
    Image.new("RGB", (8, 8)).save(folder / "b" / "7.jpg")
    with pytest.raises(InputError, match="several folders"):
        karpathy.read(folder)
    with pytest.raises(InputError, match="have the same id, '7'"):
        karpathy.read(annotate(folder, "a/7.jpg,x\nb/7.jpg,y\n"))


def test_the_annotation_file_must_be_clear(folder):
    with pytest.raises(InputError, match="no annotation file"):
        karpathy.read(folder)
    annotate(folder, "1.jpg,a\n")
    (folder / "other_karpathy.txt").write_text("1.jpg,a\n", encoding="utf-8")
    with pytest.raises(InputError, match="other_karpathy.txt, set_karpathy.txt"):
        karpathy.read(folder)
    for missing in (folder / "none", folder / "1.jpg", folder / ("x" * 5000)):
        with pytest.raises(InputError, match="no such folder"):
            karpathy.read(missing)
    assert karpathy.read(folder, annotations=folder / "set_karpathy.txt").captions == ("a",)
    for missing in (folder / "none.txt", folder):
        with pytest.raises(InputError, match="annotations .* cannot be read"):
            karpathy.read(folder, annotations=missing)


def test_a_csv_or_txt_is_found_if_it_is_the_only_one(folder):
    (folder / "captions.csv").write_text("1.jpg,a\n", encoding="utf-8")
    (folder / "._captions.csv").write_bytes(b"\0\5\x16\7")  # as macOS leaves on other disks
    assert karpathy.read(folder).captions == ("a",)
    (folder / "notes.txt").write_text("nothing of the kind", encoding="utf-8")
    assert karpathy.read(folder).captions == ("a",)
    (folder / "notes.txt").write_text("1.jpg,b", encoding="utf-8")
    with pytest.raises(InputError, match=r"captions.csv, notes.txt"):
        karpathy.read(folder)


def test_links(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (8, 8)).save(elsewhere / "7.jpg")
    os.symlink(elsewhere, folder / "images")
    os.symlink(folder, folder / "round")  # and round again
    os.symlink(folder / "self", folder / "self")
    os.symlink(folder / "none", folder / "8.jpg")
    found = karpathy.read(annotate(folder, "7.jpg,by name\nimages/7.jpg,by path\n"))
    assert found.image_paths == (folder / "images" / "7.jpg",)
    with pytest.raises(InputError, match="image '8.jpg' is not in"):
        karpathy.read(annotate(folder, "8.jpg,a\n"))


@pytest.mark.parametrize("name", ["9.JPEG", "9.jfif", "9", "9.b.png", "九 9.jpg"])
def test_any_file_name(folder, name):
    Image.new("RGB", (8, 8)).save(folder / name, "JPEG")
    found = karpathy.read(annotate(folder, f"{name},a\n"))
    assert found.caption_ids == ((folder / name).stem + "_0",)


def test_two_images_of_one_id(folder):
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    with pytest.raises(InputError, match="line 2: .*1.png and .*1.jpg have the same id, '1'"):
        karpathy.read(annotate(folder, "1.jpg,a\n1.png,b\n"))


def test_counts_are_held(folder):
    found = karpathy.read(annotate(folder, "1.jpg,a\n3.jpg,b\n"))
    datasets.expect(found, images=2, captions=0)
    with pytest.raises(InputError, match="2 images, the spec says 1000"):
        datasets.expect(found, images=1000, captions=0)


def test_the_fingerprint_follows_captions_and_pixels(folder):
    first = karpathy.read(annotate(folder, "1.jpg,a\n3.jpg,b\n")).fingerprint()
    assert karpathy.read(folder).fingerprint() == first
    assert karpathy.read(annotate(folder, "1.jpg,b\n3.jpg,a\n")).fingerprint() != first
    annotate(folder, "1.jpg,a\n3.jpg,b\n")
    Image.new("RGB", (8, 8), "blue").save(folder / "3.jpg")
    assert karpathy.read(folder).fingerprint() != first


def test_the_fingerprint_names_an_image_that_went_away(folder):
    found = karpathy.read(annotate(folder, "1.jpg,a\n"))
    (folder / "1.jpg").unlink()
    with pytest.raises(InputError, match="1.jpg: cannot be read"):
        found.fingerprint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_ids": (), "image_paths": ()}, "0 images and 3 captions"),
        ({"captions": ("a", "b")}, "some lack a path, an id or an image"),
        ({"image_ids": ("1", "1")}, "an id is a duplicate"),
        ({"caption_ids": ("1_0", "1_0", "3_0")}, "an id is a duplicate"),
        ({"image_of_caption": np.array([0, 0, 0])}, "an image has no caption"),
        ({"image_of_caption": np.array([0, 1, 2])}, "a caption no image"),
        ({"image_of_caption": np.array([0, 1, 1])}, "caption 1_1 is paired with image 3"),
    ],
)
def test_parts_that_do_not_fit(folder, change, words):
    good = karpathy.read(annotate(folder, "1.jpg,a\n1.jpg,b\n3.jpg,c\n"))
    with pytest.raises(InputError, match=words):
        RetrievalDataset(**{**vars(good), **change})


def test_100k_lines(folder):
    rows = "".join(f"{(1, 3, 20)[n % 3]}.jpg,caption {n}\n" for n in range(100_000))
    found = karpathy.read(annotate(folder, "image,caption\n" + rows))
    assert len(found.captions) == 100_000


def test_the_drawn_set_reads_back(tmp_path):
    shapes.write(tmp_path, count=6)
    found = karpathy.read(tmp_path)
    wanted = [caption for _, captions in shapes.scenes(shapes.SEED_TEST, 6) for caption in captions]
    assert list(found.captions) == wanted
    assert any("," in caption for caption in wanted)
    assert any('"' in caption for caption in wanted)
    assert [int(name) for name in found.image_ids] != sorted(int(name) for name in found.image_ids)
