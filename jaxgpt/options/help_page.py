"""The pages of --help, made of the options' dataclasses: each option with its meaning, which is the docstring below its
field, and its default."""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import tyro

WIDTH = 100  # columns at most
INDENT = 6
NARROW = 30  # columns, of which a meaning beside what is typed needs as many
HELP = "--help", "-h, --help", "show this page and exit"


class Entry(NamedTuple):
    name: str  # without dashes, as section.key; a positional argument's without them too
    typed: str  # as it is typed: --section.key INT
    meaning: str
    section: str  # empty for a command's own


def page(kind: Any, usage: str, description: str, defaults: Any = None, only: Sequence[str] | None = None) -> str:
    """Returns the page of a command's options.

    Args:
        kind: The dataclass of its options.
        usage: The command as it is typed, without its options.
        description: Text above the options, as `fitted` takes it.
        defaults: An instance that has the defaults to show; None takes those of `kind`.
        only: Names of sections that are shown; None shows all.
    """
    entries = [entry for entry in _entries(kind, defaults) if only is None or entry.section in only]
    lines = [fitted(f"usage: {usage}\n\n{description}")]
    for section, group in itertools.groupby(entries, key=lambda entry: entry.section):
        lines += ["", f"{section} options:" if section else "options:"]
        if not section:
            lines += _shown(HELP[1], HELP[2])
        for entry in group:
            lines += _shown(entry.typed, entry.meaning)
    return "\n".join(lines)


def some(kind: Any, names: Sequence[str], defaults: Any) -> str:
    """Returns the lines of these options alone, in their order."""
    found = {entry.name: entry for entry in _entries(kind, defaults)}
    return "\n".join(line for name in names for line in _shown(found[name].typed, found[name].meaning))


def sections(kind: Any) -> list[str]:
    """Returns the names of the sections that a command's options have."""
    return list(dict.fromkeys(entry.section for entry in _entries(kind, None) if entry.section))


def width() -> int:
    """Returns the number of columns of a page: the terminal's, and at most WIDTH."""
    return max(40, min(WIDTH, shutil.get_terminal_size().columns))


def fitted(text: str) -> str:
    """Returns a text, of paragraphs and of tables whose columns are two spaces apart, in lines that fit the page."""
    return "\n\n".join(_fitted(block) for block in text.strip().split("\n\n"))


def _fitted(block: str) -> str:
    lines = block.splitlines()
    return block if max(map(len, lines)) <= width() else "\n".join(_folded(line) for line in lines)


def _folded(line: str) -> str:
    """Returns a line in several; a meaning goes on in its column, or below where that would be narrow."""
    typed, meaning = line.lstrip(), ""
    indent = " " * (len(line) - len(typed))
    if not indent:
        return _wrapped(line)
    if columns := re.match(r"( *\S+(?: \S+)*  +)(\S.*)", line):
        left, meaning = columns[1], columns[2]
        if width() - len(left) >= NARROW:
            return _wrapped(meaning, left, " " * len(left))
        typed = left.strip()
    more = f" \\\n{indent}    "  # as a shell takes what goes on
    command = indent + more.join(_lines(typed, width() - INDENT - 4))
    return "\n".join([command, _wrapped(meaning, f"{indent}    ")] if meaning else [command])


def _wrapped(text: str, first: str = "", further: str | None = None) -> str:
    return "\n".join(_lines(text, width(), first, first if further is None else further))


def _lines(text: str, columns: int, first: str = "", further: str = "") -> list[str]:
    """Returns a text in lines without breaking a word, with what each line begins with."""
    wrapper = textwrap.TextWrapper(columns, first, further, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text)


def _shown(typed: str, meaning: str) -> list[str]:
    return [f"  {typed}", _wrapped(meaning, " " * INDENT)]


def _entries(kind: Any, defaults: Any, section: str = "") -> Iterator[Entry]:
    """Yields a dataclass's options. Those of a field with tyro.conf.arg(name="") are the command's own."""
    bodies, hints = _meanings(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        bare, *about = get_args(hints[field.name]) if _is_annotated(hints[field.name]) else (hints[field.name],)
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(bare):
            within = any(getattr(word, "name", None) == "" for word in about)
            yield from _entries(bare, default, "" if within else field.name)
            continue
        name = field.name.replace("_", "-")
        metavar = next((word.metavar for word in about if getattr(word, "metavar", None)), "") or _type(bare)
        repeated = tyro.conf.UseAppendAction in about
        written = f"{section}.{name}" if section else name
        if tyro.conf.Positional in about:
            typed = metavar if metavar != _type(bare) else name.upper()
        elif bare is bool:
            typed = f"--{written}, --{f'{section}.' if section else ''}no-{name}"
        else:
            aliases = next((word.aliases for word in about if getattr(word, "aliases", None)), ())
            typed = f"{', '.join([f'--{written}', *aliases])} {metavar}"
        yield Entry(written, typed, f"{bodies[field.name]} {_about_default(default, repeated)}".strip(), section)


def _about_default(default: Any, repeated: bool) -> str:
    if repeated:
        return "(repeatable)"
    if default is dataclasses.MISSING:
        return "(required)"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"(default: {shown if shown != '' else 'empty'})"


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _type(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "[STR ...]"
    choices = get_args(hint)
    return "{" + ",".join(map(str, choices)) + "}" if choices else hint.__name__.upper()


def _is_annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


@functools.cache
def _meanings(kind: Any) -> dict[str, str]:
    """Returns the docstring below each field of a dataclass, in one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
