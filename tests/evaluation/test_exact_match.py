"""Tasks whose answers are drawn: their prompts, what of an answer counts, and the numbers."""

import json
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt.data import chat_templates, tokenizers
from jaxgpt.errors import UserError
from jaxgpt.evaluation import exact_match, expressions, interface
from jaxgpt.evaluation.descriptions import Description
from jaxgpt.evaluation.exact_match import Judge, compared
from jaxgpt.evaluation.interface import Engine, Options, Subject, drawer
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Model, Sampling
from tests import whole
from tests.evaluation.task_folders import CAPITALS, CAPITALS_TOML, SUMS, write_described, write_lines

MODEL = Model(layers=1, heads=2, width=16, context=1024, vocabulary_size=256)
BYTES = tokenizers.Bytes()
BASE = Subject(BYTES, MODEL)
CHATML = chat_templates.built_in("chatml")
CHAT = Subject(BYTES, MODEL, CHATML.state())


@pytest.fixture
def gsm8k(tmp_path):
    return write_lines(tmp_path / "test.jsonl", SUMS)


def answering(answers: list[str]) -> Engine:
    """A model that gives these answers."""

    def draw(requests):
        assert len(requests) == len(answers)
        return answers

    return Engine(None, None, draw)  # type: ignore[arg-type]


def prompts(path: str, subject: Subject = BASE, name: str = "gsm8k", **options) -> list[str]:
    asked = exact_match.load(name, path, subject, Options(**options)).asked
    return [BYTES.decode(prompt.tokens) for prompt in asked.prompts]


# Prompts


def test_prompts_of_a_base_model(gsm8k):
    """lm-evaluation-harness's, by hand."""
    first, second, *_ = prompts(gsm8k, shots=1)
    shown = "Question: 990 + 991?\nAnswer: It is 990, and 991.\n#### 1,981\n\n"
    assert second == f"{shown}Question: 991 + 992?\nAnswer:"
    assert first == f"Question: 991 + 992?\nAnswer: {SUMS[1]['answer']}\n\nQuestion: 990 + 991?\nAnswer:"


def test_prompts_of_an_assistant(gsm8k):
    asked = exact_match.load("gsm8k", gsm8k, CHAT, Options(shots=2)).asked
    turns = [("user", SUMS[0]["question"]), ("assistant", SUMS[0]["answer"])]
    turns += [("user", SUMS[1]["question"]), ("assistant", SUMS[1]["answer"]), ("user", SUMS[5]["question"])]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert BYTES.decode(asked.prompts[5].tokens) == chat_templates.render(messages, CHATML, add_generation_prompt=True)
    assert asked.sampling.stop == ("Question:", "<|im_end|>")
    assert (asked.sampling.tokens, asked.sampling.temperature) == (256, 0)


def test_examples_are_drawn_anew_before_each_question_and_never_itself(gsm8k):
    def shown(**options) -> list[list[int]]:
        return [[int(a) for a in re.findall(r"Question: (\d+) ", text)] for text in prompts(gsm8k, **options)]

    first = shown(shots=3, shots_seed=7)
    assert all(len(set(numbers)) == 4 for numbers in first)
    assert first == shown(shots=3, shots_seed=7)
    assert first != shown(shots=3, shots_seed=8)
    assert len({tuple(numbers[:3]) for numbers in first}) > 15
    rest = list(range(990, 1010))
    assert first[4][:3] == random.Random(7 + 4).sample(rest[:4] + rest[5:], 3)


def test_examples_of_another_file(gsm8k, tmp_path):
    train = write_lines(tmp_path / "train.jsonl", SUMS[-2:])
    assert all(text.startswith("Question: 1008 + 1009?") for text in prompts(gsm8k, shots=2, examples=train))
    with pytest.raises(UserError, match=r"train.jsonl: 2 examples, too few to show 3 before each one"):
        prompts(gsm8k, shots=3, examples=train)
    with pytest.raises(UserError, match=r"test.jsonl: 20 examples, too few to show 20 before each one"):
        prompts(gsm8k, shots=20)


def test_of_a_long_prompt_the_first_examples_are_left_out_and_then_its_beginning(gsm8k):
    """A model's context is for the prompt by half at least."""
    short = Subject(BYTES, Model(layers=1, heads=2, width=16, context=150, vocabulary_size=256))
    asked = exact_match.load("gsm8k", gsm8k, short, Options(shots=5)).asked
    assert asked.sampling.tokens == 75
    assert asked.shortened == len(SUMS)
    assert BYTES.decode(asked.prompts[7].tokens) == "Question: 997 + 998?\nAnswer:"
    asked = exact_match.load("gsm8k", gsm8k, short, Options(sampling=Sampling(tokens=40))).asked
    assert (asked.sampling.tokens, asked.shortened) == (40, 0)
    tiny = Subject(BYTES, Model(layers=1, heads=2, width=16, context=20, vocabulary_size=256))
    asked = exact_match.load("gsm8k", gsm8k, tiny, Options()).asked
    assert [len(prompt.tokens) for prompt in asked.prompts] == [10] * len(SUMS)
    assert BYTES.decode(asked.prompts[0].tokens) == "1?\nAnswer:"


def test_what_a_tokenizer_cannot_express(gsm8k):
    subject = Subject(tokenizers.Characters("abc"), MODEL)
    with pytest.raises(UserError, match=r"test.jsonl: example 1: the character 'Q' "):
        exact_match.load("gsm8k", gsm8k, subject, Options())


# What counts


def test_gsm8k_counts_the_number_behind_the_hashes_and_the_last_number(gsm8k):
    answers = ["So #### 1981", "#### $1,983.", "1,985", "#### 1 or #### 1987", "####1989 and 7", "It is 1991.00"]
    task = exact_match.load("gsm8k", gsm8k, BASE, Options(limit=len(answers)))
    (result,) = task.results(answering(answers))
    strict, last = [1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0]
    assert (result.accuracy, result.accuracy_last) == (np.mean(strict), pytest.approx(np.mean(last)))
    assert result.standard_error == pytest.approx(np.std(strict, ddof=1) / np.sqrt(6))
    assert result.standard_error_last == pytest.approx(np.std(last, ddof=1) / np.sqrt(6))
    assert result.line() == ("gsm8k: accuracy 0.5000 ± 0.2236, the last match 0.6667 ± 0.2108, 6 examples, 0 shown")


def test_several_answers_to_a_question(gsm8k):
    """The error is of the mean over questions: answers to one are no independent ones."""
    task = exact_match.load(
        "gsm8k", gsm8k, BASE, Options(limit=2, samples=3, sampling=Sampling(temperature=1.0), seed=9)
    )
    sent = []

    def draw(requests):
        sent.extend(requests)
        return ["#### 1981", "#### 1981", "", "", "", ""]

    (result,) = task.results(Engine(None, None, draw))  # type: ignore[arg-type]
    assert [request.seed for request in sent] == [9, 10, 11] * 2
    assert (result.samples, result.accuracy) == (3, pytest.approx(1 / 3))
    assert result.standard_error == pytest.approx(np.std([2 / 3, 0], ddof=1) / np.sqrt(2))


@pytest.mark.parametrize(
    ("match", "text", "right", "holds"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "paris", "Paris", False),
        ("normalised", "the  HAGUE!", "The Hague", True),
        ("normalised", "Hague, The Netherlands", "The Hague", False),
        ("number", "$1,234.", "1234", True),
        ("number", "-5", "5", False),
        ("regex", "about 18 apples", r"\b1[0-9]\b", True),
        ("regex", "118", r"\b1[0-9]\b", False),
    ],
)
def test_how_answers_are_compared(match, text, right, holds):
    assert Judge(Description(match=match), "t").is_right(text, [right, "something else"]) == holds


def test_normalised_as_squad_does_it():
    """It takes lower case, drops punctuation and articles, and leaves single spaces."""
    assert compared(" An apple; the PEAR (a fig) ", "normalised") == "apple pear fig"


def test_a_pattern_takes_the_answer_out_of_a_text():
    judge = Judge(Description(pattern=r"answer is (\w+)", last_pattern=r"[A-D]"), "t")
    assert judge.is_right("The answer is B. The answer is C.", ["B"])
    assert not judge.is_right("B", ["B"])
    assert judge.last_is_right("The answer is B. The answer is C.", ["C"])


def test_expressions_that_take_too_long_find_nothing():
    """Python's re would need years for the first; after ten that were ended no further one is begun."""
    searches, slow = expressions.Searches(), expressions.compiled(r"(a+)+b", "t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expressions, "SECONDS", 0.05)
        started = time.process_time()
        assert searches.first(slow, "a" * 60) is None
        assert time.process_time() - started < 2
        assert searches.ended == 1
        assert searches.first(slow, "aab") == "aa"
        for _ in range(20):
            assert searches.last(slow, "a" * 60) is None
        assert searches.ended == expressions.MOST_ENDED
        assert searches.first(slow, "aab") is None


@pytest.mark.parametrize("pattern", ["(", "a**", "x{99999999999}", "(?P<a", "(" * 1500, "a" * 3000])
def test_what_is_no_expression(pattern):
    with pytest.raises(UserError, match=r"^here (is|has) "):
        expressions.compiled(pattern, "here")


# By a model


def test_answers_are_those_of_greedy_decoding(tmp_path):
    """One token after another, from the whole text; half of the questions have what the model says as their answer."""
    model = Model(layers=1, heads=2, width=16, context=64, vocabulary_size=256)
    params = jax.tree.map(lambda array: 4 * array, gpt2.init(model, jax.random.key(3)))
    logits = jax.jit(lambda tokens: whole.logits(params, tokens, model, Compute(layers="scanned")))
    rows = []
    for number in range(12):
        text = list(f"say {number}:".encode())
        said = []
        for _ in range(6):
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(text)] = text
            said.append(int(np.asarray(logits(padded)).reshape(64, -1)[len(text) - 1].argmax()))
            text.append(said[-1])
        drawn = bytes(said).decode("utf-8", "replace")
        rows.append({"n": number, "said": drawn if number % 2 else drawn + "x"})
    write_lines(tmp_path / "t.jsonl", rows)
    (tmp_path / "t.toml").write_text('data = "t.jsonl"\nprompt = "say {n}:"\nanswer = "{said}"\ntokens = 6')
    subject = Subject(BYTES, model)
    task = exact_match.load(str(tmp_path / "t.toml"), "", subject, Options())
    engine = Engine(None, params, drawer(lambda: [params], subject, Compute(), 5))  # type: ignore[arg-type]
    (result,) = task.results(engine)
    assert (result.task, result.examples, result.accuracy) == ("t", 12, 0.5)


# Descriptions


def test_a_described_task(tmp_path):
    path = write_described(tmp_path)
    task = exact_match.load(path, "", BASE, Options())
    assert task.right == [("Paris",), ("Amsterdam", "The Hague"), ("Rome",)]
    assert BYTES.decode(task.asked.prompts[2].tokens) == (
        "Question: What is the capital of France?\nAnswer: Paris\n\n"
        "Question: What is the capital of The Netherlands?\nAnswer: Amsterdam\n\n"
        "Question: What is the capital of Italy?\nAnswer:"
    )
    (result,) = task.results(answering([" paris", "the Hague.", "Milan"]))
    assert (result.task, result.accuracy, result.shots) == ("capitals", pytest.approx(2 / 3), 2)


def test_a_description_in_json_and_another_file_of_its_lines(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"prompt": "{{{country}}}", "answer": "{capital}", "tokens": 3}))
    write_lines(tmp_path / "other.jsonl", CAPITALS[:1])
    task = exact_match.load(str(tmp_path / "t.json"), str(tmp_path / "other.jsonl"), BASE, Options())
    assert (BYTES.decode(task.asked.prompts[0].tokens), task.asked.sampling.tokens) == ("{France}", 3)
    with pytest.raises(UserError, match=r"t.json: no file is named. Name one of JSON lines"):
        exact_match.load(str(tmp_path / "t.json"), "", BASE, Options())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("prompt", "promt", "there is no promt of a task; did you mean prompt\\? There are: data, prompt"),
        ('answer = "{capital}"', "", "answer is missing, which every task has"),
        ("tokens = 16", 'tokens = "16"', "tokens is '16', and must be a number"),
        ("tokens = 16", "tokens = 0", "tokens is 0, and must be from 1 to"),
        ("tokens = 16", "tokens = true", "tokens is True, and must be a number"),
        ('match = "normalised"', 'match = "fuzzy"', "match is 'fuzzy', and must be one of exact, normalised"),
        ('stop = ["\\n"]', 'stop = "\\n"', "stop is '.*', and must be a list of texts"),
        ('stop = ["\\n"]', 'stop = [""]', "stop has an empty text"),
        ("{country}", "{country", "prompt is .*a brace itself is written twice"),
        ("{country}", "{country.__class__}", "prompt is .*in braces may be the name of a field"),
        ("{country}", "{country:9999999}", "prompt is .*in braces may be the name of a field"),
        ("{country}", "{}", "prompt is .*in braces may be the name of a field"),
        ("{country}", "{state}", "capitals.jsonl: line 1: state is missing. Is it a file of the task"),
        ("tokens = 16", 'pattern = "("', "pattern is '\\(', and no regular expression"),
        ("tokens = 16", "answer_pattern = '\\d'", r"line 1: there is no '\\d' in the answer 'Paris'"),
        ("data =", "= data", "not a TOML file"),
    ],
)
def test_a_wrong_description(tmp_path, before, after, message):
    path = Path(write_described(tmp_path))
    assert before in CAPITALS_TOML
    path.write_text(CAPITALS_TOML.replace(before, after))
    with pytest.raises(UserError, match=message):
        exact_match.load(str(path), "", BASE, Options())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not a JSON object"),
        ('{"country": "x", "capital": []}', "line 2: capital is an empty list"),
        ('{"country": {"x": 1}, "capital": "y"}', "line 2: country is an object of 1 values, and must be a text"),
        ('{"country": null, "capital": "y"}', "line 2: country is missing"),
    ],
)
def test_a_malformed_line(tmp_path, line, message):
    path = write_described(tmp_path)
    (tmp_path / "capitals.jsonl").write_text(json.dumps(CAPITALS[0]) + f"\n{line}\n")
    with pytest.raises(UserError, match=rf"capitals.jsonl: {message}"):
        exact_match.load(path, "", BASE, Options())


def test_a_right_answer_that_is_no_expression(tmp_path):
    path = Path(write_described(tmp_path))
    path.write_text(CAPITALS_TOML.replace("normalised", "regex"))
    write_lines(tmp_path / "capitals.jsonl", [{"country": "x", "capital": "("}])
    with pytest.raises(UserError, match=r"line 1: the answer is '\(', and no regular expression"):
        exact_match.load(str(path), "", BASE, Options())


def test_devices_draw_the_texts_side_by_side(monkeypatch):
    """Each those that are its own by their place, and the texts come in the order of the requests."""
    seen, told = [], []

    def generate(params, requests, *more, slots):
        seen.append((params, list(requests)))
        for number, request in enumerate(requests):
            yield SimpleNamespace(number=number, text=f"{params}", last=False)
            yield SimpleNamespace(number=number, text=f"{request}", last=True)

    monkeypatch.setattr(interface.batching, "generate", generate)
    draw = drawer(lambda: ["x", "y", "z"], Subject(BYTES, None), Compute(), 5, lambda *of: told.append(of))  # type: ignore[arg-type]
    assert draw([0, 1, 2, 3, 4, 5, 6]) == ["x0", "y1", "z2", "x3", "y4", "z5", "x6"]  # type: ignore[list-item]
    assert sorted(seen) == [("x", [0, 3, 6]), ("y", [1, 4]), ("z", [2, 5])]
    assert told == [(count, 7) for count in range(1, 8)]
    assert draw([0]) == ["x0"]  # type: ignore[list-item]
