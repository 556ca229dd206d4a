"""Continuous batching: texts are drawn side by side, each begins when a slot is free and leaves it when it ends.

A text ends after its number of tokens, before the first of its stop texts, before a token that ends it, or where its
constraint does. What might be the beginning of a stop text is held back until it is known not to be.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from jaxgpt.data.tokenizers import StreamDecoder, Tokenizer
from jaxgpt.errors import RunError, UserError
from jaxgpt.generation.constrained import Constraint
from jaxgpt.generation.decoder import Decoder
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Compute, Model, Sampling

MOST_SLOTS = 8  # texts that `generate` draws side by side


@dataclass(frozen=True)
class Request:
    """A text to draw. The prompt has at least one token.

    Attributes:
        ends: Tokens that end the text, and are not part of it.
        constraint: What the text is to be of; each text gets a copy.
        scored: Whether the log-probabilities of its tokens are wanted.
    """

    prompt: np.ndarray
    sampling: Sampling
    seed: int
    ends: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    scored: bool = False


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


class ScoredToken(NamedTuple):
    """A drawn token: its log-probability, the likeliest tokens at its place, and the characters before it."""

    token: int
    log_probability: float
    likeliest: list[tuple[int, float]]
    offset: int


def end_of_text(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the token that ends a document, for a request's `ends`; none where the tokenizer has none."""
    return frozenset([] if tokenizer.end_of_text is None else [tokenizer.end_of_text])


@dataclass(eq=False)
class Text:
    """A text that is being drawn, or waits for a slot."""

    request: Request
    tokens: list[int] = field(default_factory=list)  # drawn so far
    ended: Literal["", "stop", "length", "failed"] = ""
    error: str = ""  # why it failed
    characters: int = 0  # yielded so far
    scored: list[ScoredToken] = field(default_factory=list)  # tokens of the piece that was yielded last
    held: collections.deque[ScoredToken] = field(default_factory=collections.deque)  # of pieces to come

    def yields(self, piece: str) -> str:
        """Notes that a piece is yielded, and which tokens are in it. Those behind a stop text are in none."""
        self.characters += len(piece)
        everything = self.ended == "length"
        self.scored = []
        while self.held and (everything or self.held[0].offset < self.characters):
            self.scored.append(self.held.popleft())
        return piece


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
        self.decoded = 0  # characters

    def __call__(self, token: int) -> str:
        """Takes the next token; returns the further text that is certain now, since it can't begin a stop text."""
        return self._certain(self._decode(token))

    def finish(self) -> str:
        """Returns the text that was held back, when there are no more tokens."""
        piece = self._certain(self._decode.finish())
        piece, self._held = piece + self._held, ""
        return piece

    def _certain(self, piece: str) -> str:
        self.decoded += len(piece)
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of the text that `stop` begins with, and is longer than."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class ContinuousBatch:
    """Texts in a decoder's slots, and those that wait for one, first come first served."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer):
        self._decoder, self._tokenizer = decoder, tokenizer
        self._waiting: collections.deque[Text] = collections.deque()
        self._running: dict[int, tuple[Text, UntilStop, Constraint | None]] = {}

    def add(self, request: Request) -> Text:
        """Queues a text to be drawn."""
        text = Text(request)
        self._waiting.append(text)
        return text

    def remove(self, text: Text) -> None:
        """Removes a text that nobody wants any more."""
        if text in self._waiting:
            self._waiting.remove(text)
        for slot in [slot for slot, (running, *_) in self._running.items() if running is text]:
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
        most = min(text.request.sampling.tokens - len(text.tokens) for text, *_ in self._running.values())
        for slot, tokens in self._decoder.go_on(most).items():
            yield self._take(slot, tokens)

    def _begin(self, slot: int, text: Text) -> tuple[Text, str]:
        request = text.request
        constraint = request.constraint.copy() if request.constraint else None
        if not request.sampling.tokens or (constraint and constraint.ended):
            text.ended = "stop" if request.sampling.tokens else "length"
            return text, ""
        more = {"constraint": constraint, "scored": request.scored} if constraint or request.scored else {}
        token = self._decoder.start(slot, request.prompt, request.sampling, request.seed, **more)
        self._running[slot] = text, UntilStop(self._tokenizer, request.sampling.stop), constraint
        return self._take(slot, [token])

    def _take(self, slot: int, tokens: list[int]) -> tuple[Text, str]:
        text, decode, constraint = self._running[slot]
        scores = self._decoder.scores(slot)[len(text.tokens) :] if text.request.scored else []
        piece = ""
        for number, token in enumerate(tokens):
            if constraint and constraint.error and number + 1 == len(tokens):
                text.ended, text.error = "failed", constraint.error
                break
            text.tokens.append(token)
            if token in text.request.ends:
                text.ended = "stop"
                break
            if scores:
                text.held.append(ScoredToken(token, *scores[number], decode.decoded))
            piece += decode(token)
            if decode.stopped:
                text.ended = "stop"
                break
        if not text.ended and constraint and constraint.ended:
            text.ended = "stop"
        if not text.ended and len(text.tokens) == text.request.sampling.tokens:
            text.ended = "length"
        if text.ended:
            piece += decode.finish()
            self._leave(slot)
        return text, text.yields(piece)

    def _leave(self, slot: int) -> None:
        del self._running[slot]
        self._decoder.stop(slot)


def generate(
    params: Params,
    requests: Sequence[Request],
    model: Model,
    compute: Compute,
    tokenizer: Tokenizer,
    slots: int = MOST_SLOTS,
) -> Iterator[Piece]:
    """Yields pieces of all the texts as they come, `slots` of them side by side.

    RunError where a constrained one can't go on.
    """
    for number, text, piece in texts(params, requests, model, compute, tokenizer, slots):
        yield Piece(number, piece, bool(text.ended))


def texts(
    params: Params,
    requests: Sequence[Request],
    model: Model,
    compute: Compute,
    tokenizer: Tokenizer,
    slots: int = MOST_SLOTS,
) -> Iterator[tuple[int, Text, str]]:
    """Yields each further piece with its request's number, and the text so far. RunError as `generate`."""
    longest = max(len(request.prompt) + request.sampling.tokens for request in requests)
    model = only_known_tokens(model, tokenizer)
    decoder = Decoder(params, model, compute, slots=min(len(requests), slots), capacity=longest)
    batch = ContinuousBatch(decoder, tokenizer)
    numbers = {id(text): number for number, text in enumerate([batch.add(request) for request in requests])}
    while len(batch):
        for text, piece in batch.turn():
            if text.error:
                raise RunError(f"text {numbers[id(text)] + 1} can't go on: {text.error}")
            yield numbers[id(text)], text, piece
