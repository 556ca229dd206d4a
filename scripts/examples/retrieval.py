"""Retrieval: the passages of a folder of texts that fit a question best stand before it, and the model answers by them.

Passages are paragraphs of .txt and .md files. BM25 (the package bm25s) ranks them by the question's words, the rare
ones above all. The model is told to answer by the passages alone, and each that it was shown is printed with its place.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import bm25s
import connect
import openai
import tools

QUESTION = "How many days has a year?"
SYSTEM = "Answer in one sentence, by the numbered passages alone. If they don't say it, answer: not in the passages."


class Passage(NamedTuple):
    place: str
    text: str


def passages(folder: Path, longest: int) -> list[Passage]:
    """Returns the paragraphs of the folder's texts, each cut to so many characters."""
    return [
        Passage(f"{name}, paragraph {number}", words[:longest])
        for name, text in tools.texts_in(folder)
        for number, paragraph in enumerate(text.split("\n\n"), start=1)
        if (words := " ".join(paragraph.split()))
    ]


def best(texts: list[Passage], question: str, count: int) -> list[Passage]:
    """Returns the passages that fit the question best, the best first; none that shares no word with it."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize([passage.text for passage in texts], show_progress=False), show_progress=False)
    asked = bm25s.tokenize([question], show_progress=False)
    ranked, scores = index.retrieve(asked, k=min(count, len(texts)), show_progress=False)
    return [texts[number] for number, score in zip(ranked[0], scores[0], strict=True) if score > 0]


def answer(client: openai.OpenAI, given: argparse.Namespace) -> None:
    texts = passages(given.folder, given.longest)
    if not texts:
        sys.exit(f"error: {given.folder} has no .txt or .md file with text in it")
    chosen = best(texts, given.question, given.passages)
    for number, passage in enumerate(chosen, start=1):
        connect.show(f"[{number}] {passage.place}", passage.text)
    shown = "\n".join(f"[{number}] {passage.text}" for number, passage in enumerate(chosen, start=1))
    asked = f"{shown or 'No passage was found.'}\n\nQuestion: {given.question}"
    stream = client.chat.completions.create(
        model=given.model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}],
        max_completion_tokens=given.tokens,
        temperature=0,
        seed=given.seed,
        stream=True,
    )
    print("--- answer")
    for event in stream:
        print(connect.visible(event.choices[0].delta.content or ""), end="", flush=True)
    print()


if __name__ == "__main__":
    parser = connect.options(__doc__)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent / "notes", help="folder of texts to look in"
    )
    parser.add_argument("--passages", type=int, default=3, help="passages that the model is shown")
    parser.add_argument("--longest", type=int, default=400, help="characters of a passage")
    parser.add_argument("--tokens", type=int, default=100, help="most tokens of the answer")
    connect.run(answer, parser.parse_args())
