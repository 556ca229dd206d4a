"""`run.py generate`: text from a run's newest whole checkpoint, streamed to the terminal as `printable` has it."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt import files, settings
from jaxgpt.config import Config, Sampling
from jaxgpt.data import loader
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluation import trained
from jaxgpt.foreign_text import printable, shown
from jaxgpt.generation import texts
from jaxgpt.models import gpt2
from jaxgpt.terminal import say

LARGEST_PROMPTS = 1 << 21  # bytes of a file of them


class Loaded(NamedTuple):
    """What text is drawn from."""

    config: Config
    params: gpt2.Params
    tokenizer: Tokenizer


def load(run: Path) -> Loaded:
    """A run's newest whole checkpoint; damaged ones are named on stderr. UserError where there is none."""
    found = trained.load(run, devices=1)
    for message in found.damaged:
        say(message, error=True)
    return Loaded(found.config, found.params, found.tokenizer)


def check(samples: int, seed: int, options: Sampling) -> None:
    """UserError for options that nothing can be drawn with."""
    settings.check_number(samples, "", "samples", positive=True)
    settings.check_number(seed, "", "seed")
    settings.check_number(seed + samples - 1, "", "seed")
    settings.check_sampling(options, "")


def generate(
    loaded: Loaded, prompts: Sequence[str], samples: int, seed: int, options: Sampling, *, special: bool = False
) -> None:
    """Prints `samples` texts that begin with each prompt. UserError for a prompt that the model can't take.

    `special` takes special tokens that a prompt spells out for the tokens.
    """
    config, params, tokenizer = loaded
    begun = [(prompt, encode(prompt, tokenizer, config, special)) for prompt in prompts]
    headings = [
        *(["prompt {0}"] if len(prompts) > 1 else []),
        *(["sample {1}"] if samples > 1 else []),
    ]
    titles, requests = [], []
    for number, (prompt, tokens) in enumerate(begun, start=1):
        for sample in range(samples):
            heading = ", ".join(headings).format(number, sample + 1)
            titles.append((f"--- {heading}\n" if heading else "") + printable(prompt))
            requests.append(texts.Request(tokens, options, seed + sample))
    for piece in _in_order(titles, texts.generate(params, requests, config.model, config.compute, tokenizer)):
        sys.stdout.write(piece)
        sys.stdout.flush()


def prompts_in(path: Path) -> list[str]:
    """A file's lines. UserError where it can't be read or has an empty one."""
    try:
        lines = files.text_lines(files.read_text(path, LARGEST_PROMPTS))
    except UserError as error:
        raise UserError(f"--prompts {error}") from None
    if not lines or not all(lines):
        where = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
        raise UserError(f"--prompts {shown(path)}: {where}; give one prompt on each line")
    return lines


def encode(prompt: str, tokenizer: Tokenizer, config: Config, special: bool) -> np.ndarray:
    """A prompt's tokens. UserError where there is none, or one that the model doesn't know."""
    tokens = texts.prompt_tokens(prompt, tokenizer, special, "--prompt")
    loader.check_vocabulary(tokens, config.model.vocabulary_size, "--prompt")
    return tokens


def _in_order(titles: Sequence[str], pieces: Iterator[texts.Piece]) -> Iterator[str]:
    """Texts drawn side by side, one after the other: the first unfinished one as it comes, others kept until then."""
    kept = list(titles)
    ended = [False] * len(titles)
    shown = 0
    yield kept[0]
    for piece in pieces:
        kept[piece.number] += printable(piece.text) + ("\n" if piece.last else "")
        ended[piece.number] = piece.last
        if piece.number != shown:
            continue
        yield printable(piece.text)
        while ended[shown]:
            yield "\n"
            shown += 1
            if shown == len(titles):
                break
            yield kept[shown].removesuffix("\n") if ended[shown] else kept[shown]
