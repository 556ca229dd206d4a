"""Rewards of answers, by what `--objective.reward` names: numbers that a policy learns to make larger.

    exact               1 where the text is the problem's answer, but for white space around it, else 0
    exact:MARKER        1 where what follows the last MARKER in the text is, such as exact:Answer:
    regex:PATTERN       1 where a part of the text matches; {answer} in it stands for the problem's answer
    program:COMMAND     1 where a program ends with status 0 (`programs.py`). It has the text on its standard input, and
                        in its environment PROMPT and ANSWER, the problem's
    FILE.py:FUNCTION    what the function returns: of the text, and of prompt and answer where it has such parameters
    model:RUN           the score that a reward model gives to the prompt and the text

A function is the user's own program, and runs as such. Only the command line and the user's own configuration name it:
a run or a checkpoint that is read never does.
"""

import contextlib
import functools
import importlib.util
import inspect
import math
import os
import re
import shlex
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxgpt import files
from jaxgpt.data.conversations import Messages
from jaxgpt.errors import RunError, UserError
from jaxgpt.evaluation import programs, reward_model
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.config import Objective

OPTION = "--objective.reward"
LARGEST = 1e15  # reward whose square, as deviations are of, is well within float32
TOO_LONG = -3.0  # reward of an answer that a reward model has no room for: three deviations below the mean
FORMS = "exact, exact:MARKER, regex:PATTERN, program:COMMAND, FILE.py:FUNCTION or model:RUN"


class Answered(NamedTuple):
    """A problem with an answer that was drawn to it."""

    prompt: Messages
    answer: str  # the problem's, which is right
    text: str  # the drawn one


Reward = Callable[[Sequence[Answered]], list[float]]


def make(options: Objective) -> Reward:
    """Returns the reward that the options name.

    UserError where there is none of this name, or where it can't be used here.
    """
    kind, _, rest = options.reward.partition(":")
    match kind:
        case "exact":
            return _each(functools.partial(exact, marker=rest))
        case "regex" if rest:
            return _each(functools.partial(matches, pattern=_checked(rest)))
        case "program" if rest:
            return _programs(rest, programs.Limits(options.program_seconds, options.program_memory_mib << 20))
        case "model" if rest:
            return _model(rest)
    path, _, name = options.reward.rpartition(":")
    if path.endswith(".py") and name.isidentifier():
        return _each(_function(Path(path), name))
    given = f"is {quoted(options.reward)}" if options.reward else "is missing"
    raise UserError(f"{OPTION} {given}: name what is to be rewarded: {FORMS}")


def exact(answered: Answered, marker: str = "") -> float:
    """Returns 1 where the text behind the last marker is the problem's answer, but for white space around it."""
    if marker not in answered.text:
        return 0.0
    text = answered.text.rpartition(marker)[2] if marker else answered.text
    return float(text.strip() == answered.answer.strip())


def matches(answered: Answered, pattern: str) -> float:
    """Returns 1 where the pattern, with the problem's answer for {answer}, matches a part of the text."""
    return float(re.search(pattern.replace("{answer}", re.escape(answered.answer)), answered.text) is not None)


def question(prompt: Messages) -> str:
    """Returns what was asked last."""
    return next((str(message["content"]) for message in reversed(prompt) if message["role"] == "user"), "")


def _each(reward: Callable[[Answered], float]) -> Reward:
    return lambda answered: [reward(one) for one in answered]


def _checked(pattern: str) -> str:
    try:
        re.compile(pattern.replace("{answer}", "0"))
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{OPTION} regex: {quoted(pattern)} is no regular expression ({error})") from None
    return pattern


def _programs(command: str, limits: programs.Limits) -> Reward:
    """Returns a reward by a program, which is run for as many answers at once as there are processors."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"{OPTION} program: {quoted(command)} is no command ({error})") from None
    programs.check()

    def one(answered: Answered) -> float:
        variables = {"PROMPT": question(answered.prompt), "ANSWER": answered.answer}
        try:
            return float(programs.succeeds(words, answered.text, limits, variables))
        except OSError as error:
            raise UserError(f"{OPTION} program: it can't be run ({shown(error)})") from None

    def rewards(answered: Sequence[Answered]) -> list[float]:
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            return list(threads.map(one, answered))

    return rewards


def _model(name: str) -> Reward:
    """Returns the scores of a reward model. UserError where there is none of this name."""
    try:
        model = reward_model.load(name)
    except UserError as error:
        raise UserError(str(error).replace("--reward-model ", f"{OPTION} model:", 1)) from None

    def rewards(answered: Sequence[Answered]) -> list[float]:
        texts = [[*one.prompt, {"role": "assistant", "content": one.text}] for one in answered]
        scores = model.score_conversations(texts)
        return np.where(np.isneginf(scores), TOO_LONG, scores).tolist()

    return rewards


def _function(path: Path, name: str) -> Callable[[Answered], float]:
    """Returns a reward by a function in a Python file of the user's. UserError where there is no such function."""
    where = f"{OPTION} {shown(path)}:{shown(name)}"
    if not files.is_file(path):
        raise UserError(f"{where}: there is no such file")
    try:
        spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        with _no_end():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's program may raise anything
        raise UserError(f"{where}: {_told(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{where}: the file has no function of this name")
    takes = inspect.signature(function).parameters

    def reward(answered: Answered) -> float:
        more: dict[str, Any] = {"prompt": question(answered.prompt), "answer": answered.answer}
        try:
            with _no_end():
                value: Any = function(answered.text, **{key: text for key, text in more.items() if key in takes})
        except (Exception, SystemExit) as error:  # as above
            raise RunError(f"{where}: {_told(error, path)}, of the text {quoted(answered.text)}") from None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:
            needed = f"no finite number between -{LARGEST:g} and {LARGEST:g}"
            raise RunError(f"{where}: returned {quoted(value)}, and {needed}, of {quoted(answered.text)}")
        return number

    return reward


@contextlib.contextmanager
def _no_end() -> Iterator[None]:
    """Has os._exit raise SystemExit: it would end the run at once, with the user's status and no word.

    A process that the user's program forks ends by it as ever, and so does a run whose other threads have to end it.
    """
    end, own = os._exit, (os.getpid(), threading.get_ident())

    def refuse(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) != own:
            end(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = end


def _told(error: BaseException, path: Path) -> str:
    """Returns an error's words, with the line of the user's file in which it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{type(error).__name__}: {shown(error)}{f' (line {line})' if line else ''}"
