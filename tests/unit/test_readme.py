"""The two READMEs say the same, and what they say is so: options, commands, figures, files."""

import re
from pathlib import Path

import pytest

from clipval import cli, options

ROOT = Path(__file__).parents[2]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])


def default_of(flag):
    value = getattr(options.Settings(), flag[2:].replace("-", "_"))
    return (
        ""
        if value in (None, False, "", ())
        else f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"
    )


def rows(text):
    return re.findall(r"^\| `(--[\w-]+)(?: \w+)?` \| (.*?) \| (.*) \|$", text, re.MULTILINE)


@BOTH
def test_the_option_table_is_the_options(text):
    assert [(flag, default) for flag, default, _ in rows(text)] == [
        (one.flag, default_of(one.flag)) for one in options.OPTIONS
    ]


def test_the_english_meanings_are_the_help_texts():
    assert [meaning for _, _, meaning in rows(ENGLISH)] == [one.help for one in options.OPTIONS]


def commands(text):
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_both_have_the_same_commands_and_figures():
    assert commands(ENGLISH) == commands(CHINESE)
    numbers = [re.findall(r"\d+\.\d+|\d{3,}", text) for text in (ENGLISH, CHINESE)]
    assert sorted(numbers[0]) == sorted(numbers[1])
    code = [sorted(set(re.findall(r"`[^`\n]+`", text))) for text in (ENGLISH, CHINESE)]
    assert code[0] == code[1]


@BOTH
def test_flags_in_the_text_exist(text):
    known = {one.flag for one in options.OPTIONS} | {"--benchmark-json", "--junitxml"}
    parser_flags = set()
    for command in cli.COMMANDS.values():
        parser = cli.Parser()
        command.declare(parser)
        parser_flags |= {flag for action in parser._actions for flag in action.option_strings}
    installers = {"--torch-backend", "--no-deps"}
    recipe = {"--a", "--b", "--input_format", "--output_dirname", "--loop", "--batchsize", "--outfmt", "--framework"}
    assert set(re.findall(r"(--[a-z][\w-]+)", text)) <= known | parser_flags | recipe | installers


@BOTH
def test_commands_in_the_text_exist(text):
    named = set(re.findall(r"python -m clipval (\w+)", text))
    assert named <= set(cli.COMMANDS)
    assert {"preprocess", "export", "compile", "embed", "evaluate", "bench", "doctor", "reference"} <= named


@BOTH
def test_links_resolve(text):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)
