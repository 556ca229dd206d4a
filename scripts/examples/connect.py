"""Parts that all examples share: their options, a client of the server, and printing what a model wrote."""

import argparse
import os
import sys
from collections.abc import Callable

import openai


def options(described: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the options that every example has."""
    parser = argparse.ArgumentParser(description=(described or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's address")
    parser.add_argument("--model", default="", help="the model's name; empty takes the server's first")
    parser.add_argument("--seed", type=int, default=1, help="random seed of the drawn texts")
    return parser


def run(example: Callable[[openai.OpenAI, argparse.Namespace], None], given: argparse.Namespace) -> None:
    """Runs an example with a client; what the server refuses ends it with one line.

    The key is the environment's OPENAI_API_KEY, for a server that was started with one.
    """
    with openai.OpenAI(base_url=given.url, api_key=os.environ.get("OPENAI_API_KEY") or "none") as client:
        try:
            given.model = given.model or next(iter(client.models.list())).id
            example(client, given)
        except openai.APIConnectionError:
            sys.exit(f"error: there is no server at {given.url}: start one by python run.py serve --run RUN")
        except openai.APIError as error:
            sys.exit(f"error: {visible(error.message)}")


def visible(text: str) -> str:
    """Returns a text in which characters that could command the terminal are written out."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


def show(title: str, text: str) -> None:
    """Prints what a model or a tool said, below a title."""
    print(f"--- {title}\n{visible(text).strip()}", flush=True)
