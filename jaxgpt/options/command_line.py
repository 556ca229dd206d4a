"""Command-line words: a command's options from them, the shorter spellings of some, and what may have been meant."""

import dataclasses
import difflib
import functools
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from jaxgpt import terminal
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options import help_page
from jaxgpt.terminal import program, say

Options = TypeVar("Options")
ALL = "--help-all"  # of training, whose options are many
OF_ALL = {"-h", "--help", ALL}
SWITCHED = {"true", "false"}  # values that a switch takes in other programs
# Names that nanoGPT, llm.c and papers use, each with our option's name or the last part of it.
OTHERS = {
    "lr": "learning-rate",
    "min-lr": "final-fraction",
    "learning-rate-decay-frac": "final-fraction",
    "wd": "weight-decay",
    "eps": "epsilon",
    "grad-clip": "clip-norm",
    "n-layer": "model.layers",
    "n-head": "heads",
    "n-embd": "width",
    "d-model": "width",
    "block-size": "context",
    "seq-len": "sequence-length",
    "max-iters": "training.steps",
    "max-steps": "training.steps",
    "num-iterations": "training.steps",
    "gradient-accumulation-steps": "micro-batches",
    "eval-interval": "evaluate-every",
    "val-loss-every": "evaluate-every",
    "eval-iters": "evaluation-batches",
    "dataset": "data.text",
    "input-bin": "data.text",
    "out-dir": "folder",
    "output-dir": "folder",
    "zero-stage": "zero",
    "max-new-tokens": "tokens",
    "num-samples": "samples",
    "start": "prompt",
}
ABSENT = {
    "device": "JAX takes the accelerator that it finds, and with JAX_PLATFORMS=cpu before the command the CPU",
    "compile": "everything is compiled",
}
MOST = 3  # options in a suggestion
ALIKE, BEGINNING, SHORTEST = 0.6, 0.9, 3  # of 1: the least likeness; that of the same first letters; how many of them


def read(
    kind: type[Options], words: list[str], command: str, default: Options | None = None, description: str = ""
) -> Options:
    """Returns the options of the dataclass `kind` that the words of `run.py COMMAND` give.

    With --help it prints their page and exits. UserError where an option doesn't exist; the message says what may have
    been meant. Whatever else is wrong tyro reports, and ends with status 2 as well.
    """
    is_ours = not command.startswith("-m")  # else a benchmark's module
    typed = terminal.command(*command.split()).strip() if is_ours else f"python {command}"
    if asks_for_help(words):
        say(help_page.page(kind, f"{typed} [options]", description or str(kind.__doc__), default))
        sys.exit(0)
    known = list(names(kind))
    unknown = [word for word in _options_of(words) if _name(word) not in known]
    if unknown:
        raise UserError("\n".join(no_such_option(word, known, typed) for word in dict.fromkeys(unknown)))
    _check_switches(words, known)
    words = _placed(kind, words, typed)
    more: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, args=words, prog=typed, add_help=False, **more)


def asks_for_help(words: list[str]) -> bool:
    """Returns whether the words ask what there is, rather than for something to be done."""
    return not OF_ALL.isdisjoint(words[: words.index("--")] if "--" in words else words)


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """Returns the types of a dataclass's options by name. Annotations are read once: most of a check's time is that."""
    return get_type_hints(kind)


def names(kind: Any) -> Iterator[str]:
    """Yields the options that tyro makes of a dataclass, without the dashes before them."""
    return (name for name, _ in _with_counts(kind))


def _with_counts(kind: Any, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Yields each option of a dataclass and how many words after it are its values, None for any number."""
    for key, hint in get_type_hints(kind, include_extras=True).items():
        bare, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        name = prefix + key.replace("_", "-")
        if dataclasses.is_dataclass(bare):
            within = any(getattr(word, "name", None) == "" for word in about)  # as tyro.conf.arg(name="") has it
            yield from _with_counts(bare, prefix if within else f"{name}.")
        elif tyro.conf.Positional not in about:
            many = get_origin(bare) is tuple and tyro.conf.UseAppendAction not in about
            count = 0 if bare is bool else None if many else 1
            aliases = (alias.removeprefix("--") for word in about for alias in getattr(word, "aliases", None) or ())
            yield from ((one, count) for one in (name, *aliases))
            if bare is bool:
                yield f"{prefix}no-{key.replace('_', '-')}", 0


def _placed(kind: Any, words: list[str], typed: str) -> list[str]:
    """Returns the words with the run's folder behind --run, where it stands by itself: `generate RUN`.

    UserError where a command has no run, a value isn't there, or a word is no option's.
    """
    hints = get_type_hints(kind, include_extras=True).values()
    if any(tyro.conf.Positional in get_args(hint) for hint in hints):
        return words
    alone = _alone(words, dict(_with_counts(kind)))
    runs = [field for field in dataclasses.fields(kind) if field.name == "run"]
    if runs and runs[0].default is dataclasses.MISSING and "--run" not in _options_of(words):
        if not alone:
            raise UserError(f"name a run's folder: {typed} runs/NAME{runs_near(Path('runs'))}")
        at = alone.pop(0)
        words, alone = ["--run", words[at], *words[:at], *words[at + 1 :]], [other + 1 for other in alone]
    if alone:
        raise UserError(
            f"{shown(words[alone[0]])}: no option takes this word. A value with spaces needs quotes; {typed} --help "
            "lists the options"
        )
    return words


def _alone(words: list[str], counts: dict[str, int | None]) -> list[int]:
    """Returns where the words are that are neither options nor their values. UserError where a value isn't there."""
    before = words[: words.index("--")] if "--" in words else words
    found, waiting = [], 0  # values that may still come: None for any number
    for at, word in enumerate(before):
        if options := _options_of([word]):
            last, waiting = word, 0 if "=" in word else counts.get(_name(options[0]), 0)
            if waiting == 1 and (at + 1 == len(before) or _options_of([before[at + 1]])):
                raise UserError(f"{last} needs a value")
        elif waiting:
            waiting -= 1
        elif waiting == 0:
            found.append(at)
    return found


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
    if waiting or value == "":
        raise UserError(f"{option} needs a value")
    return value, rest


def named(words: list[str]) -> set[str]:
    """Returns the options on a command line, as "section.key", those that are switched off (`--section.no-key`) too."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return {name.replace(".no_", ".") for name in names}


def written_out(words: list[str]) -> list[str]:
    """Returns the words with the short options written out.

    `--resume` becomes `--run.resume always`, `--resume auto` becomes `--run.resume auto`, and `--init-from` and
    `--verbose` get their sections.
    """
    shorter = {"--init-from": "--training.init-from", "--verbose": "--run.verbose"}
    words = [shorter.get((parts := word.partition("="))[0], parts[0]) + "".join(parts[1:]) for word in words]
    result = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word == "--resume":
            result += ["--run.resume", *(["always"] if following.startswith("-") else [])]
        else:
            result.append(f"--run.resume={word.removeprefix('--resume=')}" if word.startswith("--resume=") else word)
    return result


def resumed(words: list[str]) -> tuple[Path | None, list[str]]:
    """Returns the run's folder that `--resume FOLDER` names, None where it names none, and the other words.

    UserError where the words name the run in another way too.
    """
    following = [*words, "--"][1:]
    places = [at for at, word in enumerate(words) if word == "--resume" and _is_folder(following[at])]
    joined = [at for at, word in enumerate(words) if word.startswith("--resume=") and _is_folder(word[9:])]
    if not places + joined:
        return None, words
    at = (places + joined)[-1]
    folder = following[at] if at in places else words[at].removeprefix("--resume=")
    rest = [*words[:at], *words[at + 1 + (at in places) :]]
    given = {word.partition("=")[0] for word in rest}
    for other in ("--resume", "--config", "--run.name", "--run.folder", "--run.resume"):
        if other in given:
            raise UserError(f"--resume {shown(folder)} says already which run goes on, and how: leave {other} away")
    return Path(folder), rest


def _is_folder(word: str) -> bool:
    return not word.startswith("-") and word not in ("never", "always", "auto")


def nearest(word: str, names: Iterable[str]) -> str:
    """Returns '; did you mean X?' where one of the names begins with the word or is close to it, and otherwise '.'"""
    plain = {_letters(name): name for name in sorted(names, reverse=True)}  # of those that are alike, the first
    begin = sorted(name for name in plain if len(word) >= SHORTEST and name.startswith(_letters(word)))
    close = begin or difflib.get_close_matches(_letters(word), plain, n=1, cutoff=0.5)
    return f"; did you mean {plain[close[0]]}?" if close else "."


def _letters(name: str) -> str:
    """Returns a name's letters and digits, all small, in which GPT-2 is gpt2."""
    return re.sub(r"[\W_]", "", name).lower() or name


def runs_near(path: Path) -> str:
    """Returns the end of a message that `path` is no run's folder: the one that was meant, or those that there are."""
    for parent in path.parents:
        if (parent / "config.toml").is_file() and parent != Path():
            return f". The run's folder is {parent}"
    if (found := Path("runs", path)) != path and (found / "config.toml").is_file():
        return f"; did you mean {found}?"
    for folder in dict.fromkeys((path, path.parent, Path("runs"))):
        names = sorted(run.parent.name for run in folder.glob("[!.]*/config.toml"))
        if names:
            return f". In {folder} there are: {', '.join(names)}"
    return f". There is no run yet: {program()} trains one"


def no_such_option(word: str, known: Sequence[str], typed: str) -> str:
    """Returns the message about an option that doesn't exist, with those that may have been meant."""
    said = f"{word}: there is no such option"
    if why := ABSENT.get(_plain(word)):
        return f"{said}: {why}"
    if found := meant(word, known):
        return f"{said}; did you mean {' or '.join(f'--{name}' for name in found)}?"
    return f"{said}; {typed} --help lists all"


def meant(word: str, known: Sequence[str]) -> list[str]:
    """Returns the known options ("section.key", or "key") that `word` may stand for."""
    section, _, key = (name := _plain(word)).rpartition(".")
    found = []
    if other := OTHERS.get(key):
        found = [option for option in known if other in (option, _last(option))]
    found = found or [option for option in known if _last(option) == key]
    if not found:
        score = {option: _likeness(name, key, option) for option in known}
        best = max(score.values(), default=0.0)
        found = [option for option in known if score[option] == best >= ALIKE]
    same = [option for option in found if section and option.startswith(f"{section}.")]
    return (same or found)[:MOST]


def _plain(word: str) -> str:
    """Returns an option without the dashes before it, in the form of our names: run.no-report for no-run.report."""
    return re.sub(r"^no-(\w+)\.", r"\1.no-", word.lstrip("-").replace("_", "-").lower())


def _last(option: str) -> str:
    return option.rpartition(".")[2]


def _likeness(name: str, key: str, option: str) -> float:
    """Returns how alike the last parts or the whole names are, from 0 to 1; a dash may have been typed for the dot."""
    last = _last(option)
    pairs = [(key, last), (name.replace(".", "-"), option.replace(".", "-"))]
    ratios = [difflib.SequenceMatcher(None, typed, ours).ratio() for typed, ours in pairs]
    return max(*ratios, BEGINNING if len(key) >= SHORTEST and last.startswith(key) else 0.0)
