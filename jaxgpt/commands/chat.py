"""`run.py generate --chat`: lines that a user types, each of which the model continues.

The model continues everything said so far: what was typed and what was drawn, as one text, each line as it stands. The
beginning of a long text is dropped, so that the drawn tokens fit in the model's context. The model is no trained
assistant: `--stop` says where an answer ends, such as --stop "You:".

Lines are edited with readline where Python has it. Ctrl-C ends an answer, Ctrl-D the chat.
"""

import contextlib
import sys

import numpy as np

from jaxgpt.commands.generate import Loaded
from jaxgpt.data import loader
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import printable
from jaxgpt.generation import batching
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.options.config import Sampling
from jaxgpt.terminal import check_typed, say

ASK = "> "


def chat(loaded: Loaded, options: Sampling, seed: int, *, special: bool = False) -> None:
    """Reads lines until there are no more, and answers each; from a pipe without a prompt sign.

    With `special`, special tokens that a line spells out are encoded as those tokens.
    """
    config, params, tokenizer = loaded
    model = only_known_tokens(config.model, tokenizer)
    decoder = Decoder(params, model, config.compute, slots=1, capacity=model.context)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # a Python without it
            import readline  # noqa: F401  # input() edits lines by it
        say("The model goes on with what you type. Ctrl-C stops an answer, Ctrl-D ends.")
    said: list[int] = []
    while (line := _read(terminal)) is not None:
        try:
            check_typed(line)
            tokens = tokenizer.encode(line + "\n", special=special)
            loader.check_vocabulary(tokens, config.model.vocabulary_size, "what you typed")
        except UserError as error:
            say(f"error: {error}", error=True)
            continue
        said = [*said, *tokens.tolist()]
        said = said[-max(1, model.context - options.tokens) :] if len(said) + options.tokens > model.context else said
        batch = batching.ContinuousBatch(decoder, tokenizer)
        text = batch.add(batching.Request(np.array(said), options, seed))
        _answer(batch, text)
        said += text.tokens
        seed = (seed + 1) % 2**31


def _answer(batch: batching.ContinuousBatch, text: batching.Text) -> None:
    """Draws the text and prints it as it comes; Ctrl-C ends it early."""
    try:
        while len(batch):
            for _, piece in batch.turn():
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
    except KeyboardInterrupt:
        batch.remove(text)
    say()


def _read(terminal: bool) -> str | None:
    """Returns the next line that isn't empty; None at the end of the input."""
    while True:
        try:
            line = input(ASK if terminal else "")
        except EOFError:
            if terminal:
                say()
            return None
        except KeyboardInterrupt:
            if not terminal:
                raise
            say()  # what was being typed is dropped, as shells do
            continue
        if line:
            return line
