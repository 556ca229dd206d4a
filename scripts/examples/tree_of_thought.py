"""Tree of thought: the model proposes several next steps and judges each, and the best are continued.

At every depth each kept path is continued in `--branches` ways; the model then votes `--votes` times on each new path,
whether it leads to the goal (sure, maybe, impossible); the `--kept` best go on (Yao et al. 2023, arXiv:2305.10601,
breadth first). A regular expression constrains the votes, so that each is one.
"""

import argparse
from typing import NamedTuple

import connect
import openai

GOAL = "Use each of the numbers 4, 9, 10 and 13 once, with + - * /, to reach 24."
VALUES = {"sure": 1.0, "maybe": 0.4, "impossible": 0.0}


class Path(NamedTuple):
    steps: tuple[str, ...] = ()
    score: float = 0.0

    def text(self) -> str:
        return "".join(f"Step {number}: {step}\n" for number, step in enumerate(self.steps, start=1))


def propose(client: openai.OpenAI, given: argparse.Namespace, path: Path) -> list[Path]:
    """Returns the path with each of the further steps that the model proposes; the same step counts once."""
    drawn = client.completions.create(
        model=given.model,
        prompt=f"Goal: {given.goal}\n{path.text()}Step {len(path.steps) + 1}:",
        n=given.branches,
        max_tokens=given.tokens,
        temperature=0.9,
        seed=given.seed,
        stop=["\n"],
    )
    steps = dict.fromkeys(choice.text.strip() for choice in drawn.choices)
    return [Path((*path.steps, step)) for step in steps if step]


def judge(client: openai.OpenAI, given: argparse.Namespace, path: Path) -> Path:
    """Returns the path with the mean of the model's votes on it."""
    words = f"({'|'.join(VALUES)})"
    drawn = client.completions.create(
        model=given.model,
        prompt=f"Goal: {given.goal}\n{path.text()}Can the goal be reached from here (sure, maybe, impossible)? It is ",
        n=given.votes,
        max_tokens=16,
        seed=given.seed,
        extra_body={"response_format": {"type": "regex", "regex": words}},
    )
    return path._replace(score=sum(VALUES.get(choice.text, 0.0) for choice in drawn.choices) / given.votes)


def search(client: openai.OpenAI, given: argparse.Namespace) -> Path:
    """Returns the best path of `--depth` steps, or of fewer where the model proposes no more."""
    kept = [Path()]
    for depth in range(1, given.depth + 1):
        proposed = [longer for path in kept for longer in propose(client, given, path)]
        if not proposed:
            break
        judged = [judge(client, given, path) for path in proposed]
        kept = sorted(judged, key=lambda path: path.score, reverse=True)[: given.kept]
        for path in judged:
            connect.show(f"depth {depth}, {path.score:.2f}{', kept' if path in kept else ''}", path.text())
    return kept[0]


def solve(client: openai.OpenAI, given: argparse.Namespace) -> None:
    best = search(client, given)
    connect.show(f"the best, {best.score:.2f}", best.text() or "no step was proposed")


if __name__ == "__main__":
    parser = connect.options(__doc__)
    parser.add_argument("goal", nargs="?", default=GOAL)
    parser.add_argument("--depth", type=int, default=3, help="steps of a path")
    parser.add_argument("--branches", type=int, default=3, help="steps proposed after each path")
    parser.add_argument("--kept", type=int, default=2, help="paths that are continued")
    parser.add_argument("--votes", type=int, default=3, help="votes on each path")
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of a step")
    connect.run(solve, parser.parse_args())
