"""`run.py generate`: text drawn from a run's newest whole checkpoint, streamed to the terminal."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from jaxgpt import files
from jaxgpt.data import loader
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import printable, shown
from jaxgpt.generation import batching
from jaxgpt.models.blocks import Params
from jaxgpt.options import command_line, settings
from jaxgpt.options.config import Config, Sampling
from jaxgpt.runs import loading
from jaxgpt.terminal import say

LARGEST_PROMPTS = 1 << 21  # bytes of a file of prompts


@dataclass(frozen=True)
class Generate:
    """Draws text from a trained model."""

    run: str
    """The run's folder, such as runs/quickstart."""
    prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="STR")] = ()
    """What the text begins with; given several times, one text for each. Without it, a line break."""
    prompts: str = ""
    """A UTF-8 file with a prompt on each line."""
    samples: int = 1
    """How many texts to draw for each prompt; all are drawn side by side."""
    seed: int = 0
    """Random seed of the first sample; each further one takes the next number."""
    chat: bool = False
    """Read lines from the terminal, or from a pipe, and go on with each, one text from the first line to the last."""
    special: bool = False
    """Take special tokens that a prompt spells out, such as <|endoftext|>, for the tokens and not for characters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


def run(words: list[str]) -> int:
    """Draws text from a trained model, and prints it as it comes."""
    options = command_line.read(Generate, words, "generate")
    if options.chat and (options.prompt or options.prompts or options.samples != 1):
        raise UserError("--chat takes its prompts from what is typed: leave away --prompt, --prompts and --samples")
    check(options.samples, options.seed, options.sampling)
    prompts = [*options.prompt, *(prompts_in(Path(options.prompts)) if options.prompts else [])] or ["\n"]
    loaded = load(Path(options.run))
    if options.chat:
        from jaxgpt.commands import chat  # here: it imports this module

        chat.chat(loaded, options.sampling, options.seed, special=options.special)
    else:
        generate(loaded, prompts, options.samples, options.seed, options.sampling, special=options.special)
    return 0


class Loaded(NamedTuple):
    """A trained model, with its configuration and its tokenizer."""

    config: Config
    params: Params
    tokenizer: Tokenizer


def load(run: Path) -> Loaded:
    """Loads a run's newest whole checkpoint, and names damaged ones on stderr. UserError where none is whole."""
    found = loading.load(run, devices=1)
    for message in found.damaged:
        say(message, error=True)
    return Loaded(found.config, found.params, found.tokenizer)


def check(samples: int, seed: int, options: Sampling) -> None:
    """Raises a UserError for options that nothing can be drawn with."""
    settings.check_number(samples, "", "samples", positive=True)
    settings.check_number(seed, "", "seed")
    settings.check_number(seed + samples - 1, "", "seed")
    settings.check_sampling(options, "")


def generate(
    loaded: Loaded, prompts: Sequence[str], samples: int, seed: int, options: Sampling, *, special: bool = False
) -> None:
    """Prints `samples` texts that begin with each prompt. UserError for a prompt that the model can't take.

    With `special`, special tokens that a prompt spells out are encoded as those tokens.
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
            requests.append(batching.Request(tokens, options, seed + sample))
    for piece in _in_order(titles, batching.generate(params, requests, config.model, config.compute, tokenizer)):
        sys.stdout.write(piece)
        sys.stdout.flush()


def prompts_in(path: Path) -> list[str]:
    """Returns the lines of a file of prompts. UserError where it can't be read, or has an empty line."""
    try:
        lines = files.text_lines(files.read_text(path, LARGEST_PROMPTS))
    except UserError as error:
        raise UserError(f"--prompts {error}") from None
    if not lines or not all(lines):
        where = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
        raise UserError(f"--prompts {shown(path)}: {where}; give one prompt on each line")
    return lines


def encode(prompt: str, tokenizer: Tokenizer, config: Config, special: bool) -> np.ndarray:
    """Returns a prompt's tokens. UserError where there are none, or where the model doesn't know one of them."""
    tokens = batching.prompt_tokens(prompt, tokenizer, special, "--prompt")
    loader.check_vocabulary(tokens, config.model.vocabulary_size, "--prompt")
    return tokens


def _in_order(titles: Sequence[str], pieces: Iterator[batching.Piece]) -> Iterator[str]:
    """Yields texts that are drawn side by side one after the other.

    The first unfinished text is yielded as it comes; those behind it are kept until then.
    """
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
