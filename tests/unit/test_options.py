"""Options: declared once, checked when parsed."""

import argparse
from pathlib import Path

import pytest

from clipval import cli, library
from clipval.options import OPTIONS, Settings, add_options


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument)
    return Settings.of(parser.parse_args(arguments))


def test_every_option_has_a_setting_and_a_help():
    assert {one.name for one in OPTIONS} == set(vars(Settings()))
    assert all(one.help for one in OPTIONS)


def test_defaults_are_the_settings_own():
    assert parse() == Settings()
    assert parse().validated == ("pytorch", "onnx")
    assert not parse().strict


def test_values():
    found = parse("--backends", "om, onnx", "--batch-sizes", "1,8,8", "--atc-flags=--a=1 '--b=x y'")
    assert found.backends == ("om", "onnx")
    assert found.validated == ("pytorch", "om", "onnx")
    assert found.strict
    assert found.batch_sizes == (1, 8)
    assert found.atc_flags == ("--a=1", "--b=x y")
    found = parse("--onnx-providers", "cuda,cpu", "--data-dir", "d")
    assert found.onnx_providers == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert found.data_dir == Path("d")


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    """Shells leave it in `--option=~/file`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parse("--data-dir=~/flickr", "--pretrained=~/weights.pt", "--spec=~/own.toml", "--workdir", "a~b")
    assert (found.data_dir, found.workdir) == (tmp_path / "flickr", Path("a~b"))
    assert (found.pretrained, found.spec) == (str(tmp_path / "weights.pt"), str(tmp_path / "own.toml"))


def test_every_path_of_a_command_knows_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = 0
    for name, command in cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        command.declare(parser)
        for action in parser._actions:
            assert action.type is not Path, f"{name} {action.dest}: use options.to_path"
            if str(action.metavar).partition(".")[0] in ("FILE", "DIR", "PREFIX", "report", "ONNX|OM|DIR|pytorch"):
                assert str(action.type("~/x")) == str(tmp_path / "x"), f"{name} {action.dest}"
                found += 1
    assert found > 30


def test_a_folder_in_a_models_name_knows_it_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert library.folder_of("local-dir:~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backends", "tpu"], "unknown backend 'tpu'; known: pytorch, onnx, om"),
        (["--backends", ","], "unknown backend"),
        (["--batch-sizes", "1,x"], "expected numbers from 1 to 2048"),
        (["--batch-sizes", "4096"], "expected numbers from 1 to 2048"),
        (["--threads", "0"], "at least 1"),
        (["--device-id", "-1"], "expected one argument|logic ids from 0"),
        (["--opset-version", "19"], "14 on, ATC takes up to 18"),
        (["--perf-min-time", "nan"], "out of range"),
        (["--atc-flags", "'x"], "No closing quotation"),
    ],
)
def test_bad_values_are_refused_with_what_is_good(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    said = capsys.readouterr().err
    assert any(word in said for word in words.split("|"))
