"""--help lists every option of every command, with its meaning and its default."""

import ast
import dataclasses
import inspect
import itertools
import platform
import re
import shlex
from typing import get_type_hints

import jax
import jaxlib.version
import pytest

from jaxgpt import __version__, terminal
from jaxgpt.commands import cli
from jaxgpt.options import command_line, settings
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


def help_of(capsys, *words: str, flag: str = "--help") -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, flag])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_every_option_with_its_meaning_and_default(capsys):
    text = help_of(capsys, flag="--help-all")
    options = meanings()
    assert len(options) == sum(len(dataclasses.fields(kind)) for kind in get_type_hints(Config).values())
    for option, meaning in options.items():
        assert re.search(rf"{option}\b.{{,60}}? {re.escape(' '.join(meaning.split()))} \(default: ", text), option
    assert "--config STR Take the defaults of all other options from" in text
    for command in cli.COMMANDS:
        assert command == "train" or f" {command} " in text


def test_help_lists_the_common_options_and_all_configs(capsys):
    text, options = help_of(capsys), meanings()
    for name in cli.COMMON:
        assert f"{' '.join(options[f'--{name}'].split())} (default: " in text
    assert sum(f"--{name} " in text for name in [option[2:] for option in options]) < 30
    for name in settings.config_names():
        assert name in text
    for section in get_type_hints(Config):
        assert section in text


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
@pytest.mark.parametrize("words", [["--help"], ["--help-all"], ["prepare", "--help"], ["serve", "--help"]])
def test_help_breaks_no_word_and_fits_the_terminal(capsys, monkeypatch, columns, words):
    """All lines but those of an option and its choices, and of one long word."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main(words)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert all(len(line) <= min(columns, 100) or re.match(r"  --| *\S+$", line) for line in lines)
    of_meanings = meanings_in(printed)
    assert max(map(len, of_meanings)) <= max(columns, 44) or max(len(line.split()) for line in of_meanings) == 1
    wide = [line.split() for line in of_meanings]
    narrow = {word for line in wide for word in line}
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main(words)
    assert narrow == {word for line in meanings_in(capsys.readouterr().out) for word in line.split()}


def meanings_in(printed: str) -> list[str]:
    return [line for line in printed.partition("options:")[2].splitlines() if line.startswith(" " * 6)]


def test_the_examples_of_help_are_commands_that_there_are(capsys):
    lines = [line.strip() for line in cli.EXAMPLES.splitlines() if line.strip().startswith("python run.py")]
    assert len(lines) == 3
    known = set(command_line.names(cli.Train))
    for line in lines:
        options = re.findall(r"--([\w.-]+)", line)
        assert set(options) <= known
    assert all(line in help_of(capsys) for line in (" ".join(line.split()) for line in lines))


def test_help_of_a_section(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help-all", "lora"])
    printed = capsys.readouterr().out
    assert "--lora.rank INT" in printed
    assert "--model.layers" not in printed


@pytest.mark.parametrize("program", ["python run.py", ".venv/bin/python run.py", "'/a b/python' {x}/run.py"])
def test_commands_of_help_are_as_they_are_typed_here(capsys, monkeypatch, program):
    monkeypatch.setattr(terminal, "program", lambda: program)
    for columns in (40, 80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        printed = capsys.readouterr().out
        commands = [line[4:].split()[0] for line in printed.splitlines() if re.match("    [a-z]+( |$)", line)]
        assert set(cli.COMMANDS) - {"train"} <= set(commands)
        assert " ".join(printed.split()).startswith(f"usage: {program} [--config NAME] [options]")
        examples = [block for block in printed.split("\n\n") if block.startswith(f"    {program.split()[0]}")]
        typed = [word for block in examples for word in shlex.split(block.replace("\\\n", ""))]
        assert typed.count(shlex.split(program)[-1]) == 3
        assert {"--data.text", "book.txt", "--config", "gpt2_124m", "bfloat16"} <= set(typed)


def test_help_shows_the_defaults_of_the_config(capsys):
    assert "Number of transformer blocks (L). (default: 48)" in help_of(capsys, "--config", "gpt2_1558m")


def test_help_of_generate(capsys):
    text = help_of(capsys, "generate")
    sampling = {key: text for key, text in meanings().items() if key.startswith("--sampling.")}
    assert len(sampling) == 7
    for option, meaning in sampling.items():
        meaning = re.escape(" ".join(meaning.split()))
        assert re.search(rf"{option.replace('sampling.', '')} (\w+|\[STR \.\.\.\]) {meaning} \(default: ", text)
    for option in (
        "--run STR Folder",
        "--prompt STR Text",
        "--prompts STR UTF-8",
        "--samples INT Number",
        "--seed INT Random",
    ):
        assert option in text


def test_help_of_gradcheck(capsys):
    text = help_of(capsys, "gradcheck")
    assert "--config STR Take the shapes from" in text
    assert "--dtype {float64,float32,bfloat16} Type" in text


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["generate", "--version"], ["--config", "x", "--version"]])
def test_the_versions(capsys, words):
    """The versions are those that a run records; --help mentions the option."""
    assert cli.main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["jaxgpt", __version__]
    printed = dict(lines)
    assert printed == settings.versions()
    assert printed["python"] == platform.python_version()
    assert (printed["jax"], printed["jaxlib"]) == (jax.__version__, jaxlib.version.__version__)
    assert "--version, or -V, prints the versions" in help_of(capsys)
