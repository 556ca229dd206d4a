"""Chain of thought: one question asked in four ways, each of which tells the model more of how to answer it.

plain               the question alone
few-shot            behind examples of questions and answers (Brown et al. 2020, arXiv:2005.14165)
chain of thought    behind examples whose answers are reasoned before they are given (Wei et al. 2022, arXiv:2201.11903)
self-consistency    several chains of thought are drawn, and the answer that most of them end with is taken (Wang et al.
                    2022, arXiv:2203.11171)

The prompts are texts to go on with, so a model that was never trained on conversations can take them.
"""

import argparse
import collections
import re

import connect
import openai

QUESTION = "A shelf has 3 boards with 8 books each. 5 books are lent out. How many books are on the shelf?"
EXAMPLES = [
    (
        "Tom has 5 balls and buys 2 cans of 3 balls. How many balls has he?",
        "2 cans of 3 balls are 6. 5 + 6 = 11.",
        "11",
    ),
    ("Of 23 apples 20 are eaten, and 6 are bought. How many are there?", "23 - 20 = 3. 3 + 6 = 9.", "9"),
    ("Leah had 32 sweets, Ann 42. They ate 35. How many are left?", "32 + 42 = 74. 74 - 35 = 39.", "39"),
]
NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def few_shot(question: str, *, reasoned: bool) -> str:
    """Returns the question behind the examples, with or without their reasons."""
    shown = [f"Q: {asked}\nA: {f'{why} ' if reasoned else ''}The answer is {answer}.\n\n"
             for asked, why, answer in EXAMPLES]  # fmt: skip
    return f"{''.join(shown)}Q: {question}\nA:"


def answer_in(text: str) -> str:
    """Returns the last number of a text; empty where there is none."""
    found = NUMBER.findall(text)
    return found[-1] if found else ""


def vote(answers: list[str]) -> tuple[str, int]:
    """Returns the answer that most texts give, and how many do; of equally many the first."""
    return max(collections.Counter(filter(None, answers)).items(), key=lambda item: item[1], default=("", 0))


def ask(client: openai.OpenAI, given: argparse.Namespace) -> None:
    def texts(prompt: str, n: int = 1) -> list[str]:
        done = client.completions.create(
            model=given.model,
            prompt=prompt,
            n=n,
            max_tokens=given.tokens,
            temperature=0.7 if n > 1 else 0,  # several texts are to differ
            seed=given.seed,
            stop=["\n\n", "Q:"],
        )
        return [choice.text for choice in done.choices]

    reasoned = few_shot(given.question, reasoned=True)
    ways = {
        "plain": f"Q: {given.question}\nA:",
        "few-shot": few_shot(given.question, reasoned=False),
        "chain of thought": reasoned,
    }
    for name, prompt in ways.items():
        (text,) = texts(prompt)
        connect.show(f"{name}: the answer is {answer_in(text) or 'missing'}", text)
    drawn = texts(reasoned, given.samples)
    for number, text in enumerate(drawn, start=1):
        connect.show(f"chain {number}: the answer is {answer_in(text) or 'missing'}", text)
    answer, votes = vote([answer_in(text) for text in drawn])
    print(f"--- self-consistency: the answer is {answer or 'missing'}, by {votes} of {given.samples} chains")


if __name__ == "__main__":
    parser = connect.options(__doc__)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--samples", type=int, default=5, help="chains that vote")
    parser.add_argument("--tokens", type=int, default=80, help="most tokens of an answer")
    connect.run(ask, parser.parse_args())
