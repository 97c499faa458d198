"""Hostile input on the command line: exit code 2 and one line that names the file, never a traceback or a verdict."""

import contextlib
import errno
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipval import cli, export
from clipval.datasets import shapes
from clipval.errors import InputError
from clipval.spec import FOLDER
from clipval.store import Store
from clipval.towers import TEXT
from tests import warm

from .conftest import CONFIG

ROOT = Path(__file__).parents[2]
WEIGHTS = FOLDER / "shapes-vit.pt"


def refused(capsys, *arguments):
    """Run a command that must be refused; what it says."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert "Metrics" not in captured.out
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


class Harm:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture
def data(tmp_path):
    shapes.write(tmp_path / "数据 set", count=3)
    return tmp_path / "数据 set"


def preprocess(data, tmp_path):
    return "preprocess", "--model-name", CONFIG, "--data-dir", data, "--save-dir", tmp_path / "out"


def test_paths_with_spaces_and_chinese_characters_work(data, tmp_path):
    assert cli.main([str(one) for one in preprocess(data, tmp_path)]) == 0
    assert len(list((tmp_path / "out" / "texts").iterdir())) == 15


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "huge"])
def test_bad_pictures(kind, data, tmp_path, capsys):
    file = sorted(data.glob("*.jpg"))[1]
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:1500])
    elif kind == "huge":
        Image.new("1", (30_000, 30_000)).save(file, "png")
    else:
        file.write_bytes(b"hello" if kind == "text" else b"")
    assert file.name in refused(capsys, *preprocess(data, tmp_path))


def test_pictures_of_other_kinds_work(data, tmp_path):
    first, second, _ = sorted(data.glob("*.jpg"))
    Image.new("RGBA", (60, 40), (9, 9, 9, 99)).save(first, "png")
    Image.new("P", (300, 300)).save(second, "gif", save_all=True, append_images=[Image.new("P", (300, 300), 3)])
    assert cli.main([str(one) for one in preprocess(data, tmp_path)]) == 0


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"image,caption\nnone.jpg,x\n", "none.jpg"),
        (b"image,caption\n", "no captions"),
        (b"image,caption\n../../x.jpg,x\n", "../../x.jpg"),
        (b"image,caption\n\xff\xfe,x\n", "not UTF-8"),
        (b"\0\0\0", shapes.ANNOTATIONS),
    ],
)
def test_bad_annotations(rows, words, data, tmp_path, capsys):
    (data / shapes.ANNOTATIONS).write_bytes(rows)
    assert words in refused(capsys, *preprocess(data, tmp_path))


def good_embeddings(folder):
    rng = np.random.default_rng(0)
    for name, ids in (("v", ["1", "2"]), ("t", ["1_0", "2_0"])):
        (folder / name).mkdir()
        for one in ids:
            np.save(folder / name / f"{one}_0.npy", rng.normal(size=(1, 512)).astype(np.float32))
    return "evaluate", "--vision-embeds", folder / "v", "--text-embeds", folder / "t"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 512), np.float32),
        np.full((1, 512), np.nan, np.float32),
        np.ones((1, 512), np.int64),
        np.ones((1, 511), np.float32),
        np.ones((1, 512), ">f4"),
        np.array([Harm("harmed")], object),
        b"\x93NUMPY\x01\x00cut off",
        b"",
    ],
    ids=["zero", "nan", "int", "width", "byte order", "pickle", "cut off", "empty"],
)
def test_bad_embeddings(array, tmp_path, capsys):
    command = good_embeddings(tmp_path)
    assert cli.main([str(one) for one in command]) == 0
    file = tmp_path / "v" / "2_0.npy"
    if isinstance(array, bytes):
        file.write_bytes(array)
    else:
        np.save(file, array, allow_pickle=True)
    said = refused(capsys, *command) if capsys.readouterr() else ""
    assert "2" in said
    assert not (tmp_path / "harmed").exists()


def test_embeddings_that_do_not_belong_together(tmp_path, capsys):
    command = good_embeddings(tmp_path)
    (tmp_path / "v" / "2_0.npy").rename(tmp_path / "v" / "3_0.npy")
    assert "2_0" in refused(capsys, *command)


@pytest.mark.parametrize("kind", ["cut off", "empty", "pickle", "text", "missing"])
def test_bad_checkpoints(kind, tmp_path, capsys):
    file = tmp_path / "weights.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Harm(tmp_path / "harmed"), protocol=2))
    elif kind != "missing":
        whole = WEIGHTS.read_bytes()
        file.write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[kind])
    command = ["export", "--model-name", CONFIG, "--pretrained", file, "--workdir", tmp_path / "work"]
    assert "weights.pt" in refused(capsys, *command, "--onnx-prefix", tmp_path / "m")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x07\x12"])
def test_bad_onnx_files(content, data, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    np.save(tmp_path / "rows" / "1_0.npy", np.zeros((1, 77), np.int64))
    (tmp_path / "m.onnx").write_bytes(content)
    said = refused(capsys, "embed", "--model", tmp_path / "m.onnx", "--input", tmp_path / "rows")
    assert "m.onnx" in said


def test_nothing_is_left_behind(data, tmp_path, capsys):
    shutil.rmtree(data)
    assert "no such folder" in refused(capsys, *preprocess(data, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title =", "titel =", "titel"),
        ('kind = "shapes"', 'kidn = "shapes"', "kidn"),
        ("max_abs = 5e-6", "max_abs = 5e-6\ntolerance = 1", "tolerance"),
        ("images = 1001", 'images = "many"', "images"),
        ("images = 1001", "images = 10.5", "images"),
        ("cosine_min = 0.9999999", "cosine_min = nan", "cosine_min"),
        ("cosine_min = 0.99999\n", "cosine_min = 2.0\n", "golden.cosine_min"),
        ("max_abs = 5e-6", "max_abs = 10", "max_abs"),
        ("norm = 5e-6", "norm = -1", "norm"),
        ("within = 0.005", "within = 5", "within"),
        ("within = 0.002", "within = 5", "within"),
        ("value = 0.964", "value = 96.4", "references[1].value"),
        ("retrieval_recall@10", "retrieval_recal@10", "references[4].metric"),
        ("[throughput]", "[troughput]", "troughput"),
        ("batch_sizes = [1,", "batch_sizes = [0,", "batch_sizes"),
        ("[model]", "[model", "my.toml"),
        ("A small CLIP", "\0", "my.toml"),
    ],
)
def test_bad_specs(old, new, words, tmp_path, capsys):
    text = (FOLDER / "shapes.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "my.toml").write_text(text.replace(old, new), encoding="utf-8")
    said = refused(capsys, "export", "--spec", tmp_path / "my.toml", "--workdir", tmp_path / "w")
    assert words in said
    assert "my.toml" in said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "no captions"),
        ("{image},\n", "the caption is empty"),
        ("{image},r\udce9d\n", "not UTF-8"),
        ("/etc/passwd,x\n", "not below the data folder"),
        ('{image},"x\n', "line 1"),
        ("{image} x\n", "1 columns"),
        ("{image},x,y\n", "3 columns"),
    ],
)
def test_annotations_that_cannot_be_meant(rows, words, data, tmp_path, capsys):
    written = rows.format(image=min(data.glob("*.jpg")).name)
    (data / shapes.ANNOTATIONS).write_bytes(written.encode("utf-8", "surrogateescape"))
    said = refused(capsys, *preprocess(data, tmp_path))
    assert shapes.ANNOTATIONS in said
    assert words in said


@pytest.fixture(scope="module")
def graph(seeded, tmp_path_factory):
    """A good ONNX file of the text tower."""
    file = tmp_path_factory.mktemp("graph") / "text.onnx"
    export.export(seeded, TEXT, file, metadata={})
    return file


@pytest.fixture
def tokens(tmp_path):
    """A folder with spaces and Chinese characters, of three prepared captions."""
    folder = tmp_path / "文本 texts"
    folder.mkdir()
    for n, row in enumerate(export.example_rows(TEXT, 3)):
        np.save(folder / f"照 片_{n}.npy", row[None])
    return folder


def test_any_path_can_be_embedded(graph, tokens, tmp_path):
    model = tmp_path / "模 型.onnx"
    shutil.copyfile(graph, model)
    command = ["embed", "--model", model, "--input", tokens, "--output", tmp_path / "结 果"]
    assert cli.main([str(one) for one in command]) == 0
    assert len(list((tmp_path / "结 果" / "text_embed_bs8").iterdir())) == 3


@pytest.mark.parametrize(
    "array",
    [
        np.ones((1, 77), np.int32),
        np.ones((1, 77), ">i8"),
        np.ones((1, 76), np.int64),
        np.ones((77,), np.int64),
        np.array([Harm("harmed")], object),
        b"\x93NUMPY\x01\x00cut off",
        b"",
    ],
    ids=["int32", "byte order", "width", "one axis", "pickle", "cut off", "empty"],
)
def test_bad_prepared_arrays(array, graph, tokens, tmp_path, capsys):
    file = tokens / "照 片_2.npy"
    if isinstance(array, bytes):
        file.write_bytes(array)
    else:
        np.save(file, array, allow_pickle=True)
    said = refused(capsys, "embed", "--model", graph, "--input", tokens, "--output", tmp_path / "out")
    assert str(file) in said
    assert not (tmp_path / "out").exists()


def without_weights(found, file):
    import onnx

    onnx.save(found, str(file), save_as_external_data=True, location="weights", size_threshold=0)
    (file.parent / "weights").unlink()


def other_names(found, file):
    import onnx

    for node in found.graph.node:
        node.output[:] = ["features" if name == TEXT.output_name else name for name in node.output]
    found.graph.output[0].name = "features"
    onnx.save(found, str(file))


def fixed_batch(found, file):
    """Loads, and keeps the contract as far as it can be read, but cannot compute a batch of three."""
    import onnx

    last = next(node for node in found.graph.node if TEXT.output_name in node.output)
    last.output[0] = "unshaped"
    shape = onnx.numpy_helper.from_array(np.array([2, 512]), "two_rows")
    found.graph.initializer.append(shape)
    found.graph.node.append(onnx.helper.make_node("Reshape", ["unshaped", "two_rows"], [TEXT.output_name]))
    onnx.save(found, str(file))


@pytest.mark.parametrize(
    "harm",
    [without_weights, other_names, fixed_batch, lambda found, file: file.mkdir(), lambda found, file: None],
    ids=["weights missing", "other names", "fixed batch", "a folder", "missing"],
)
def test_onnx_files_that_cannot_serve(harm, graph, tokens, tmp_path, capsys):
    import onnx

    harm(onnx.load(str(graph)), tmp_path / "m.onnx")
    said = refused(capsys, "embed", "--model", tmp_path / "m.onnx", "--input", tokens, "--output", tmp_path / "out")
    assert "m.onnx" in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_architecture(tmp_path, capsys):
    import torch

    state = torch.load(str(WEIGHTS), weights_only=True)
    state.pop("logit_scale")
    torch.save(state, str(tmp_path / "weights.pt"))
    command = ["export", "--model-name", CONFIG, "--pretrained", tmp_path / "weights.pt", "--workdir", tmp_path / "w"]
    said = refused(capsys, *command, "--onnx-prefix", tmp_path / "m")
    assert "weights.pt" in said
    assert "not of architecture" in said


@pytest.mark.parametrize(
    "command",
    [
        ("preprocess", "--model-name", CONFIG, "--data-dir", "{data}", "--save-dir", "{taken}"),
        ("export", "--model-name", CONFIG, "--pretrained", WEIGHTS, "--onnx-prefix", "{taken}/m"),
        ("embed", "--model", "{graph}", "--input", "{tokens}", "--output", "{taken}"),
        ("export", "--model-name", CONFIG, "--pretrained", WEIGHTS, "--workdir", "{taken}"),
        ("export", "--model-name", CONFIG, "--pretrained", WEIGHTS, "--workdir", "{taken}/w"),
    ],
    ids=["save-dir", "onnx-prefix", "output", "workdir", "in workdir"],
)
def test_a_file_where_a_folder_must_be(command, data, graph, tokens, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    places = {"taken": tmp_path / "taken", "data": data, "graph": graph, "tokens": tokens}
    said = refused(capsys, *(str(one).format(**places) for one in command))
    assert str(tmp_path / "taken") in said
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "--threads", "0"),
        ("export", "--threads", "1e3"),
        ("export", "--opset-version", "99"),
        ("embed", "--device-id", "-1"),
        ("embed", "--outfmt", "BIN"),
        ("bench", "--batch-sizes", "8,,16"),
        ("bench", "--batch-sizes", "eight"),
        ("bench", "--perf-noise", "0"),
        ("bench", "--perf-min-time", "nan"),
        ("bench", "--perf-max-time", "inf"),
        ("bench", "--backends", ""),
        ("bench", "--onnx-providers", ","),
    ],
)
def test_options_out_of_range(arguments, capsys):
    needed = ("--input", "nowhere") if arguments[0] == "embed" else ()
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, *needed])
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_batch_size_out_of_range(size, graph, tokens, tmp_path, capsys):
    """Never the default in place of what was asked for."""
    command = ["embed", "--model", graph, "--input", tokens, "--output", tmp_path / "out", f"--batch-size={size}"]
    with contextlib.suppress(SystemExit):  # refused while the command line is read
        assert cli.main([str(one) for one in command]) == 2
    captured = capsys.readouterr()
    assert "batch" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--spec", "my.toml"), "cosine_minimum"),
        (("--backends", "tpu"), "tpu"),
        (("--spec", "vit-b-32-flickr30k"), "--data-dir"),
        (("--workdir", "my.toml/work"), "--workdir"),
    ],
    ids=["spec", "backend", "no data", "workdir"],
)
def test_pytest_ends_in_a_usage_error(arguments, words, tmp_path):
    """Exit code 4, and nothing that could be read as a verdict."""
    text = (FOLDER / "shapes.toml").read_text(encoding="utf-8")
    (tmp_path / "my.toml").write_text(text.replace("cosine_min =", "cosine_minimum ="), encoding="utf-8")
    given = [str(tmp_path / one) if one.startswith("my.toml") else one for one in arguments]
    given += [] if "--workdir" in given else ["--workdir", str(tmp_path / "work")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "accuracy", "tests/acceptance", *given]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = warm.run(command, variables)
    output = done.stdout + done.stderr
    assert done.returncode == 4, output
    assert "Traceback" not in output
    assert "gates passed" not in output
    assert words in output


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_reader_that_has_seen_enough_ends_it_quietly(lines):
    """`clipval reference | head`: 282 rows, more than a pipe holds."""
    command = [sys.executable, "-m", "clipval", "reference"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        for _ in range(lines):
            running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == 141 or lines  # a small table may be written whole before


@pytest.mark.parametrize(
    ("to", "code", "words"), [(">&-", 0, ""), (">/dev/full", 2, "the output or a file: disk full")]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line", ["reference --model-name ViT-B-32", "--help", "embed --help"])
def test_an_output_that_takes_nothing_is_no_traceback(line, unbuffered, to, code, words):
    command = f"{sys.executable} -m clipval {line} {to}"
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("error", "words", "never"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: disk full; free some space", "path"),
        (OSError("7 requested and 3 written"), "disk full", "reached"),
        (OSError(errno.EFBIG, "File too large", "/x"), "/x: File too large; the system limits", "reached"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            "/x: Permission denied; check its permissions",
            "disk",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), "/x: No such file; check the path", "disk"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "cannot be reached", "disk"),
        (OSError("HTTPSConnectionPool(host='hub'): Max retries exceeded"), "cannot be reached", "disk"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "cannot be written", "disk full"),
    ],
)
def test_the_systems_errors_are_said_by_their_cause(error, words, never, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.COMMANDS["doctor"]._replace(run=run))
    said = refused(capsys, "doctor")
    assert words in said
    assert never not in said


def test_a_hub_that_is_away_is_no_full_work_directory(tmp_path):
    def build(folder):
        raise OSError("We couldn't connect to the hub")

    with pytest.raises(InputError, match="couldn't connect") as caught:
        Store(tmp_path).get("kind", {}, build)
    assert "disk" not in str(caught.value)


def test_git_lfs_pointers_are_named_wherever_they_lie(tokens, graph, tmp_path, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 254000000\n"
    words = "git-lfs pointer to a file of 254 MB, not the file itself. Run 'git lfs pull'"
    (tmp_path / "m.onnx").write_text(pointer, encoding="utf-8")
    assert words in refused(capsys, "embed", "--model", tmp_path / "m.onnx", "--input", tokens)
    min(tokens.iterdir()).write_text(pointer, encoding="utf-8")
    assert words in refused(capsys, "embed", "--model", graph, "--input", tokens, "--output", tmp_path / "out")
    command = ["export", "--model-name", CONFIG, "--pretrained", tmp_path / "m.onnx", "--workdir", tmp_path / "work"]
    assert words in refused(capsys, *command, "--onnx-prefix", tmp_path / "m")
