"""Command-line words: a command's options from them, and the shorter spellings of some options."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from jaxgpt.errors import UserError
from jaxgpt.options.suggestions import no_such_option

Options = TypeVar("Options")
OF_ALL = {"-h", "--help"}
SWITCHED = {"true", "false"}  # values that a switch takes in other programs


def read(kind: type[Options], words: list[str], command: str, **more: Any) -> Options:
    """Returns the options of the dataclass `kind` that the words of `run.py COMMAND` give.

    UserError where an option doesn't exist; the message says what may have been meant. Whatever else is wrong tyro
    reports, and ends with status 2 as well.
    """
    prog = command if command.startswith("-m") else f"run.py {command}".strip()  # as it is typed behind "python"
    known = list(names(kind))
    unknown = [word for word in _options_of(words) if word not in OF_ALL and _name(word) not in known]
    if unknown:
        raise UserError("\n".join(no_such_option(word, known, prog) for word in dict.fromkeys(unknown)))
    _check_switches(words, known)
    return tyro.cli(kind, args=words, prog=prog, **more)


def names(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yields the options that tyro makes of a dataclass, without the dashes before them."""
    for key, hint in get_type_hints(kind, include_extras=True).items():
        bare, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        name = prefix + key.replace("_", "-")
        if dataclasses.is_dataclass(bare):
            within = any(getattr(word, "name", None) == "" for word in about)  # as tyro.conf.arg(name="") has it
            yield from names(bare, prefix if within else f"{name}.")
        elif tyro.conf.Positional not in about:
            yield name
            if bare is bool:
                yield f"{prefix}no-{key.replace('_', '-')}"


def _check_switches(words: list[str], known: list[str]) -> None:
    """Raises a UserError where a switch is given a value."""
    for word, following in itertools.pairwise([*words, ""]):
        option, equals, _ = word.partition("=")
        section, dot, key = _name(option).rpartition(".")
        on, off = (f"{section}{dot}{sign}{key.removeprefix('no-')}" for sign in ("", "no-"))
        if {on, off} <= set(known) and (equals or following.lower() in SWITCHED):
            raise UserError(f"{option} takes no value: --{on} is on, and --{off} is off")


def _options_of(words: list[str]) -> list[str]:
    """Returns the words that tyro takes for options, without "=value".

    A value can't begin with a dash and a letter.
    """
    before = words[: words.index("--")] if "--" in words else words
    found = [word.partition("=")[0] for word in before if re.match("--?[A-Za-z]", word)]
    return [word for word in found if not word.startswith("--tyro-") and word not in ("-inf", "-nan")]


def _name(word: str) -> str:
    """Returns an option's name without the dashes before it; empty for a word that has none."""
    return word[2:].replace("_", "-") if word.startswith("--") else ""


def take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """Returns the value of an option, given as `--option value` or `--option=value`, and the other words."""
    value, rest, waiting = None, [], False
    for word in words:
        if waiting:
            value, waiting = word, False
        elif word == option:
            waiting = True
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
        else:
            rest.append(word)
    if waiting:
        raise UserError(f"{option} needs a value")
    return value, rest


def named(words: list[str]) -> set[str]:
    """Returns the options on a command line, as "section.key"."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def written_out(words: list[str]) -> list[str]:
    """Returns the words with the short options written out.

    `--resume` becomes `--run.resume always`, `--resume auto` becomes `--run.resume auto`, and `--init-from` gets its
    section.
    """
    words = [f"--training.{word[2:]}" if word.partition("=")[0] == "--init-from" else word for word in words]
    result = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word == "--resume":
            if not following.startswith("-") and following not in ("never", "always", "auto"):
                raise UserError(
                    f"--resume {following}: which run it is --run.name says, or the config's name; --resume goes on "
                    "with it, and --resume auto also begins one"
                )
            result += ["--run.resume", *(["always"] if following.startswith("-") else [])]
        else:
            result.append(f"--run.resume={word.removeprefix('--resume=')}" if word.startswith("--resume=") else word)
    return result
