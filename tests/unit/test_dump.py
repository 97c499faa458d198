"""Dump files of an NPU: read without CANN, strictly; files of another writer come back whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipval.diagnose import dump, layouts, wire
from clipval.errors import InputError
from tests.simulator.lib import simulated_dump

MADE = simulated_dump.messages()


def header(name, outputs, inputs=()):
    """`outputs`: (numpy array as stored, data type, format, original shape, more fields)."""
    found = MADE["DumpData"](version="1.0", dump_time=1, op_name=name)
    for kind, rows in (("OpInput", inputs), ("OpOutput", outputs)):
        for stored, dtype, form, original, more in rows:
            one = MADE[kind](data_type=dtype, format=form, size=stored.nbytes, **{"address": 4096, **more})
            one.shape.dim.extend(stored.shape)
            one.original_shape.dim.extend(original)
            (found.input if kind == "OpInput" else found.output).append(one)
    return found


def write(folder, message, raw, file="MatMulV2.x.1.2.1234567890123456"):
    data = message.SerializeToString()
    path = folder / file
    path.write_bytes(len(data).to_bytes(8, "little") + data + raw)
    return path


def test_a_file_of_another_writer_comes_back_whole(tmp_path):
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 50, 72)).astype(np.float16)
    stored, given_ = simulated_dump.fractal(plain), rng.normal(size=(3, 5)).astype(np.float32)
    message = header("/a/MatMul", [(stored, 2, 29, plain.shape, {})], [(given_, 1, 2, given_.shape, {})])
    found = dump.operator(write(tmp_path, message, given_.tobytes() + stored.tobytes()))
    assert found.name == "/a/MatMul"
    assert found.outputs[0].form == "FRACTAL_NZ"
    assert np.array_equal(found.values(0), plain)


def test_the_header_has_the_name_of_the_fused_node(tmp_path):
    values = np.zeros((2, 2), np.float32)
    message = header("op", [(values, 1, 2, (2, 2), {})])
    message.output[0].original_op.name = "/ln/Add_1"
    message.output[0].original_op.output_index = 4294967295
    found = dump.operator(write(tmp_path, message, values.tobytes()))
    assert (found.outputs[0].origin, found.outputs[0].origin_output) == ("/ln/Add_1", None)


def test_a_tensor_without_an_address_has_no_bytes(tmp_path):
    lost, there = np.ones((4,), np.float32), np.arange(3, dtype=np.float32)
    message = header("op", [(lost, 1, 2, (4,), {"address": 0}), (there, 1, 2, (3,), {})])
    found = dump.operator(write(tmp_path, message, there.tobytes()))
    assert [one.held for one in found.outputs] == [False, True]
    assert found.values(1).tolist() == [0, 1, 2]
    assert found.short == 0


def test_a_buffer_larger_than_its_shape_is_cut_and_bfloat16_is_read(tmp_path):
    values = np.array([1.0, -2.5, 3.0], np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    message = header("op", [(raw, 27, 2, (3,), {})])
    message.output[0].size = raw.nbytes + 26
    found = dump.operator(write(tmp_path, message, raw.tobytes() + bytes(26)))
    assert found.values(0).tolist() == values.tolist()


def test_a_short_file_keeps_its_whole_tensors_and_is_said(tmp_path):
    a, b = np.ones((4,), np.float32), np.ones((8,), np.float32)
    message = header("op", [(a, 1, 2, (4,), {}), (b, 1, 2, (8,), {})])
    write(tmp_path, message, a.tobytes() + b.tobytes()[:10])
    found = dump.read(tmp_path)
    assert [one.held for one in found.operators["op"].outputs] == [True, False]
    assert "22 bytes short: the dump's queue or the disk was full" in found.notes[0]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not a dump file"),
        (b"\xff" * 40, "not a dump file, or truncated within its header"),
        ((4).to_bytes(8, "little") + b"\x0f\x0f\x0f\x0f", "is not a DumpData"),
        ((0).to_bytes(8, "little") + b"more", "not a dump file"),
    ],
)
def test_what_is_no_dump_file_is_refused(tmp_path, raw, words):
    (tmp_path / "MatMul.x.1.2.3").write_bytes(raw)
    with pytest.raises(InputError, match=words):
        dump.read(tmp_path)


def test_bytes_that_the_header_does_not_describe_are_refused(tmp_path):
    values = np.zeros((2, 2), np.float32)
    with pytest.raises(InputError, match="20 bytes of tensors, its header describes 16: unknown layout"):
        dump.operator(write(tmp_path, header("op", [(values, 1, 2, (2, 2), {})]), values.tobytes() + b"more"))
    with pytest.raises(InputError, match="unknown data type 99"):
        dump.operator(write(tmp_path, header("op", [(values, 99, 2, (2, 2), {})]), values.tobytes()))


def test_an_empty_folder_says_why_nothing_may_be_in_it(tmp_path):
    with pytest.raises(InputError, match=r"Nothing was dumped.*last dot.*container"):
        dump.read(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        dump.read(tmp_path / "none")


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_bytes_end_in_anything_but_a_wire_error(data):
    try:
        found = wire.fields(data)
    except wire.WireError:
        return
    assert all(number > 0 for number in found)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_fractal_nz_of_any_shape_is_plain_again(shape):
    values = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    stored = simulated_dump.fractal(values.reshape(1, -1) if len(shape) == 1 else values)
    assert np.array_equal(layouts.plain(stored, "FRACTAL_NZ", shape), values)


def test_nc1hwc0_is_cut_to_its_channels():
    values = np.random.default_rng(1).normal(size=(2, 20, 3, 5)).astype(np.float16)
    wide = np.full((2, 32, 3, 5), 9, np.float16)
    wide[:, :20] = values
    stored = wide.reshape(2, 2, 16, 3, 5).transpose(0, 1, 3, 4, 2)
    assert np.array_equal(layouts.plain(stored, "NC1HWC0", (2, 20, 3, 5)), values)
    assert layouts.plain(stored, "NC1HWC0", ()).shape == (2, 32, 3, 5)
    assert np.array_equal(layouts.plain(values.transpose(0, 2, 3, 1), "NHWC", values.shape), values)


@pytest.mark.parametrize(
    ("form", "stored", "original"),
    [
        ("FRACTAL_NZ", (2, 2, 16, 16), (99, 3)),
        ("FRACTAL_NZ", (2, 2), (2, 2)),
        ("NC1HWC0", (1, 2, 3, 3, 16), (1, 40, 3, 3)),
        ("ND", (2, 3), (7,)),
        ("FRACTAL_Z", (2, 3), (2, 3)),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(form, stored, original):
    with pytest.raises(InputError, match=f"format {form}"):
        layouts.plain(np.zeros(stored, np.float16), form, original)


ROW = "Output,0,7700,DT_FLOAT16,ND,1x50x768,7.5,-1.25,0.1,3850,0,0,0"


@pytest.mark.parametrize(
    ("title", "row"),
    [
        (simulated_dump.TITLES, ROW),
        (
            "Input/Output,Index,Data Size,Data Type,Format,Shape,Count,Max Value,Min Value",
            "Output,0,9,DT_BF16,ND,-,9,NA,",
        ),
    ],
)
def test_statistics_are_read_by_their_titles(tmp_path, title, row):
    file = tmp_path / "LayerNormV4._a_Add.1.2.3.csv"
    file.write_text(f"{title}\n{row}\n", encoding="utf-8")
    (found,) = dump.read(tmp_path).statistics["_a_Add"]
    if "NA" in row:
        assert (found.largest, found.least, found.shape) == (None, None, ())
    else:
        assert (found.largest, found.least, found.nan, found.shape) == (7.5, -1.25, 0.0, (1, 50, 768))


def test_the_type_of_an_operator_with_a_hashed_file_name_is_looked_up(tmp_path):
    values = np.zeros((2, 2), np.float32)
    file = write(tmp_path, header("/a", [(values, 1, 2, values.shape, {})]), values.tobytes())
    (tmp_path / "mapping.csv").write_text(f"98765,{file.name}\n", encoding="utf-8")
    file.rename(tmp_path / "98765")
    (one,) = dump.read(tmp_path).operators.values()
    assert one.kind == file.name.partition(".")[0]


def test_a_hashed_name_is_looked_up(tmp_path):
    (tmp_path / "123456.csv").write_text(f"{simulated_dump.TITLES}\n{ROW}\n", encoding="utf-8")
    (tmp_path / "mapping.csv").write_text("123456,MatMul._long_name.1.2.3.csv\n", encoding="utf-8")
    assert list(dump.read(tmp_path).statistics) == ["_long_name"]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="not a statistics file"):
        dump.read(tmp_path)
