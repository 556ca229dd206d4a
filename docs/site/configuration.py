"""docs/configuration.md, made of the options themselves: `python -m docs.site.configuration` writes it anew.

The meanings are the docstrings of the classes in `jaxgpt/options/`. What a value must be is asked of `checks.check`,
by handing it values that might be wrong.
"""

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jaxgpt.errors import UserError
from jaxgpt.options import checks, settings
from jaxgpt.options.config import Config

PAGE = Path(__file__).resolve().parents[1] / "configuration.md"

HEAD = """\
# Configuration

<!-- Made by `python -m docs.site.configuration` of jaxgpt/options/ and configs/: change those, and run it. -->

A run is made from the options below. Each has a default; a TOML file, in `configs/` or of your own, holds what differs;
the command line overrides both:

```sh
python run.py --config gpt2_124m --training.steps 10 --compute.dtype bfloat16
python run.py --config mine.toml --run.name second
python run.py --config gpt2_124m --help-all               # every option, with that config's values as defaults
```

where `mine.toml` may be

```toml
[model]
layers = 6
heads = 6
width = 384
context = 256

[data]
text = "book.txt"
tokenizer = "bytes"

[training]
steps = 2000
batch_size = 16

[sampling]
stop = ["THE END"]
```

An option is `--SECTION.NAME VALUE` on the command line, with `-` between the words of its name, and `NAME = VALUE`
below `[SECTION]` in the file, with `_`. A switch takes no value on the command line: `--x` or `--no-x`. The default of
`--config` is `quickstart`. An unknown name, or an impossible value, ends the command before anything is written; the
message names the nearest option that exists.

Every run writes all of its options, with the versions it ran with, to `runs/NAME/config.toml`; that file is itself a
`--config`. `--resume`, `--resume auto` and `--init-from X` are short for `--run.resume always`, `--run.resume auto` and
`--training.init-from X`.

The column "values" has the requirements as they are checked; a limit that is another option's value is shown by that
option's default.
"""


def page() -> str:
    parts = [HEAD, _configs()]
    for field in dataclasses.fields(Config):
        kind = get_type_hints(Config)[field.name]
        parts.append(f"## {field.name}\n\n{kind.__doc__}\n")
        parts.append("| option | default | values | |\n|---|---|---|---|")
        meanings = _body(kind)
        parts[-1] += "".join(_row(field.name, kind, key, meanings[key]) for key in _keys(kind)) + "\n"
    return "\n".join(parts)


def _configs() -> str:
    """Returns a table of configs/, with the sentence that each begins with."""
    rows = ["## configs/\n", "| `--config` | |", "|---|---|"]
    for name in settings.config_names():
        lines = settings.find_config(name).read_text(encoding="utf-8").split("\n")
        comment = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(_is_comment, lines))
        sentence = re.match(r".*?[.](?= [A-Z]|$)", comment)
        rows.append(f"| `{name}` | {sentence[0] if sentence else comment} |")
    return "\n".join(rows) + "\n"


def _is_comment(line: str) -> bool:
    return len(line) > 1 and line.startswith("#")


def _keys(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _body(kind: Any) -> dict[str, str]:
    """Returns {field: the docstring below it} of a class of options."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    return dict(_docstrings(tree.body))


def _docstrings(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            yield ast.unparse(field.target), " ".join(ast.literal_eval(text.value).split())


def _row(section: str, kind: Any, key: str, meaning: str) -> str:
    expected, default = get_type_hints(kind)[key], getattr(kind(), key)
    name = settings.option(section, key)
    names = [f"`{name}`", f"`--{section}.no-{key.replace('_', '-')}`"] if expected is bool else [f"`{name}`"]
    # A stray backslash or bar would end the cell, and a star begin emphasis.
    text = re.sub(r"([|*\\])", r"\\\1", meaning)
    return f"\n| {', '.join(names)} | {_shown(default)} | {_values(section, expected, key)} | {text} |"


def _shown(default: object) -> str:
    """Returns a default as it would be typed."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"`{default:g}`"
    return f"`{default}`" if default not in ("", ()) else "empty"


def _values(section: str, expected: Any, key: str) -> str:
    """Returns the type of an option, or its choices, and the requirements of `checks.check`."""
    if expected is bool:
        return "on or off"
    if get_origin(expected) is tuple:
        return "texts"
    if get_origin(expected) is not None:
        return ", ".join(f"`{choice}`" for choice in get_args(expected))
    word = {int: "whole number", float: "number", str: "text"}[expected]
    return ", ".join([word, *dict.fromkeys(_requirements(section, expected, key))])


def _requirements(section: str, expected: type, key: str) -> Iterator[str]:
    """Yields the requirement that each refused value is told, of some values that might be wrong."""
    tried = {int: [-2, 0, 7, checks.LARGEST], float: [-1.0, 0.0, 1.0, 1.5, 1e6], str: []}[expected]
    for value in tried:
        part = dataclasses.replace(getattr(Config(), section), **{key: value})
        try:
            checks.check(dataclasses.replace(Config(), **{section: part}))
        except UserError as error:
            refused, _, requirement = str(error).partition(", and must be ")
            if refused == f"{settings.option(section, key)} is {value}":
                yield requirement


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
