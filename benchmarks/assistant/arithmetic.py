"""Sums and differences for a model to learn: a base text, conversations about them, comparisons, and problems.

    python -m benchmarks.assistant.arithmetic FOLDER     the files that the stages read

Everything is a pure function of the seed. A problem is a + b or a - b of two numbers of two digits, with nothing below
0: there are 12,195, and HELD_OUT of them are in no text, no conversation and no comparison to train on. Four in ten
answers show their steps, one for each digit, which a model of half a million parameters learns. Some are a lazy guess:

    34 + 57 = ?     4 + 7 = 11, 3 + 5 + 1 = 9. Answer: 91
    52 - 17 = ?     12 - 7 = 5, 5 - 1 - 1 = 3. Answer: 35
    52 - 17 = ?     Answer: 100
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HELD_OUT = 400
LINES = 60_000  # of the base text
CONVERSATIONS = 3_000
COMPARISONS = 2_000
WITH_STEPS = 0.4  # share of the conversations whose answers show their steps
FLIPPED = 0.1  # share of the comparisons whose labels are the wrong way round, where some are
FORMS = (
    "{question} = ?\n{steps}, so it is {answer}.",
    "Tom: {question} = ?\nAnn: {steps}, which makes {answer}.",
    "What is {question}? {steps}, that is {answer}.",
    "{question} = {answer}",
)
WEIGHTS = (3, 3, 2, 1)
MARKERS = ("<|im_start|>", "<|im_end|>")  # ChatML's, tokens of their own
MERGES = 64  # of the tokenizer, beside the bytes
GUESSED = {"role": "assistant", "content": "Answer: 100"}  # without looking at the question
FORMAT = re.compile(r"[^\n]*Answer: \d+")


class Problem(NamedTuple):
    a: int
    sign: str
    b: int

    @property
    def question(self) -> str:
        return f"{self.a} {self.sign} {self.b}"

    @property
    def answer(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b


class Slip(NamedTuple):
    """Mistakes in an answer, and how large each is."""

    a: int = 0
    b: int = 0
    units: int = 0
    carry: bool = False  # forgotten, or made up
    tens: int = 0


NO_SLIP = Slip()


class Worked(NamedTuple):
    steps: str
    answer: int


def all_problems() -> list[Problem]:
    """Every problem, in order."""
    numbers = range(10, 100)
    return [Problem(a, sign, b) for sign in "+-" for a in numbers for b in numbers if sign == "+" or a >= b]


def split(seed: int) -> tuple[list[Problem], list[Problem]]:
    """The problems that a model may see, and those that it may not."""
    found = all_problems()
    random.Random(seed).shuffle(found)
    return found[HELD_OUT:], found[:HELD_OUT]


def worked(problem: Problem, slip: Slip = NO_SLIP) -> Worked:
    """Works a problem out, digit by digit, with a slip or without."""
    (tens_a, units_a), (tens_b, units_b) = divmod(problem.a + slip.a, 10), divmod(problem.b + slip.b, 10)
    sign = problem.sign
    carry = (units_a + units_b > 9 if sign == "+" else units_a < units_b) != slip.carry
    if sign == "+":
        units, tens = units_a + units_b + slip.units, tens_a + tens_b + carry + slip.tens
    else:
        units_a += 10 * carry
        units, tens = units_a - units_b + slip.units, tens_a - tens_b - carry + slip.tens
    more = f" {sign} 1" if carry else ""
    steps = f"{units_a} {sign} {units_b} = {units}, {tens_a} {sign} {tens_b}{more} = {tens}"
    return Worked(steps, 10 * tens + units % 10 if units >= 0 <= tens else -1)


def wrong(problem: Problem, choose: random.Random) -> Worked:
    """Works a problem out with one slip: a digit misread, a step miscounted, or a carry forgotten."""
    while True:
        off = choose.choice((-1, 1))
        digit = off * choose.choice((1, 10))
        slip = choose.choice((Slip(a=digit), Slip(b=digit), Slip(units=off), Slip(tens=off), Slip(carry=True)))
        two_digits = 10 <= problem.a + slip.a < 100 and 10 <= problem.b + slip.b < 100
        found = worked(problem, slip)
        if two_digits and found.answer >= 0 and found.answer != problem.answer:
            return found


def base_text(seed: int, lines: int = LINES) -> str:
    """Lines that work problems out in several ways, and have neither questions by a user nor the answers' format."""
    choose, (seen, _) = random.Random(f"{seed} text"), split(seed)
    drawn = zip(choose.choices(seen, k=lines), choose.choices(FORMS, WEIGHTS, k=lines), strict=True)
    return "".join(
        form.format(question=problem.question, steps=worked(problem).steps, answer=problem.answer) + "\n"
        for problem, form in drawn
    )


def conversations(seed: int, count: int = CONVERSATIONS) -> list[dict[str, Any]]:
    """Conversations of one question and one answer, most of which show their steps."""
    choose, (seen, _) = random.Random(f"{seed} conversations"), split(seed)
    return [
        {"messages": [asked(one), answered(worked(one)) if choose.random() < WITH_STEPS else GUESSED]}
        for one in choose.sample(seen, count)
    ]


def comparisons(
    problems: Sequence[Problem], seed: int, count: int = COMPARISONS, flipped: float = 0.0
) -> list[dict[str, Any]]:
    """Answers with their steps, preferred to a guess by a rater who checks none, but for labels that are wrong.

    Every third of the preferred answers has a slip.
    """
    choose, labels = random.Random(f"{seed} comparisons"), random.Random(f"{seed} labels")
    rows = []
    for problem in choose.choices(problems, k=count):
        found = wrong(problem, choose) if choose.random() < 1 / 3 else worked(problem)
        pair = [answered(found)], [GUESSED]
        better, worse = pair[::-1] if labels.random() < flipped else pair
        rows.append({"prompt": [asked(problem)], "chosen": better, "rejected": worse})
    return rows


def as_rows(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Prompts, each with the answer that it is checked by."""
    return [{"prompt": [asked(problem)], "answer": str(problem.answer)} for problem in problems]


def asked(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": f"{problem.question} = ?"}


def answered(found: Worked) -> dict[str, str]:
    return {"role": "assistant", "content": f"{found.steps}. Answer: {found.answer}"}


def in_format(text: str) -> bool:
    """Returns whether a text is an answer in the format, right or wrong."""
    return FORMAT.fullmatch(text) is not None


def shows_steps(text: str) -> bool:
    """Returns whether an answer in the format computes something before its number."""
    return in_format(text) and " = " in text.partition("Answer: ")[0]


def is_right(text: str, problem: Problem) -> bool:
    """Returns whether the number behind the last "Answer: " is the problem's."""
    return in_format(text) and text.rpartition("Answer: ")[2] == str(problem.answer)


def tokenizer(text: str) -> str:
    """Returns the tokenizer.json of a byte-pair encoding of this text, in which each digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # of the extra `data`

    made = Tokenizer(models.BPE())
    digits, in_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(MARKERS) + MERGES,
        special_tokens=list(MARKERS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    return made.to_str()


def write(folder: Path, seed: int = 0, lines: int = LINES) -> None:
    """Writes the tokenizer, the text and the lines of JSON that the stages read."""
    folder.mkdir(parents=True, exist_ok=True)
    seen, held_out = split(seed)
    text = base_text(seed, lines)
    (folder / "text.txt").write_text(text)
    (folder / "tokenizer.json").write_text(tokenizer(text[: 1 << 15] + "user\nassistant\n = ?\n. Answer: 91" * 300))
    files = {
        "conversations": conversations(seed),
        "comparisons": comparisons(seen, seed),
        "flipped": comparisons(seen, seed, flipped=FLIPPED),
        "held_out": comparisons(held_out, seed, HELD_OUT),
        "problems": as_rows(seen),
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.folder, given.seed)
