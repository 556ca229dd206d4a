"""The examples of scripts/examples: every line that is shown of them against a server, and their parts alone."""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxgpt.generation import api
from jaxgpt.generation.batching import ContinuousBatch
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.worker import Worker
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Model
from tests.docs import commands
from tests.generation.servers import BYTES, KEY, MISSING, NAME, listening

pytest.importorskip("openai", reason=f"openai is {MISSING}")
pytest.importorskip("llguidance", reason=f"llguidance is {MISSING}")


FOLDER = commands.ROOT / "scripts/examples"
MODEL = Model(layers=1, heads=2, width=16, context=4096, vocabulary_size=256)
LINES = [line for line in commands.lines() if not line.inline and "scripts/examples/" in line.text]
COMMANDS = [command for line in LINES for command in commands.commands(line) if command.kind == "script"]
TYPED = [list(words) for words in dict.fromkeys(tuple(command.words) for command in COMMANDS)]


@pytest.fixture(scope="module")
def address():
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(0)))
    worker = Worker(ContinuousBatch(Decoder(params, MODEL, Compute(), slots=4, capacity=MODEL.context), BYTES))
    served = api.Served(NAME, BYTES, 256, api.Limits(MODEL.context, 1024, 16))
    with listening(worker, served=served, waiting=32) as address:
        yield f"{address}/v1"
    worker.stop()


@pytest.fixture
def example(monkeypatch):
    """A function that imports an example, as it imports the others beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def start(words: list[str], address: str, key: str = KEY) -> subprocess.CompletedProcess:
    script, *rest = words
    command = [sys.executable, commands.ROOT / script, *rest, "--url", address]
    own = os.environ | {"OPENAI_API_KEY": key}
    return subprocess.run(command, cwd=commands.ROOT, env=own, capture_output=True, text=True, timeout=120)


def test_there_is_a_line_for_each_script():
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"connect.py", "tools.py"}
    assert {Path(script).name for script, *_ in TYPED} == scripts
    assert all(len(path.read_text().splitlines()) < 120 for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("words", TYPED, ids=lambda words: " ".join(map(str, words[:2])))
def test_every_line_runs(address, words):
    if "retrieval" in words[0]:
        pytest.importorskip("bm25s", reason="ranks with bm25s, of the examples extra")
    done = start(words, address)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("--- ")
    assert all(character.isprintable() or character == "\n" for character in done.stdout)


def test_what_cannot_be_reached_or_is_refused_is_one_line(address):
    script = ["scripts/examples/react.py"]
    for where, key, said in (
        ("http://127.0.0.1:9/v1", KEY, "there is no server at"),
        (address, "another", "a valid API key is needed"),
    ):
        done = start(script, where, key)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


# Chain of thought


def test_an_answer_is_the_last_number_and_the_most_frequent_wins(example):
    chain = example("chain_of_thought")
    assert [chain.answer_in(text) for text in ("3 + 4 = 7.", "-2.5 so", "none")] == ["7", "-2.5", ""]
    assert chain.vote(["1", "2", "", "2", ""]) == ("2", 2)
    assert chain.vote(["1", "2"]) == ("1", 1)
    assert chain.vote(["", ""]) == ("", 0)


def test_the_examples_answers_are_right(example):
    """Each sum in the reasons is what it says it is."""
    chain, tools = example("chain_of_thought"), example("tools")
    for _, why, answer in chain.EXAMPLES:
        sums = [part.split(" = ") for part in why.rstrip(".").split(". ") if " = " in part]
        assert all(tools.calculate(left) == right for left, right in sums)
        assert sums[-1][1] == answer
    assert "The answer is 11." in chain.few_shot("?", reasoned=False)
    assert "5 + 6 = 11" not in chain.few_shot("?", reasoned=False)


# The tools


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 + 3 * 4", "14"), ("(1 + 2) ** 10 // 7", "8435"), ("-7 % 3", "2"), ("1 / 3", "0.333333333333"),
     ("2 ** -1", "0.5"), (" 1e3 ", "1000"), ("+-+2", "-2"), ("999999 ** 64 - 999999 ** 64", "0")],
)  # fmt: skip
def test_the_calculator(example, expression, value):
    assert example("tools").calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').system('touch ran')", "open('ran', 'w')", "(lambda: 1)()", "[1][0]", "'a' * 9", "a", "True",
     "1 if 1 else 2", "1j", "1 << 9", "9 ** 9 ** 9", "10 ** 65", "(10 ** 64) ** 64", "(-8) ** 0.5", "1 / 0", "0 ** -1",
     "", "1 +",
     "(" * 90 + "1" + ")" * 90, "(" * 300, "9" * 300, "1\0", "x := 1", "f'{1}'", "9.0 ** 64 ** 64", "1_0 ** 1e308"],
)  # fmt: skip
def test_the_calculator_runs_nothing_and_ends_soon(example, expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    found = example("tools").calculate(expression)
    assert time.perf_counter() - began < 2
    assert found.startswith("error: ") or expression.startswith("((((")
    assert len(found) < 400
    assert not list(tmp_path.iterdir())


def test_the_search_stays_in_its_folder(example, tmp_path):
    search = example("tools").search
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "more", outside):
        folder.mkdir(parents=True)
    (outside / "secret.txt").write_text("the secret word\n")
    (inside / "a.txt").write_text("a word\n\nthe last word of the\n")
    (inside / "more/b.md").write_bytes(b"a WORD \xff in bytes\n")
    (inside / "c.bin").write_text("a word\n")
    (inside / "large.txt").write_text("word " * 300_000)
    (inside / "link.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "link_within.txt").symlink_to(inside / "a.txt")
    os.mkfifo(inside / "pipe.txt")
    found = search(inside, "word").splitlines()
    assert found[:3] == ["a.txt:1: a word", "a.txt:3: the last word of the", "link_within.txt:1: a word"]
    assert search(inside, "word last").splitlines()[0] == "a.txt:3: the last word of the"
    assert search(inside, "word bytes").splitlines()[0].startswith("more/b.md:1: a WORD")
    for words in ("secret", "../outside/secret.txt", "/etc/passwd root:", "a of b.", ""):
        assert search(inside, words) == "nothing was found"


# ReAct, with a model that says what it is told to


def solved(example, *said: str, **options):
    """Returns react.py's answer when the model writes these steps, and the prompts that the model was given."""
    prompts, steps = [], iter(said)

    def create(prompt, **_):
        prompts.append(prompt)
        return SimpleNamespace(choices=[SimpleNamespace(text=next(steps))])

    given = {"model": "x", "question": "How?", "tokens": 9, "steps": 4, "seed": 0, "folder": FOLDER / "notes"} | options
    client = SimpleNamespace(completions=SimpleNamespace(create=create))
    return example("react").solve(client, argparse.Namespace(**given)), prompts


def test_the_loop_gives_back_what_the_tools_say(example):
    first = "Thought: look it up\nAction: search[common year]"
    second = "Thought: now reckon\nAction: calculate[3 * 365 + 40]"
    answer, prompts = solved(example, first, second, "Thought: done\nAction: answer[1135 days]")
    assert answer == "1135 days"
    assert prompts[1].startswith(f"{prompts[0]}{first}\nObservation: calendar.txt:1: A common year has 365 days")
    assert prompts[2] == f"{prompts[1]}{second}\nObservation: 1135\n"


def test_the_loop_ends_without_an_answer(example, capsys):
    again = "Thought: again\nAction: calculate[1]"
    assert solved(example, *[again] * 9)[0] == ""
    assert solved(example, "Thought: how lo")[0] == ""
    assert "give more --tokens" in capsys.readouterr().out
    assert solved(example, "Thought: x\nAction: run[rm]")[0] == ""


# Tree of thought, with a model of which the votes are known


def test_the_tree_goes_on_from_what_is_judged_best(example):
    tree, values = example("tree_of_thought"), {"a": "maybe", "b": "sure", "c": "impossible", "": "sure"}

    def create(prompt, n, **_):
        if prompt.endswith("It is "):
            texts = [values[prompt.split("\n")[-2].partition(": ")[2]]] * n
        else:
            texts = [" a", " b", " b", " c"][:n]
        return SimpleNamespace(choices=[SimpleNamespace(text=text) for text in texts])

    client = SimpleNamespace(completions=SimpleNamespace(create=create))
    options = {"goal": "g", "model": "x", "tokens": 9, "seed": 0, "depth": 3, "branches": 4, "kept": 2, "votes": 3}
    best = tree.search(client, argparse.Namespace(**options))
    assert best.steps == ("b", "b", "b")
    assert best.score == pytest.approx(1.0)


# Retrieval


def test_the_passages_that_fit_best_come_first(example, tmp_path):
    pytest.importorskip("bm25s", reason="ranks with bm25s, of the examples extra")
    retrieval = example("retrieval")
    texts = retrieval.passages(FOLDER / "notes", 400)
    assert {passage.place.partition(",")[0] for passage in texts} == {"calendar.txt", "garden.md"}
    chosen = retrieval.best(texts, "When are apple trees pruned?", 2)
    assert chosen[0].text.startswith("Apple trees are pruned in February")
    assert retrieval.best(texts, "Xylophone?", 2) == []
    assert len(retrieval.best(texts[:1], "Which days has a common year?", 9)) == 1
    assert retrieval.passages(tmp_path, 400) == []


def test_the_passages_are_ranked_by_bm25(example):
    """The scores follow the formula itself (Lucene's form of it), with its usual k1 = 1.5 and b = 0.75."""
    pytest.importorskip("bm25s", reason="ranks with bm25s, of the examples extra")
    import math

    retrieval = example("retrieval")
    words = ["red fox red", "red hen", "blue hen hen sings long", "blue sea", "grey owl"]
    texts = [retrieval.Passage(str(number), text) for number, text in enumerate(words)]
    asked, mean = ["red", "hen"], sum(len(text.split()) for text in words) / len(words)

    def score(text: str) -> float:
        total = 0.0
        for word in asked:
            count, having = text.split().count(word), sum(word in other.split() for other in words)
            share = count / (count + 1.5 * (1 - 0.75 + 0.75 * len(text.split()) / mean))
            total += math.log(1 + (len(words) - having + 0.5) / (having + 0.5)) * share
        return total

    expected = sorted((text for text in words if score(text)), key=score, reverse=True)
    assert [passage.text for passage in retrieval.best(texts, "red hen", 5)] == expected
