"""`run.py generate --chat`: a user types lines, and the model answers each.

A model that was trained on conversations knows its chat template: what was said is put in it, each message in its role,
and the answer ends with the assistant's turn. The oldest messages of a long conversation are dropped, but the system's.

Any other model is no trained assistant. It continues everything said so far: what was typed and what was drawn, as one
text, each line as it stands. The beginning of a long text is dropped, so that the drawn tokens fit in the model's
context. `--stop` says where an answer ends, such as --stop "You:".

A line that is one word behind a slash is a command, such as /help (`COMMANDS`). Lines are edited with readline where
Python has it. Ctrl-C ends an answer, Ctrl-D the chat.
"""

import contextlib
import dataclasses
import re
import sys
from typing import Any

import numpy as np

from jaxgpt.data import chat_templates, loader
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import printable, shown
from jaxgpt.generation import batching
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.options.config import Sampling
from jaxgpt.runs.checkpoints import Trained
from jaxgpt.terminal import check_typed, say

ASK = "> "
COMMANDS = {
    "/help": "shows these lines",
    "/reset": "forgets what was said, but for the system message",
    "/exit": "ends the chat, as Ctrl-D does",
}


def chat(trained: Trained, options: Sampling, seed: int, *, special: bool = False, system: str = "") -> None:
    """Reads lines until there are no more, and answers each; from a pipe without a prompt sign.

    With `special`, special tokens that a line spells out are encoded as those tokens, where there is no chat template.
    """
    config, tokenizer = trained.config, trained.tokenizer
    model = only_known_tokens(config.model, tokenizer)
    room = max(1, model.context - options.tokens)
    state = trained.about.get("template") or {}
    if system and not state:
        raise UserError("--system: the model was not trained on conversations, and has no place for a system message")
    said = _Conversation(tokenizer, room, state, system) if state else _OneText(tokenizer, room, special)
    options = dataclasses.replace(options, stop=options.stop + chat_templates.stops(state))
    decoder = Decoder(trained.params, model, config.compute, slots=1, capacity=model.context)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # a Python without it
            import readline  # noqa: F401  # input() edits lines by it
        does = "answers" if state else "goes on with"
        say(f"The model {does} what you type. Ctrl-C stops an answer, /exit or Ctrl-D ends, /help says more.")
    while (line := _read(terminal)) is not None and line.rstrip() != "/exit":
        if re.fullmatch(r"/[a-z]+ *", line):
            _obey(line.rstrip(), said)
            continue
        try:
            check_typed(line)
            begun = said.add(line)
            loader.check_vocabulary(begun, config.model.vocabulary_size, "what you typed")
        except UserError as error:
            said.forget()
            say(f"error: {error}", error=True)
            continue
        batch = batching.ContinuousBatch(decoder, tokenizer)
        text = batch.add(batching.Request(begun, options, seed))
        said.answered(_answer(batch, text), text.tokens)
        seed = (seed + 1) % 2**31


class _OneText:
    """Keeps what was said as the tokens of one text."""

    def __init__(self, tokenizer: Tokenizer, room: int, special: bool) -> None:
        self._tokenizer, self._room, self._special = tokenizer, room, special
        self._said: list[int] = []
        self._before: list[int] = []

    def add(self, line: str) -> np.ndarray:
        """Adds a line, and returns the tokens to go on from."""
        self._before = self._said
        self._said = self._said + self._tokenizer.encode(line + "\n", special=self._special).tolist()
        begun = self._tokenizer.begin(np.array(self._said))
        if len(begun) > self._room:
            self._said = self._said[-max(1, self._room - (len(begun) - len(self._said))) :]
            begun = self._tokenizer.begin(np.array(self._said))
        return begun

    def reset(self) -> None:
        """Forgets everything."""
        self._said = []

    def forget(self) -> None:
        """Forgets the line that was added last."""
        self._said = self._before

    def answered(self, text: str, tokens: list[int]) -> None:
        """Adds what was drawn."""
        self._said = self._said + tokens


class _Conversation:
    """Keeps what was said as messages in a chat template."""

    def __init__(self, tokenizer: Tokenizer, room: int, state: dict[str, Any], system: str) -> None:
        self._tokenizer, self._room, self._template = tokenizer, room, chat_templates.from_state(state)
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, Any]] = []
        self._before: list[dict[str, Any]] = []

    def add(self, line: str) -> np.ndarray:
        """Adds a question, and returns the tokens up to its answer. UserError where it alone is too long."""
        self._before = self._messages
        self._messages = [*self._messages, {"role": "user", "content": line}]
        while len(begun := self._encoded()) > self._room:
            if len(self._messages) == 1:
                raise UserError(
                    f"this has {len(begun):,} tokens, and with --tokens to draw, {self._room:,} fit in the model's "
                    "context: write less, or draw fewer"
                )
            self._messages = self._messages[2:]  # a question and its answer
        return begun

    def _encoded(self) -> np.ndarray:
        messages = [*self._system, *self._messages]
        return chat_templates.encode(messages, self._template, self._tokenizer, add_generation_prompt=True).ids

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._messages = []

    def forget(self) -> None:
        """Forgets the question that was added last."""
        self._messages = self._before

    def answered(self, text: str, tokens: list[int]) -> None:
        """Adds the answer."""
        self._messages = [*self._messages, {"role": "assistant", "content": text}]


def _answer(batch: batching.ContinuousBatch, text: batching.Text) -> str:
    """Draws the text, prints it as it comes, and returns it; Ctrl-C ends it early."""
    pieces = []
    try:
        while len(batch):
            for _, piece in batch.turn():
                pieces.append(piece)
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
    except KeyboardInterrupt:
        batch.remove(text)
    say()
    return "".join(pieces)


def _obey(command: str, said: _OneText | _Conversation) -> None:
    """Does what a command says; the chat goes on."""
    match command:
        case "/reset":
            said.reset()
            say("Nothing has been said yet.")
        case "/help":
            for name, meaning in COMMANDS.items():
                say(f"{name:<7} {meaning}")
            say("Any other line is for the model; a space before it keeps a word like these from being a command.")
        case _:
            say(f"error: there is no command {shown(command)}: {', '.join(COMMANDS)} are", error=True)


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
