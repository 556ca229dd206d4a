"""`run.py generate`: text drawn from a run's newest whole checkpoint, streamed to the terminal.

With `--chat` a user types lines and the model answers each (`chat.py`).
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt import files
from jaxgpt.commands import search
from jaxgpt.commands.chat import chat
from jaxgpt.commands.search import Search
from jaxgpt.data import chat_templates, loader
from jaxgpt.errors import UserError
from jaxgpt.evaluation import reward_model
from jaxgpt.foreign_text import printable, shown
from jaxgpt.generation import batching
from jaxgpt.interop import loading
from jaxgpt.options import checks, command_line
from jaxgpt.options.config import Sampling
from jaxgpt.runs.checkpoints import Trained
from jaxgpt.terminal import say

LARGEST_PROMPTS = 1 << 21  # bytes of a file of prompts


@dataclass(frozen=True)
class Generate:
    """Draws text from a trained model."""

    run: str
    """Folder of a run, such as runs/quickstart, or a checkpoint, such as runs/quickstart/checkpoints/best; or weights
    in another format, such as a Hugging Face folder."""
    prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="STR")] = ()
    """Text to begin with; given several times, one text for each. Without it, a line break."""
    prompts: str = ""
    """UTF-8 file with a prompt on each line."""
    samples: int = 1
    """Number of texts to draw for each prompt; all are drawn side by side."""
    seed: int = 0
    """Random seed of the first sample; each further one takes the next number."""
    chat: bool = False
    """Chat: read lines from the terminal, or from a pipe, and answer each, in the model's chat template if it was
    trained on conversations, and else as one text from the first line to the last."""
    system: str = ""
    """With --chat and a chat template, the system message that the conversation begins with."""
    special: bool = False
    """Read special tokens that a prompt spells out, such as <|endoftext|>, as tokens and not as characters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    search: Annotated[Search, tyro.conf.arg(name="")] = field(default_factory=Search)


def run(words: list[str]) -> int:
    """Draws text from a trained model, and prints it as it comes."""
    options = command_line.read(Generate, words, "generate")
    if options.chat and (options.prompt or options.prompts or options.samples != 1):
        raise UserError("--chat takes its prompts from what is typed: leave away --prompt, --prompts and --samples")
    if options.system and not options.chat:
        raise UserError("--system begins a chat: give --chat too, or leave it away")
    checks.check_number(options.samples, "", "samples", positive=True)
    checks.check_number(options.seed, "", "seed")
    checks.check_number(options.seed + options.samples - 1, "", "seed")
    checks.check_sampling(options.sampling, "")
    search.check(options.search, options.sampling)
    if options.chat and options.search != Search():
        raise UserError("--chat draws one free text after another: leave away what constrains or searches texts")
    prompts = [*options.prompt, *(prompts_in(Path(options.prompts)) if options.prompts else [])] or ["\n"]
    model = loading.load(options.run, devices=1)
    if options.chat:
        chat(model, options.sampling, options.seed, special=options.special, system=options.system)
    else:
        generate(model, prompts, options)
    return 0


def generate(model: Trained, prompts: Sequence[str], options: Generate) -> None:
    """Prints the samples that begin with each prompt. UserError for a prompt that the model can't take."""
    config, tokenizer = model.config, model.tokenizer
    begun = []
    template = model.about["template"] if options.search.reward_model else {}  # which scores answers to questions
    sampling = dataclasses.replace(options.sampling, stop=options.sampling.stop + chat_templates.stops(template))
    for prompt in prompts:
        if template:
            tokens = chat_templates.question(prompt, template, tokenizer)
        else:
            tokens = batching.prompt_tokens(prompt, tokenizer, options.special, "--prompt")
        loader.check_vocabulary(tokens, config.model.vocabulary_size, "--prompt")
        begun.append((prompt, tokens))
    heading = ", ".join(["prompt {0}"] * (len(prompts) > 1) + ["sample {1}"] * (options.samples > 1))
    titles, requests = [], []
    judge = search.Judge(reward_model.load(options.search.reward_model), []) if options.search.reward_model else None
    constraint = search.constraint(options.search, model)
    ends = batching.end_of_text(tokenizer) if constraint else frozenset()
    for number, (prompt, tokens) in enumerate(begun, start=1):
        for sample in range(options.samples):
            above = f"--- {heading.format(number, sample + 1)}\n" if heading else ""
            if judge:
                judge.prompts.append(prompt)
            titles.append(above + printable(prompt) + ("\n" if template else ""))
            requests.append(batching.Request(tokens, sampling, options.seed + sample, ends, constraint))
    texts = [""] * len(requests)
    for piece in _in_order(titles, _noted(texts, search.pieces(model, requests, options.search, judge))):
        sys.stdout.write(piece)
        sys.stdout.flush()
    if options.search.vote:
        for number in range(len(begun)):
            answer = search.votes(texts[number * options.samples :][: options.samples], options.search.vote)
            say(f"--- {f'prompt {number + 1}, ' if len(begun) > 1 else ''}vote: {printable(answer)}")


def _noted(texts: list[str], pieces: Iterator[batching.Piece]) -> Iterator[batching.Piece]:
    """Yields the pieces, and adds each to its text."""
    for piece in pieces:
        texts[piece.number] += piece.text
        yield piece


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
