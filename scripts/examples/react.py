"""ReAct: a model thinks, uses a tool, reads what it gave, and goes on until it answers (arXiv:2210.03629).

The model goes on with a text of thoughts, actions and observations. A regular expression constrains each of its steps,
so that even a small model's action is always one that there is; the observation is never the model's own words.
"""

import argparse
import re
from pathlib import Path

import connect
import openai
import tools

QUESTION = "How many days have 3 years and 40 days, where a year has as many days as the notes say?"
# What a step must be, in a syntax that Python and the server both know.
STEP = r"Thought: ([^\n]{1,160})\nAction: (calculate|search|answer)\[([^\[\]\n]{1,80})\]"
PROMPT = """Answer the question in steps. Each has a thought and one action:
calculate[expression], search[words] in a folder of notes, or answer[the answer].

Question: How heavy are 4 crates?
Thought: I need the weight of a crate.
Action: search[crate weight]
Observation: store.txt:2: A crate weighs 12 kg.
Thought: There are 4 of them.
Action: calculate[4 * 12]
Observation: 48
Thought: I know it now.
Action: answer[48 kg]

Question: """


def step(client: openai.OpenAI, given: argparse.Namespace, text: str, number: int) -> re.Match[str] | None:
    """Returns the model's next thought and action; None if its tokens ended before."""
    drawn = client.completions.create(
        model=given.model,
        prompt=text,
        max_tokens=given.tokens,
        temperature=0.3,
        seed=given.seed + number,
        extra_body={"response_format": {"type": "regex", "regex": STEP}},  # beside OpenAI's parameters
    )
    return re.fullmatch(STEP, drawn.choices[0].text)


def act(action: str, argument: str, folder: Path) -> str:
    """Returns a tool's answer."""
    return tools.calculate(argument) if action == "calculate" else tools.search(folder, argument)


def solve(client: openai.OpenAI, given: argparse.Namespace) -> str:
    """Returns the model's answer; empty where it gave none in so many steps."""
    text = f"{PROMPT}{given.question}\n"
    for number in range(given.steps):
        found = step(client, given, text, number)
        if found is None:
            connect.show(f"step {number + 1}", "the model's tokens ended before its action did: give more --tokens")
            return ""
        connect.show(f"step {number + 1}", found[0])
        action, argument = found[2], found[3]
        if action == "answer":
            return argument
        observed = act(action, argument, given.folder)
        connect.show("observation", observed)
        text += f"{found[0]}\nObservation: {observed}\n"
    return ""


def answer(client: openai.OpenAI, given: argparse.Namespace) -> None:
    connect.show("answer", solve(client, given) or f"none in {given.steps} steps")


if __name__ == "__main__":
    parser = connect.options(__doc__)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent / "notes", help="folder of texts to search"
    )
    parser.add_argument("--steps", type=int, default=6, help="most steps that are taken")
    parser.add_argument("--tokens", type=int, default=300, help="most tokens of a step")
    connect.run(answer, parser.parse_args())
