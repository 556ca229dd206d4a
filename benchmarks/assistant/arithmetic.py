"""Sums for a model to learn: a base text, conversations about them, and problems that are in neither.

    python -m benchmarks.assistant.arithmetic FOLDER     text.txt, sft.jsonl, problems.jsonl and held_out.jsonl

Everything is a pure function of the seed. There are 800 problems: a + b and a - b for a and b below 20. HELD_OUT of
them are in no text and no conversation.
"""

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

BELOW = 20  # both numbers of a problem
HELD_OUT = 100
LINES = 40_000  # of the base text
CONVERSATIONS = 2_000


class Problem(NamedTuple):
    question: str  # "7 + 5"
    answer: str  # "12"


def all_problems() -> list[Problem]:
    """Every problem, in order."""
    pairs = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    sums = [Problem(f"{a} + {b}", f"{a + b}") for a, b in pairs]
    return sums + [Problem(f"{a} - {b}", f"{a - b}") for a, b in pairs]


def split(seed: int) -> tuple[list[Problem], list[Problem]]:
    """The problems that a model may see, and those that it may not."""
    found = all_problems()
    random.Random(seed).shuffle(found)
    return found[HELD_OUT:], found[:HELD_OUT]


def base_text(seed: int, lines: int = LINES) -> str:
    """Lines such as "7 + 5 = 12", which teach to compute, and nothing of questions and answers."""
    choose, (seen, _) = random.Random(f"{seed} text"), split(seed)
    drawn = choose.choices(seen, k=lines)
    return "".join(f"{problem.question} = {problem.answer}\n" for problem in drawn)


def conversations(seed: int, count: int = CONVERSATIONS) -> list[dict]:
    """Conversations of one question and one answer in a format, "Answer: 12"."""
    choose, (seen, _) = random.Random(f"{seed} conversations"), split(seed)
    return [{"messages": [question(problem), answer(problem.answer)]} for problem in choose.choices(seen, k=count)]


def question(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": f"{problem.question} = ?"}


def answer(number: str) -> dict[str, str]:
    return {"role": "assistant", "content": f"Answer: {number}"}


def in_format(text: str) -> bool:
    """Returns whether a text is an answer in the format, right or wrong."""
    begin, _, number = text.partition("Answer: ")
    return begin == "" and number.removeprefix("-").isdecimal()


def write(folder: Path, seed: int = 0) -> None:
    """Writes the text and the lines of JSON that the stages read."""
    seen, held_out = split(seed)
    (folder / "text.txt").write_text(base_text(seed))
    lines = {"sft": conversations(seed), "problems": as_rows(seen), "held_out": as_rows(held_out)}
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def as_rows(problems: list[Problem]) -> list[dict]:
    """Prompts, each with the answer that it is checked by."""
    return [{"prompt": [question(problem)], "answer": problem.answer} for problem in problems]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
