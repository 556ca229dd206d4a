"""The checks of the exercises and of notebook 23: answers are accepted, blanks and mistakes are told apart.

A notebook's answers, `notebooks/answers/`, are run here without the notebook; `answers/run.py` runs them in it.
"""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def module(name):
    """A module beside the notebooks, which import it by its bare name."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


diagnosis, exercises, ninja = module("diagnosis"), module("exercises"), module("ninja")
hints = module("hints")
NAMES = {str(int(path.stem[:2])): path for path in (FOLDER / "answers").glob("*.md")}
TENSORS = list(hints.HINTS)
NEEDS_THE_NOTEBOOK = {"12.3"}  # its answer is found with the notebook's own functions


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def answers(notebook):
    """The first block of each exercise."""
    parts = re.split(r"^## \d+$", NAMES[notebook].read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [BLOCK.findall(part)[0] for part in parts]


def answer_of(number):
    notebook, _, exercise = number.partition(".")
    names = {"jax": jax, "jnp": jnp, "np": np}
    exec(answers(notebook)[int(exercise) - 1], names)
    return names["answer"]


def test_every_exercise_has_an_answer_and_every_answer_an_exercise():
    found = {f"{notebook}.{k + 1}" for notebook in NAMES if notebook != "23" for k in range(len(answers(notebook)))}
    assert found == set(exercises.EXERCISES)


@pytest.mark.parametrize("number", [key for key in exercises.EXERCISES if key not in NEEDS_THE_NOTEBOOK])
def test_the_authors_answer_is_right(number):
    assert exercises.judge(number, answer_of(number)) == "right"


def wrong(expected):
    """Returns a wrong answer of the right form."""
    if isinstance(expected, exercises.Function):
        parameters = ", ".join(f"a{n}" for n in range(len(expected.inputs)))
        inputs = [jnp.asarray(part) if isinstance(part, np.ndarray) else part for part in expected.inputs]
        truth = expected.reference(*inputs)
        off = tuple(2 * part + 3.0 for part in truth) if isinstance(truth, tuple) else 2 * truth + 3.0
        return eval(f"lambda {parameters}: off", {"off": off})
    if isinstance(expected, exercises.Same):
        return (not expected.value) if isinstance(expected.value, bool) else "something else"
    return (np.asarray(expected.values) * 2 + 3).tolist()


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_blanks_and_wrong_answers_are_not_right(number):
    assert exercises.judge(number, ...) == exercises.NOT_YET
    said = exercises.judge(number, wrong(exercises.EXERCISES[number]))
    assert "right" not in said.split()[:1]
    assert said != exercises.NOT_YET


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda L: L, "the function takes 1 arguments, and is called with 2"),
        (7, "a function is wanted, and this is int"),
        (lambda L, C: ..., "no answer yet"),
        (lambda L, C: -L * (12 * C * C + 13 * C), "the sign is turned (off by 200.0%)"),
    ],
)
def test_what_is_said_of_a_function(answer, said):
    assert exercises.judge("1.4", answer) == said


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("1.2", -1535, "not yet: the sign is turned"),
        ("1.2", 3070, "not yet: 2 times what is right"),
        ("6.2", (10.82, 6), "not yet: number 2 of 2"),
        ("6.2", 10.82, "2 numbers are wanted, in their order"),
        ("1.2", "long", "not a number: 'long'"),
    ],
)
def test_what_is_said_of_numbers(number, answer, said):
    assert exercises.judge(number, answer) == said


@pytest.mark.slow
def test_the_hints_are_for_all_tensors():
    assert set(hints.HINTS) == set(ninja.names())
    assert all(len(set(three)) == 3 for three in hints.HINTS.values())


@pytest.mark.slow
def test_notebook_23_asks_for_all_tensors():
    text = NAMES["23"].read_text(encoding="utf-8")
    assert sorted(re.findall(r"^`([\w.]+)`$", text, re.MULTILINE)) == sorted(ninja.names())


@pytest.mark.parametrize("name", TENSORS)
def test_the_solution_is_right_and_what_is_easily_wrong_is_named(name):
    layer, _, tensor = name.partition(".")
    case = ninja.case(layer)
    truth = np.asarray(case.gradients[tensor])
    names = {"jax": jax, "jnp": jnp}
    text = NAMES["23"].read_text(encoding="utf-8")
    exec(BLOCK.findall(text[text.index(f"`{name}`") :])[0], names)
    solution = names[f"{layer}_{tensor}"]
    assert ninja.judge(name, solution) == "right"
    assert ninja.judge(name, -truth).startswith("the sign is turned")
    assert ninja.judge(name, 0 * truth).startswith("all zeros")
    assert ninja.judge(name, ...) == "not written yet"
    for size, value in case.sizes.items():
        said = ninja.judge(name, truth * value)
        assert said.startswith("a factor too much"), (size, said)
    if truth.ndim:
        assert "a sum over an axis is missing" in ninja.judge(name, truth[None] + np.zeros((2, *truth.shape)))
        assert "summed" in ninja.judge(name, truth.sum(0))
    if truth.ndim == 2 and truth.shape[0] != truth.shape[1]:
        assert ninja.judge(name, truth.T).startswith("transposed")
    for what, mistake in case.mistakes.get(tensor, {}).items():
        assert ninja.judge(name, mistake(case.inputs)).startswith(what)


def test_a_missing_constant_term_and_missing_rows_are_seen():
    truth = np.random.default_rng(0).normal(size=(5, 4))
    assert "the same along axis 1" in diagnosis.diagnose(truth + np.arange(1.0, 6)[:, None], truth)
    left_out = truth.copy()
    left_out[1] = 0
    assert diagnosis.diagnose(left_out, truth).startswith("16 of 20 places are right")
    square = truth[:4]
    assert diagnosis.diagnose(square.T, square).startswith("transposed")
    assert diagnosis.diagnose(np.full_like(truth, np.nan), truth).startswith("not finite in 20 of 20")
    assert diagnosis.diagnose("x", truth).startswith("not numbers")


def test_a_name_that_there_is_not_is_told():
    with pytest.raises(KeyError, match="there are linear"):
        ninja.judge("liner.x", ...)
    assert "it has x, w, b" in ninja.judge("linear.y", ...)
    assert ninja.judge("linear.x", lambda dz: dz) == "there is no input 'dz'; linear has x, w, dy"
