"""The sums that an assistant's stages are shown on: a function of the seed, with problems held out of all of them."""

import json
import re

import pytest

from benchmarks.assistant import arithmetic
from jaxgpt.data import conversations
from jaxgpt.data.documents import Rows


def test_held_out_problems_are_in_no_text_and_no_conversation():
    seen, held_out = arithmetic.split(3)
    assert len(held_out) == arithmetic.HELD_OUT
    assert not set(seen) & set(held_out)
    assert sorted([*seen, *held_out]) == sorted(arithmetic.all_problems())
    hidden = {problem.question for problem in held_out}
    lines = arithmetic.base_text(3).splitlines()
    assert len(lines) == arithmetic.LINES
    assert not {line.partition(" = ")[0] for line in lines} & hidden
    asked = {row["messages"][0]["content"].removesuffix(" = ?") for row in arithmetic.conversations(3)}
    assert not asked & hidden


def test_every_sum_is_right():
    for line in arithmetic.base_text(0, 500).splitlines():
        found = re.fullmatch(r"(\d+) ([+-]) (\d+) = (-?\d+)", line)
        assert found
        a, sign, b, result = found.groups()
        assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_it_is_a_function_of_the_seed(tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        arithmetic.write(tmp_path / name, seed)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()
    found = list(conversations.read([tmp_path / "one/sft.jsonl"], Rows()))
    assert len(found) == arithmetic.CONVERSATIONS
    problems = [problem for _, problem in conversations.read_problems([tmp_path / "one/held_out.jsonl"], Rows())]
    assert [problem.answer for problem in problems] == [problem.answer for problem in arithmetic.split(1)[1]]
    assert json.loads((tmp_path / "one/problems.jsonl").read_text().splitlines()[0])["prompt"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("Answer: 42", True), ("Answer: -3", True), ("42", False), ("Answer: ", False), ("Answer: 4 2", False),
     ("So: Answer: 4", False), ("Answer: 42<|im", False)],
)  # fmt: skip
def test_the_format(text, is_one):
    assert arithmetic.in_format(text) is is_one
