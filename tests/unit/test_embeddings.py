"""The border of every backend, and the recipe's folders of embeddings."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipval import arrays, embeddings
from clipval.backends import Identity
from clipval.embeddings import Embeddings, Golden
from clipval.errors import InputError
from clipval.towers import TEXT, VISION

ROWS = np.arange(10 * 77, dtype=np.int64).reshape(10, 77)
IDS = tuple(f"{n}_0" for n in range(10))


class Fake:
    """Embeds a row as its first token, repeated; keeps what it was given."""

    identity = Identity("fake", "1", "cpu", "fp32")
    tower = TEXT

    def __init__(self, batch_size=None, change=lambda values: values):
        self.batch_size, self.change, self.seen = batch_size, change, []
        self.buffer = np.empty((64, 512), np.float32)

    def run(self, rows):
        assert rows.flags.c_contiguous
        self.seen.append(rows.copy())
        out = self.buffer[: len(rows)]  # handed out again and again, as some runtimes do
        out[:] = rows[:, :1]
        return self.change(out)


def test_a_fixed_batch_is_padded_and_cut():
    backend = Fake(batch_size=4)
    found = embeddings.embed(backend, IDS, ROWS, 4)
    assert found.ids == IDS
    assert np.array_equal(found.values[:, 0], ROWS[:, 0])
    assert [len(rows) for rows in backend.seen] == [4, 4, 4]
    assert np.array_equal(backend.seen[-1][1:], np.repeat(ROWS[9:], 3, axis=0))


def test_a_free_batch_is_not_padded():
    backend = Fake()
    found = embeddings.embed(backend, IDS, ROWS[:, ::-1][:, ::-1], 4)
    assert np.array_equal(found.values[:, 511], ROWS[:, 0])
    assert [len(rows) for rows in backend.seen] == [4, 4, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values[:-1], r"output 'text_embed' is float32 \(3, 512\), expected float32 \(4, 512\)"),
        (lambda values: values[:, :100], r"float32 \(4, 100\)"),
        (lambda values: values.astype(np.float16), "float16"),
        (lambda values: None, "NoneType"),
    ],
)
def test_a_wrong_output_is_named(change, words):
    with pytest.raises(InputError, match="fake 1 on cpu, fp32, text tower, batch from sample 0_0: .*" + words):
        embeddings.embed(Fake(4, change), IDS, ROWS, 4)


@pytest.mark.parametrize("rows", [ROWS.astype(np.int32), ROWS.astype(np.float64), ROWS[:, :76]])
def test_wrong_rows_are_refused_although_the_bytes_may_fit(rows):
    backend = Fake()
    with pytest.raises(InputError, match="input 'text' is .* expected int64"):
        embeddings.embed(backend, IDS, rows, 4)
    assert not backend.seen


def test_what_cannot_be_embedded():
    with pytest.raises(InputError, match="takes batches of 4, asked for 8"):
        embeddings.embed(Fake(4), IDS, ROWS, 8)
    with pytest.raises(InputError, match="9 ids for 10 rows"):
        embeddings.embed(Fake(), IDS[:9], ROWS, 4)
    with pytest.raises(InputError, match="0 ids for 0 rows"):
        embeddings.embed(Fake(), (), ROWS[:0], 4)
    for size in (0, -3):
        with pytest.raises(InputError, match=f"batches of {size}; .* at least 1"):
            embeddings.embed(Fake(), IDS, ROWS, size)


class Lazy:
    """Rows that are read when sliced, and `lost` of each slice never come."""

    def __init__(self, lost=0):
        self.lost = lost

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index][self.lost :]


@pytest.mark.parametrize("batch_size", [None, 4])
def test_rows_that_do_not_come_leave_no_gap(batch_size):
    assert np.array_equal(embeddings.embed(Fake(batch_size), IDS, Lazy(), 4).values[:, 0], ROWS[:, 0])
    with pytest.raises(InputError, match=r"from sample 0_0: input 'text' is int64\[3, 77\], expected int64\[4, 77\]"):
        embeddings.embed(Fake(batch_size), IDS, Lazy(lost=1), 4)


def test_a_bar_only_on_a_terminal(capsys):
    embeddings.embed(Fake(), IDS, ROWS, 4)
    assert capsys.readouterr() == ("", "")


def some(count=12):
    values = np.random.default_rng(0).normal(size=(count, 512)).astype(np.float32)
    return Embeddings(tuple(f"{n}_{k}" for n in range(count // 2) for k in range(2)), values)


def test_folders_come_back(tmp_path):
    embeddings.write(tmp_path / "out", some(24))
    found = embeddings.read(tmp_path / "out")
    assert found.ids == some(24).ids  # 9_1 before 10_0, whatever the directory's order
    assert np.array_equal(found.values, some(24).values)
    assert np.load(tmp_path / "out" / "10_1_0.npy").shape == (1, 512)


def test_the_recipes_second_output_is_left_out(tmp_path):
    embeddings.write(tmp_path, some())
    np.save(tmp_path / "0_0_1.npy", np.float32([14.28]))
    (tmp_path / "x_summary.json").write_text("{}", encoding="utf-8")
    assert len(embeddings.read(tmp_path).ids) == 12


def test_half_precision_is_read(tmp_path):
    np.save(tmp_path / "a_0.npy", np.ones((1, 8), np.float16))
    assert embeddings.read(tmp_path).values.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("5_0_0.npy", np.ones((1, 512), np.float64), "<f8"),
        ("5_0_0.npy", np.ones((1, 512), ">f4"), ">f4"),
        ("5_0_0.npy", np.ones((1, 511), np.float32), r"\(1, 511\), expected .* \(1, 512\)"),
        ("5_0_0.npy", np.ones((2, 512), np.float32), r"\(2, 512\)"),
        ("5_0_0.npy", np.float32(1), r"<f4 \(\)"),
        ("0_0_0.npy", np.ones((1, 0), np.float32), r"\(1, 0\), expected .* \(1, 512\)"),
        ("5_0_0.npy", np.array([{"a": 1}], object), "allow_pickle|Object arrays"),
        ("5_0_1.npy", np.ones((1, 512), np.float32), "not an embedding"),
        ("stray.npy", np.ones((1, 512), np.float32), "stray.npy: not an embedding"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, array, words):
    embeddings.write(tmp_path, some())
    np.save(tmp_path / name, array, allow_pickle=True)
    for width in (512, None):
        with pytest.raises(InputError, match=words) as caught:
            embeddings.read(tmp_path, width)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda content: content[:-1], ""),  # numpy's words differ by version
        (lambda content: content[:40], "EOF"),
        (lambda content: b"", "EOF"),
        (lambda content: content + b"\0", "more bytes than its header states"),
        (lambda content: content.replace(b"(1, 512)", b"(1, 512("), ""),
        (lambda content: content.replace(b"(1, 512), }      ", b"(1, 9999999), }  "), ""),
    ],
)
def test_a_damaged_file_is_named(tmp_path, harm, words):
    embeddings.write(tmp_path, some())
    file = tmp_path / "3_1_0.npy"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(InputError, match=f"3_1_0.npy: not a readable array .*{words}"):
        embeddings.read(tmp_path)


def test_an_archive_is_not_an_array(tmp_path):
    np.savez(tmp_path / "a.npz", np.ones((1, 512), np.float32))
    (tmp_path / "a.npz").rename(tmp_path / "a_0.npy")
    with pytest.raises(InputError, match="a_0.npy: not a readable array"):
        embeddings.read(tmp_path)


def test_a_flat_row_is_read_too(tmp_path):
    np.save(tmp_path / "a_0.npy", np.arange(8, dtype=np.float32))
    assert embeddings.read(tmp_path, 8).values.shape == (1, 8)


def test_values_are_not_judged_here(tmp_path):
    given = Embeddings(("a", "b"), np.array([[np.nan, np.inf], [0, 7]], np.float32))
    embeddings.write(tmp_path, given)
    assert np.array_equal(embeddings.read(tmp_path).values, given.values, equal_nan=True)


def test_order_does_not_depend_on_the_directory(tmp_path, monkeypatch):
    names = ("01", "1", "1²2", "2", "10", "a", "a1", "a02")
    embeddings.write(tmp_path, Embeddings(names, np.ones((8, 4), np.float32)))
    files = os.listdir(tmp_path)
    found = []
    for listing in (sorted(files), sorted(files)[::-1]):
        monkeypatch.setattr(os, "listdir", lambda _, listing=listing: listing)
        found.append(embeddings.read(tmp_path).ids)
    assert found[0] == found[1]
    assert [name for name in found[0] if name.isascii() and name.isdigit()] == ["01", "1", "2", "10"]


class Harm:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_is_not_loaded(tmp_path):
    (tmp_path / "a_0.npy").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    with pytest.raises(InputError, match="a_0.npy"):
        embeddings.read(tmp_path)
    assert not (tmp_path / "harmed").exists()


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=120).map(lambda tail: b"\x93NUMPY\x01\x00" + tail)))
def test_any_bytes_are_one_line(tmp_path, content):
    (tmp_path / "a_0.npy").write_bytes(content)
    with pytest.raises(InputError, match="a_0.npy"):
        embeddings.read(tmp_path, 512)


def test_stale_files_are_not_mixed_in(tmp_path):
    embeddings.write(tmp_path, some())
    embeddings.write(tmp_path, some())
    with pytest.raises(InputError, match="holds 2 arrays of other samples"):
        embeddings.write(tmp_path, some(10))


def test_an_id_there_twice_is_not_written_over(tmp_path):
    with pytest.raises(InputError, match="sample a is a duplicate"):
        embeddings.write(tmp_path / "out", Embeddings(("b", "a", "a"), np.ones((3, 4), np.float32)))


def test_half_a_folder_never_appears(tmp_path, monkeypatch):
    saved = []

    def full(path, array):
        saved.append(path)
        if len(saved) > 5:
            raise OSError(f"{array.size} requested and 0 written")  # numpy's words for a full disk

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(InputError, match="out: cannot be written .*0 written"):
            embeddings.write(tmp_path / "out", some())
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.building").mkdir()
    (tmp_path / "out.building" / "old_0.npy").write_bytes(b"from a run that was killed")
    embeddings.write(tmp_path / "out", some())
    assert len(embeddings.read(tmp_path / "out").ids) == 12


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written"):
            embeddings.write(place, some())


def test_5000_files(tmp_path):
    values = np.random.default_rng(0).normal(size=(5000, 512)).astype(np.float32)
    given = Embeddings(tuple(f"{n}_{k}" for n in range(1000) for k in range(5)), values)
    embeddings.write(tmp_path / "out", given)
    found = embeddings.read(tmp_path / "out", 512)
    assert found.ids == given.ids
    assert np.array_equal(found.values, values)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(InputError, match="no <id>_0.npy"):
        embeddings.read(tmp_path)
    for missing in (tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="no such folder"):
            embeddings.read(missing)


RUNS = ("2024_01_31-10_22_05", "2024_01_31-11_00_00")


@pytest.mark.parametrize("under", ["", RUNS[0]])
def test_ais_benchs_own_folders(tmp_path, under):
    run = tmp_path / under
    embeddings.write(run / "device0_0", Embeddings(some().ids[::2], some().values[::2]))
    embeddings.write(run / "device3_1", Embeddings(some().ids[1::2], some().values[1::2]))
    (tmp_path / f"{under}_summary.json").write_text("{}", encoding="utf-8")
    found = embeddings.read(tmp_path)
    assert found.ids == some().ids
    assert np.array_equal(found.values, some().values)
    embeddings.write(run / "device4_2", some(2))
    with pytest.raises(InputError, match=r"0_0_0.npy was computed on several devices \(device0_0, device4_2\)"):
        embeddings.read(tmp_path)


def test_one_of_several_runs_must_be_named(tmp_path):
    for name in RUNS:
        embeddings.write(tmp_path / name, some())
    with pytest.raises(InputError, match=f"several runs of ais_bench \\({', '.join(RUNS)}\\)"):
        embeddings.read(tmp_path)
    assert embeddings.read(tmp_path / RUNS[1]).ids == some().ids


def saved(folder, ending, given, dtype=np.float32):
    """Write as ais_bench does with --outfmt BIN and TXT."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in zip(given.ids, given.values.astype(dtype)):
        if ending == "bin":
            row.tofile(folder / f"{name}_0.bin")
        else:
            np.savetxt(folder / f"{name}_0.txt", np.c_[row], fmt="%f", newline=" ")


def of_unit_length():
    given = some()
    return Embeddings(given.ids, arrays.unit(given.values).astype(np.float32))


@pytest.mark.parametrize("under", ["", RUNS[0], f"{RUNS[0]}/device0", "device0_0"])
@pytest.mark.parametrize(("ending", "dtype"), [("bin", np.float32), ("bin", np.float16), ("txt", np.float32)])
def test_ais_benchs_other_formats(tmp_path, under, ending, dtype):
    given = of_unit_length()
    given.values[3] *= 3  # one that is off does not hide what the others are
    saved(tmp_path / under, ending, given, dtype)
    (tmp_path / under / f"0_0_1.{ending}").write_bytes(
        b"14.285714" if ending == "txt" else bytes(np.dtype(dtype).itemsize)
    )
    found = embeddings.read(tmp_path)
    assert found.ids == given.ids
    assert np.abs(found.values - given.values.astype(dtype)).max() <= (5.1e-7 if ending == "txt" else 0)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: saved(folder, "bin", some()), "12 .bin files, which have no dtype.*--outfmt NPY"),
        (
            lambda folder: (folder / "2_0_0.bin").write_bytes(bytes(2047)),
            "2_0_0.bin: 2047 bytes, not a whole number of <f4",
        ),
        (lambda folder: (folder / "2_0_0.bin").write_bytes(bytes(2044)), r"2_0_0.bin: <f4 \(1, 511\), expected"),
        (lambda folder: saved(folder, "txt", some(2)), r"results of several runs \(12 .bin, 2 .txt files\)"),
        (lambda folder: saved(folder / "device0", "bin", some(2)), None),  # below results that are asked for
    ],
)
def test_bytes_that_tell_too_little_are_refused(tmp_path, harm, words):
    saved(tmp_path, "bin", of_unit_length())
    harm(tmp_path)
    if words is None:
        assert len(embeddings.read(tmp_path).ids) == 12
        return
    with pytest.raises(InputError, match=words):
        embeddings.read(tmp_path)


def test_a_cut_text_is_named(tmp_path):
    saved(tmp_path, "txt", some())
    (tmp_path / "4_1_0.txt").write_bytes(b"0.1 0.2 -")
    with pytest.raises(InputError, match="4_1_0.txt: not the numbers of an embedding"):
        embeddings.read(tmp_path)


def test_align_is_by_id():
    found = some()
    turned = embeddings.align(found, found.ids[::-1])
    assert np.array_equal(turned.values, found.values[::-1])
    with pytest.raises(InputError, match=r"1 missing \['zz'\], 1 surplus \['5_1'\]"):
        embeddings.align(found, (*found.ids[:-1], "zz"))
    with pytest.raises(InputError, match=r"2 duplicates \['a', 'a'\]"):
        embeddings.align(Embeddings(("a", "a"), found.values[:2]), ("a", "a"))
    with pytest.raises(InputError, match=r"1 duplicates \['0_0'\]"):
        embeddings.align(found, (*found.ids, "0_0"))


def test_the_image_of_a_caption():
    assert embeddings.image_id_of("1007129816_4") == "1007129816"
    assert embeddings.image_id_of("a_b_12") == "a_b"
    for name in ("1007129816", "_3", "a_b", "a_²", ""):
        with pytest.raises(InputError, match="expected the id <image id>_<k>"):
            embeddings.image_id_of(name)


def test_read_array_is_strict(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 77), np.int32))
    with pytest.raises(InputError, match=r"x.npy: <i4 \(1, 77\), expected <i8 \(1, 77\)"):
        arrays.read(tmp_path / "x.npy", "int64", (1, 77))
    with pytest.raises(InputError, match="no such file"):
        arrays.read(tmp_path / "y.npy", "int64", (1, 77))


@pytest.mark.parametrize("how", ["fortran", "big-endian", "version 2", "cut", "longer", "other shape", "pickle"])
def test_rows_of_other_writers_are_read_or_refused(tmp_path, how):
    row = np.random.default_rng(0).standard_normal((1, *VISION.row_shape)).astype(np.float32)
    file = tmp_path / "a.npy"
    with open(file, "wb") as stream:
        if how == "version 2":
            np.lib.format.write_array(stream, row, version=(2, 0))
        elif how == "fortran":
            np.save(stream, np.asfortranarray(row))
        elif how == "pickle":
            np.save(stream, np.array([{}], object), allow_pickle=True)
        else:
            np.save(stream, {"big-endian": row.astype(">f4"), "other shape": row[0]}.get(how, row))
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-4], "longer": content + b"xxxx"}.get(how, content))
    rows = arrays.PreparedRows(tmp_path, ("a",), VISION)
    if how in ("fortran", "version 2"):
        assert rows[:].tobytes() == row.tobytes()
    else:
        with pytest.raises(InputError, match=r"a\.npy"):
            rows[:]


def test_golden_embeddings_come_back(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    written = {
        "vision": Golden(Embeddings(("a", "b", "c"), rows), rows[:2], "12ab"),
        "text": Golden(Embeddings(("a_0",), rows[:1]), rows, "34cd"),
    }
    embeddings.write_golden(tmp_path / "new" / "pins", written)
    for tower in (VISION, TEXT):
        found, wanted = embeddings.read_golden(tmp_path / "new" / "pins", tower), written[tower.name]
        assert found.of_data.ids == wanted.of_data.ids
        assert np.array_equal(found.of_data.values, wanted.of_data.values)
        assert np.array_equal(found.of_probe, wanted.of_probe)
        assert found.probe_sha256 == wanted.probe_sha256


ROW = np.zeros((1, 512), np.float32)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "cannot be read"),
        ({"vision_ids": None}, "cannot be read"),
        ({"vision_probe": None}, "cannot be read"),
        ({"vision": np.array([{}], object)}, "cannot be read"),
        ({"vision": np.zeros((1, 256), np.float32)}, r"expected float32 \(1, 512\)"),
        ({"vision": np.zeros((1, 512))}, "float64"),
        ({"vision": np.zeros((2, 512), np.float32)}, "expected float32"),
        ({"vision": ROW[:0], "vision_ids": np.array([], "<U1")}, "expected float32"),
        ({"vision_probe": np.zeros((3, 64), np.float32)}, r"expected float32 \(3, 512\)"),
    ],
)
def test_golden_embeddings_of_another_kind_are_refused(tmp_path, changed, words):
    file = tmp_path / "pins.npz"
    if changed is None:
        file.write_bytes(b"PK no archive")
    else:
        whole = {
            "vision": ROW,
            "vision_ids": np.array(["a"]),
            "vision_probe": ROW,
            "vision_probe_sha256": np.array("a"),
        }
        np.savez(file, **{key: value for key, value in {**whole, **changed}.items() if value is not None})
    with pytest.raises(InputError, match=words) as caught:
        embeddings.read_golden(file, VISION)
    assert str(file) in str(caught.value)
    assert "clipval pin" in str(caught.value)
