"""Continuous batching: texts are drawn side by side, each begins when a slot is free and leaves it when it ends.

A text ends after its number of tokens, before the first of its stop texts, or before its tokenizer's end of text where
that is asked for. What might be the beginning of a stop text is held back until it is known not to be.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from jaxgpt.data.tokenizers import StreamDecoder, Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Compute, Model, Sampling

MOST_SLOTS = 8  # texts that `generate` draws side by side


@dataclass(frozen=True)
class Request:
    """A text to draw. The prompt has at least one token."""

    prompt: np.ndarray
    sampling: Sampling
    seed: int
    until_end_of_text: bool = False


def prompt_tokens(prompt: str, tokenizer: Tokenizer, special: bool, called: str) -> np.ndarray:
    """Returns a prompt's tokens, behind the begin-of-text token where the tokenizer has one.

    An empty prompt begins a document: it is that token, or the end-of-text token.

    With `special`, special tokens that the text spells out are taken for the tokens. UserError, which calls the prompt
    `called`, where the tokenizer can't express it, or it is empty and there is no end-of-text token.
    """
    tokens = tokenizer.begin(tokenizer.encode(prompt, special=special))
    if len(tokens):
        return tokens
    if tokenizer.end_of_text is None:
        raise UserError(
            f"{called} is empty, and the tokenizer {tokenizer.name} has no end-of-text token, which would begin a "
            "document: give the text at least one character to begin with"
        )
    return np.array([tokenizer.end_of_text], np.int32)


@dataclass(eq=False)
class Text:
    """A text that is being drawn, or waits for a slot."""

    request: Request
    tokens: list[int] = field(default_factory=list)  # drawn so far
    ended: Literal["", "stop", "length"] = ""


class Piece(NamedTuple):
    """The next piece of the text of request number `number`."""

    number: int
    text: str
    last: bool


class UntilStop:
    """Decodes tokens to text, up to the first of some stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decode, self._stop = StreamDecoder(tokenizer), stop
        self._held = ""
        self.stopped = False

    def __call__(self, token: int) -> str:
        """Takes the next token; returns the further text that is certain now, since it can't begin a stop text."""
        return self._certain(self._decode(token))

    def finish(self) -> str:
        """Returns the text that was held back, when there are no more tokens."""
        piece = self._certain(self._decode.finish())
        piece, self._held = piece + self._held, ""
        return piece

    def _certain(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of the text that `stop` begins with, and is longer than."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class ContinuousBatch:
    """Texts in a decoder's slots, and those that wait for one, first come first served."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer):
        self._decoder, self._tokenizer = decoder, tokenizer
        self._waiting: collections.deque[Text] = collections.deque()
        self._running: dict[int, tuple[Text, UntilStop]] = {}

    def add(self, request: Request) -> Text:
        """Queues a text to be drawn."""
        text = Text(request)
        self._waiting.append(text)
        return text

    def remove(self, text: Text) -> None:
        """Removes a text that nobody wants any more."""
        if text in self._waiting:
            self._waiting.remove(text)
        for slot in [slot for slot, (running, _) in self._running.items() if running is text]:
            self._leave(slot)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def turn(self) -> Iterator[tuple[Text, str]]:
        """Draws some tokens of every text, and yields what they add to it; with the last piece it has `ended`."""
        for slot in self._decoder.free():
            if self._waiting:
                yield self._begin(slot, self._waiting.popleft())
        if not self._running:
            return
        most = min(text.request.sampling.tokens - len(text.tokens) for text, _ in self._running.values())
        for slot, tokens in self._decoder.go_on(most).items():
            yield self._take(slot, tokens)

    def _begin(self, slot: int, text: Text) -> tuple[Text, str]:
        request = text.request
        if not request.sampling.tokens:
            text.ended = "length"
            return text, ""
        token = self._decoder.start(slot, request.prompt, request.sampling, request.seed)
        self._running[slot] = text, UntilStop(self._tokenizer, request.sampling.stop)
        return self._take(slot, [token])

    def _take(self, slot: int, tokens: list[int]) -> tuple[Text, str]:
        text, decode = self._running[slot]
        piece = ""
        for token in tokens:
            text.tokens.append(token)
            ends = text.request.until_end_of_text and token == self._tokenizer.end_of_text
            piece += "" if ends else decode(token)
            if ends or decode.stopped:
                text.ended = "stop"
                break
        if not text.ended and len(text.tokens) == text.request.sampling.tokens:
            text.ended = "length"
        if text.ended:
            piece += decode.finish()
            self._leave(slot)
        return text, piece

    def _leave(self, slot: int) -> None:
        del self._running[slot]
        self._decoder.stop(slot)


def generate(
    params: Params, requests: Sequence[Request], model: Model, compute: Compute, tokenizer: Tokenizer
) -> Iterator[Piece]:
    """Yields pieces of all the texts as they come."""
    longest = max(len(request.prompt) + request.sampling.tokens for request in requests)
    model = only_known_tokens(model, tokenizer)
    decoder = Decoder(params, model, compute, slots=min(len(requests), MOST_SLOTS), capacity=longest)
    batch = ContinuousBatch(decoder, tokenizer)
    numbers = {id(text): number for number, text in enumerate([batch.add(request) for request in requests])}
    while len(batch):
        for text, piece in batch.turn():
            yield Piece(numbers[id(text)], piece, bool(text.ended))
