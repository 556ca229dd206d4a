"""The sums that an assistant's stages are shown on: a function of the seed, with problems held out of all of them."""

import json
import random
import re

import pytest

from benchmarks.assistant import arithmetic
from jaxgpt.data import conversations, tokenizers
from jaxgpt.data.documents import Rows
from jaxgpt.data.tokenizer_json import HuggingFace

STEP = re.compile(r"(\d+) ([+-]) (\d+)(?: ([+-]) 1)? = (\d+)")


def computed(steps):
    """Returns, for each step of a text, whether it is right by itself."""
    found = STEP.findall(steps)
    assert len(found) == 2
    return [eval(f"{a}{sign}{b}" + (f"{more}1" if more else "")) == int(result) for a, sign, b, more, result in found]


def asked_in(rows):
    return {row["prompt"][0]["content"] for row in rows}


def test_held_out_problems_are_in_nothing_to_train_on():
    seen, held_out = arithmetic.split(3)
    assert len(held_out) == arithmetic.HELD_OUT
    assert not set(seen) & set(held_out)
    assert sorted([*seen, *held_out]) == sorted(arithmetic.all_problems())
    hidden = {f"{problem.question} = ?" for problem in held_out}
    text = arithmetic.base_text(3, 2_000)
    assert not any(question.removesuffix(" = ?") in text for question in hidden)
    talks = [{"prompt": row["messages"]} for row in arithmetic.conversations(3)]
    for rows in (talks, arithmetic.comparisons(seen, 3), arithmetic.as_rows(seen)):
        assert not asked_in(rows) & hidden
    assert asked_in(arithmetic.comparisons(held_out, 3, 400)) <= hidden


def test_every_problem_is_worked_out_right():
    for problem in arithmetic.all_problems():
        found = arithmetic.worked(problem)
        assert found.answer == problem.answer == eval(problem.question)
        assert all(computed(found.steps))


def test_a_slip_makes_an_answer_wrong_and_in_the_format():
    choose = random.Random(0)
    for problem in choose.sample(arithmetic.all_problems(), 300):
        found = arithmetic.wrong(problem, choose)
        assert 0 <= found.answer != problem.answer
        text = arithmetic.answered(found)["content"]
        assert arithmetic.in_format(text)
        assert not arithmetic.is_right(text, problem)
        assert sum(computed(found.steps)) >= 1  # one slip alone


def test_comparisons_prefer_steps_but_for_labels_that_are_flipped():
    seen, _ = arithmetic.split(0)
    right, flipped = arithmetic.comparisons(seen, 0), arithmetic.comparisons(seen, 0, flipped=arithmetic.FLIPPED)
    assert all(arithmetic.shows_steps(row["chosen"][0]["content"]) for row in right)
    assert not any(arithmetic.shows_steps(row["rejected"][0]["content"]) for row in right)
    turned = [
        (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
        for one, other in zip(right, flipped, strict=True)
    ]
    assert sum(turned) == pytest.approx(arithmetic.FLIPPED * len(right), abs=4 * (0.09 * len(right)) ** 0.5)
    assert all(one == other for one, other, other_way in zip(right, flipped, turned, strict=True) if not other_way)


def test_it_is_a_function_of_the_seed(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the extra data")
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        arithmetic.write(tmp_path / name, seed, lines=2_000)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
        if path.suffix != ".json":  # the tokenizer may be the same
            assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()
    assert len(list(conversations.read([tmp_path / "one/conversations.jsonl"], Rows()))) == arithmetic.CONVERSATIONS
    problems = [problem for _, problem in conversations.read_problems([tmp_path / "one/problems.jsonl"], Rows())]
    assert [problem.answer for problem in problems] == [str(problem.answer) for problem in arithmetic.split(1)[0]]
    tokenizer = HuggingFace((tmp_path / "one/tokenizer.json").read_text())
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    ids = tokenizer.encode("<|im_start|>user\n34 + 57 = ?<|im_end|>\n", special=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\n34 + 57 = ?<|im_end|>\n"
    assert [tokenizer.decode([number]) for number in tokenizer.encode("34")] == ["3", "4"]
    assert json.loads((tmp_path / "one/held_out.jsonl").read_text().splitlines()[0])["prompt"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("Answer: 42", True), ("2 + 2 = 4, 1 + 2 = 3. Answer: 34", True), ("42", False), ("Answer: ", False),
     ("Answer: -3", False), ("Answer: 4 2", False), ("So\nAnswer: 4", False), ("Answer: 42<|im", False)],
)  # fmt: skip
def test_the_format(text, is_one):
    assert arithmetic.in_format(text) is is_one
