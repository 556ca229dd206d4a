"""What --help tells: every option of every command, with its meaning and its default."""

import ast
import dataclasses
import inspect
import itertools
import platform
import re
from typing import get_type_hints

import jax
import jaxlib.version
import pytest

from jaxgpt import __version__
from jaxgpt.commands import cli
from jaxgpt.options import settings
from jaxgpt.options.config import Config


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def meanings() -> dict[str, str]:
    """The options of a run, as on the command line, and their docstrings."""
    found = {}
    for section, kind in get_type_hints(Config).items():
        (tree,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[settings.option(section, ast.unparse(field.target))] = ast.literal_eval(text.value)
    return found


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    return " ".join(re.sub("[─│╭╮╰╯]", " ", capsys.readouterr().out).split())


def test_help_lists_every_option_with_its_meaning_and_default(capsys):
    text = help_of(capsys)
    options = meanings()
    assert len(options) == sum(len(dataclasses.fields(kind)) for kind in get_type_hints(Config).values())
    for option, meaning in options.items():
        assert re.search(rf"{option}\b.{{,60}}? {re.escape(' '.join(meaning.split()))} \(default: ", text), option
    assert "--config STR Take the defaults of all other options from" in text
    for command in cli.COMMANDS:
        assert command == "train" or f"run.py {command}" in text
    for name in settings.config_names():
        assert name in text


def test_help_has_a_command_on_each_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip().startswith("python run.py") for line in lines) == len(cli.COMMANDS)


def test_help_shows_the_defaults_of_the_config(capsys):
    assert "Number of transformer blocks (L). (default: 48)" in help_of(capsys, "--config", "gpt2_1558m")


def test_help_of_generate(capsys):
    text = help_of(capsys, "generate")
    sampling = {key: text for key, text in meanings().items() if key.startswith("--sampling.")}
    assert len(sampling) == 7
    for option, meaning in sampling.items():
        meaning = re.escape(" ".join(meaning.split()))
        assert re.search(rf"{option.replace('sampling.', '')} (\w+|\[.*\]\]) {meaning} \(default: ", text)
    for option in ("--run STR The", "--prompt STR What", "--prompts STR A", "--samples INT How", "--seed INT Random"):
        assert option in text


def test_help_of_gradcheck(capsys):
    text = help_of(capsys, "gradcheck")
    assert "--config STR Take the shapes from" in text
    assert "--dtype {float64,float32,bfloat16} What" in text


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["generate", "--version"], ["--config", "x", "--version"]])
def test_the_versions(capsys, words):
    """Those that a run writes down; --help says that they can be asked for."""
    assert cli.main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["jaxgpt", __version__]
    printed = dict(lines)
    assert printed == settings.versions()
    assert printed["python"] == platform.python_version()
    assert (printed["jax"], printed["jaxlib"]) == (jax.__version__, jaxlib.version.__version__)
    assert "--version, or -V, prints the versions" in help_of(capsys)
