"""What `/v1/completions` is asked for: the body of a request, checked, as texts to draw.

The parameters are OpenAI's (https://platform.openai.com/docs/api-reference/completions), and top_k, min_p and
repetition_penalty beside them. One that would change the answer and isn't there is refused, never passed over.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.config import Sampling
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.generation.texts import Request
from jaxgpt.settings import nearest

MOST_STOP_TEXTS = 4
MOST_STOP_CHARACTERS = 256
SEEDS = 2**31
# Known, and left away or one of these, since anything else can't be done.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    context: int
    """Tokens of prompt and answer together."""
    max_tokens: int
    texts: int


@dataclass(frozen=True)
class Completion:
    """One request's texts, `n` for each prompt in turn, and how they are to be sent."""

    requests: Sequence[Request]
    prompts: Sequence[str]  # what to repeat before each text: empty without `echo`
    prompt_tokens: int  # of all prompts, each counted once
    stream: bool
    include_usage: bool


def completion(body: Any, name: str, tokenizer: Tokenizer, vocabulary_size: int, limits: Limits) -> Completion:
    """The request that a JSON body makes of the model called `name`. ApiError where it can't be answered."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    take = _Taker(body)
    model = take("model", str, None)
    if model != name:
        raise ApiError(404, f"there is no model {_short(model)}: it is {name!r}", param="model", code="model_not_found")
    max_tokens = take.number("max_tokens", int, 16, 0, limits.max_tokens)
    prompts = _prompts(take("prompt", (str, list), None), tokenizer, vocabulary_size)
    n = take.number("n", int, 1, 1, limits.texts)
    if n * len(prompts) > limits.texts:
        raise ApiError(400, f"{n} texts for {len(prompts)} prompts are more than {limits.texts} at once", param="n")
    for tokens in prompts:
        if len(tokens) + max_tokens > limits.context:
            raise ApiError(
                400,
                f"the prompt's {len(tokens)} tokens and max_tokens, {max_tokens}, are more than the model's context of "
                f"{limits.context} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
    sampling = Sampling(
        tokens=max_tokens,
        temperature=float(take.number("temperature", float, 1.0, 0, 2)),
        top_k=take.number("top_k", int, 0, 0, 2**31 - 1),
        top_p=float(take.number("top_p", float, 1.0, 0, 1)) or 1e-6,  # 0 is the likeliest alone
        min_p=float(take.number("min_p", float, 0.0, 0, 1)),
        repetition_penalty=float(take.number("repetition_penalty", float, 1.0, 0.01, 100)),
        stop=_stop(take("stop", (str, list), [])),
    )
    seed = take.number("seed", int, None, 0, SEEDS - 1)
    first = secrets.randbelow(SEEDS) if seed is None else seed
    stream, echo = take("stream", bool, False), take("echo", bool, False)
    include_usage = bool(take("stream_options", dict, {}).get("include_usage"))
    take("user", str, "")
    for key, allowed in NOT_OFFERED.items():
        if take(key, object, None) not in allowed:
            raise ApiError(400, f"{key} is not offered: leave it away", param=key, code="unsupported_parameter")
    take.refuse_others()
    requests = [
        Request(tokens, sampling, (first + number) % SEEDS, until_end_of_text=True)
        for tokens in prompts
        for number in range(n)
    ]
    repeated = [tokenizer.decode(request.prompt) if echo else "" for request in requests]
    return Completion(requests, repeated, sum(map(len, prompts)), stream, include_usage)


class _Taker:
    """Takes parameters out of a body, each with its type checked."""

    def __init__(self, body: dict[str, Any]):
        self._body = dict(body)
        self._known: list[str] = []

    def __call__(self, key: str, kind: Any, default: Any) -> Any:
        self._known.append(key)
        value = self._body.pop(key, None)
        if value is None:
            if default is None and key in ("model", "prompt"):
                raise ApiError(400, f"{key} is missing", param=key)
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise ApiError(400, f"{key} is {_short(value)}, which is of the wrong type", param=key)
        return value

    def number(self, key: str, kind: type, default: Any, least: float, most: float) -> Any:
        value = self(key, int if kind is int else (int, float), default)
        if value is not None and not least <= value <= most:  # NaN too
            raise ApiError(400, f"{key} is {_short(value)}, and must be from {least} to {most}", param=key)
        return value

    def refuse_others(self) -> None:
        for key in self._body:
            raise ApiError(
                400, f"unknown parameter {_short(key)}{nearest(key, self._known)}", param=key, code="unknown_parameter"
            )


def _prompts(value: str | list, tokenizer: Tokenizer, vocabulary_size: int) -> list[np.ndarray]:
    """A text, texts, tokens, or lists of tokens: the tokens of each prompt."""
    values = [value] if isinstance(value, str) or (value and all(map(_is_token, value))) else value
    if not values:
        raise ApiError(400, "prompt is empty", param="prompt")
    return [_tokens(value, tokenizer, vocabulary_size) for value in values]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(value: Any, tokenizer: Tokenizer, vocabulary_size: int) -> np.ndarray:
    size = min(vocabulary_size, tokenizer.vocabulary_size)
    if isinstance(value, str):
        try:
            tokens = tokenizer.encode(value)
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from None
    elif isinstance(value, list) and all(map(_is_token, value)) and all(0 <= token < size for token in value):
        tokens = np.array(value, np.int32)
    else:
        raise ApiError(
            400, f"prompt must be text, a list of texts, or lists of tokens from 0 to {size - 1}", param="prompt"
        )
    if not len(tokens):
        raise ApiError(400, "prompt is empty: give it at least one token", param="prompt")
    if tokens.max() >= size:
        raise ApiError(400, f"prompt has a token that the model doesn't know: {tokens.max()}", param="prompt")
    return tokens


def _stop(value: str | list) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    fits: Callable[[Any], bool] = lambda text: isinstance(text, str) and 0 < len(text) <= MOST_STOP_CHARACTERS  # noqa: E731
    if len(texts) > MOST_STOP_TEXTS or not all(map(fits, texts)):
        raise ApiError(
            400,
            f"stop must be a text, or up to {MOST_STOP_TEXTS} texts, of 1 to {MOST_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(texts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
