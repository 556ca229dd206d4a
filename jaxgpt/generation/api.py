"""Requests to `/v1/completions`: a request's body is checked and becomes texts to draw.

The parameters are OpenAI's (https://platform.openai.com/docs/api-reference/completions), and top_k, min_p,
repetition_penalty and response_format besides. A parameter that would change the answer and isn't offered is refused,
never ignored. `chat_api.py` has those of `/v1/chat/completions`.
"""

import functools
import itertools
import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import parse_json, quoted, shown
from jaxgpt.generation import constrained
from jaxgpt.generation.answers import Answers, TextAnswers
from jaxgpt.generation.batching import Request, end_of_text, prompt_tokens
from jaxgpt.generation.constrained import Constraint
from jaxgpt.options.command_line import nearest
from jaxgpt.options.config import Sampling

MOST_STOP_TEXTS = 4
MOST_LOGPROBS = 5  # of /v1/completions
MOST_STOP_CHARACTERS = 256
MOST_PARTS = 1000  # names and values of a body, beside the tokens of its prompts
LONGEST_NAME = 60  # characters of what isn't known that are shown
LEAST_SEED, MOST_SEED = -(2**63), 2**63 - 1
ANY_SEED = -1  # the same as no seed
# Parameters that are known and not offered, with the values that they may have: those change nothing.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}


Made = TypeVar("Made")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form; `retry_after` is in seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Returns the body of the answer, a JSON object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def rendered(value: dict[str, Any]) -> bytes:
    """Returns a value as JSON in ASCII, which can express any text: half a surrogate pair too."""
    return json.dumps(value, allow_nan=False).encode("ascii")


@dataclass(frozen=True)
class Limits:
    """Limits on one request."""

    context: int  # tokens of prompt and answer together
    max_tokens: int
    texts: int


@dataclass(frozen=True)
class Served:
    """The model that requests are for."""

    name: str
    tokenizer: Tokenizer
    vocabulary_size: int
    limits: Limits
    beside: tuple[str, ...] = ()  # names of the other models of the same server

    def constraint(self, wanted: Any, ends: frozenset[int]) -> Constraint | None:
        """Returns what a `response_format` asks for; None where it is any text. ApiError where it can't be promised.

        Beside OpenAI's types there are {"type": "regex", "regex": ...} and {"type": "grammar", "grammar": ...}.
        """
        take = Taker(wanted or {})
        kind = take("type", str, "text")
        if kind == "text":
            return None
        vocabulary = self.vocabulary(ends)
        make: Callable[[Any], Constraint]
        given: Any
        match kind:
            case "json_object":
                make, given = vocabulary.json_schema, {"type": "object"}
            case "json_schema":
                make, given = vocabulary.json_schema, Taker(take("json_schema", dict, {}))("schema", dict, None)
            case "regex":
                make, given = vocabulary.regex, take("regex", str, None)
            case "grammar":
                make, given = vocabulary.lark, take("grammar", str, None)
            case _:
                known = "text, json_object, json_schema, regex or grammar"
                raise ApiError(400, f"response_format has type {quoted(kind)}: take {known}", param="response_format")
        if given is None:
            raise ApiError(400, f"response_format says no {kind.removeprefix('json_')}", param="response_format")
        return promised("response_format", lambda: make(given))

    def vocabulary(self, ends: frozenset[int]) -> constrained.Vocabulary:
        key = tuple(sorted(ends))
        return promised("response_format", lambda: constrained.vocabulary(self.tokenizer, self.vocabulary_size, key))


def promised(param: str, make: Callable[[], Made]) -> Made:
    """Returns what is made. ApiError in the place of its UserError."""
    try:
        return make()
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


# A JSON text's strings, numbers and words, and what opens a list or an object.
_PARTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|$)|[\[{]|[^\s",:\[\]{}]++', re.DOTALL)


def read(body: bytes, limits: Limits) -> Any:
    """Returns the JSON value of a body. ApiError where it has none, or more parts than any request with an answer.

    The parts are counted before Python's parser, for which all threads wait, makes that many objects of them.
    """
    most = MOST_PARTS + limits.texts * limits.context
    if next(itertools.islice(_PARTS.finditer(body), most, None), None):
        raise ApiError(400, f"the body has more than {most} values")
    try:
        return parse_json(body, unique=True)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {shown(error)}") from None


@dataclass(frozen=True)
class Asked:
    """One request's texts, and how they are to be sent.

    Attributes:
        requests: `n` for each prompt in turn, or `best_of`, of which only the likeliest are sent.
        answers: What puts them in OpenAI's form.
        prompt_tokens: The number of all prompts' tokens, each prompt's counted once.
        n: How many are sent for each prompt.
        best_of: How many are drawn for each prompt.
    """

    requests: Sequence[Request]
    answers: Answers
    prompt_tokens: int
    stream: bool
    include_usage: bool
    n: int
    best_of: int


def check_model(take: "Taker", served: Served) -> None:
    """Raises an ApiError where the request is for another model."""
    model = take("model", str, None)
    if model is None:
        raise ApiError(400, "model is missing", param="model")
    if model != served.name:
        names = " or ".join(quoted(name) for name in (served.name, *served.beside))
        said = f"there is no model {quoted(model)}: it is {names}"
        raise ApiError(404, said, param="model", code="model_not_found")


def completion(body: Any, served: Served) -> Asked:
    """Returns what a JSON body asks of the model. ApiError where it can't be answered."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    take, tokenizer, limits = Taker(body), served.tokenizer, served.limits
    check_model(take, served)
    max_tokens = take.number("max_tokens", int, min(16, limits.max_tokens), 0, limits.max_tokens)
    values = _prompt_values(take("prompt", (str, list), ""))
    stream, echo = take("stream", bool, False), take("echo", bool, False)
    n = take.number("n", int, 1, 1, limits.texts)
    best_of = take.number("best_of", int, n, n, n if stream else limits.texts)
    if best_of * len(values) > limits.texts:
        many = f"{best_of} texts for each of {len(values)} prompts are more than {limits.texts} at once"
        raise ApiError(400, many, param="n" if len(values) <= limits.texts else "prompt")
    special = take("allow_special", bool, False)
    most = limits.context - max_tokens
    prompts = [_tokens(value, tokenizer, served.vocabulary_size, special, most) for value in values]
    logprobs = take.number("logprobs", int, -1, -1 if body.get("logprobs") is None else 0, MOST_LOGPROBS)
    if echo and logprobs >= 0:
        raise ApiError(400, "logprobs of an echoed prompt are not offered: leave echo away", param="logprobs")
    sampling, first = take.sampling(max_tokens), take.seed()
    ends = end_of_text(tokenizer)
    constraint = served.constraint(take("response_format", dict, None), ends)
    include_usage = take.include_usage()
    take.refuse_others()
    scored = logprobs >= 0 or best_of > n
    requests = [
        Request(tokens, sampling, first + number, ends, constraint, scored)
        for tokens in prompts
        for number in range(best_of)
    ]
    repeated = [
        tokenizer.prompt_text(tokens) if echo and len(value) else ""
        for value, tokens in zip(values, prompts, strict=True)
        for _ in range(n)
    ]
    answers = TextAnswers(tokenizer, repeated, logprobs)
    return Asked(requests, answers, sum(map(len, prompts)), stream, include_usage, n, best_of)


class Taker:
    """Takes parameters out of a body, each with its type checked."""

    def __init__(self, body: dict[str, Any]):
        self._body = dict(body)
        self._known: list[str] = []

    def __call__(self, key: str, kind: Any, default: Any) -> Any:
        self._known.append(key)
        value = self._body.pop(key, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise ApiError(400, f"{key} is {quoted(value)}, which is of the wrong type", param=key)
        return value

    def number(self, key: str, kind: type, default: Any, least: float, most: float) -> Any:
        value = self(key, int if kind is int else (int, float), default)
        if not least <= value <= most:  # NaN too
            raise ApiError(400, f"{key} is {quoted(value)}, and must be from {least} to {most}", param=key)
        return value

    def sampling(self, tokens: int) -> Sampling:
        return Sampling(
            tokens=tokens,
            temperature=float(self.number("temperature", float, 1.0, 0, 2)),
            top_k=self.number("top_k", int, 0, 0, 2**31 - 1),
            top_p=float(self.number("top_p", float, 1.0, 0, 1)),
            min_p=float(self.number("min_p", float, 0.0, 0, 1)),
            repetition_penalty=float(self.number("repetition_penalty", float, 1.0, 0.01, 100)),
            stop=_stop(self("stop", (str, list), [])),
        )

    def seed(self) -> int:
        """Returns the first text's seed: one at random where none is named."""
        seed = self.number("seed", int, ANY_SEED, LEAST_SEED, MOST_SEED)
        return secrets.randbits(63) if seed == ANY_SEED else seed

    def include_usage(self) -> bool:
        return Taker(self("stream_options", dict, {}))("include_usage", bool, False)

    def refuse_others(self) -> None:
        """Raises an ApiError where there is a parameter that wasn't taken, and isn't one that changes nothing."""
        self("user", str, "")
        for key, allowed in NOT_OFFERED.items():
            value = self(key, object, None)
            if isinstance(value, bool) or value not in allowed:
                raise ApiError(400, f"{key} is not offered: leave it away", param=key, code="unsupported_parameter")
        for key in self._body:
            name = shown(key, LONGEST_NAME)
            near = nearest(key, self._known) if len(key) <= LONGEST_NAME else "."
            raise ApiError(400, f"unknown parameter '{name}'{near}", param=name, code="unknown_parameter")


def _prompt_values(value: str | list) -> list[str | list]:
    """Returns the prompts, each a text or a list of tokens, of a text, texts, tokens, or lists of tokens."""
    if isinstance(value, list) and not value:
        raise ApiError(400, "prompt is empty", param="prompt")
    return [value] if isinstance(value, str) or all(map(_is_token, value)) else value


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(value: Any, tokenizer: Tokenizer, vocabulary_size: int, special: bool, most: int) -> np.ndarray:
    """Returns a prompt's tokens. ApiError where it is no text and no tokens, or has tokens that the model doesn't know.

    So too for more than `most` tokens, which is known of a very long text before it is encoded.
    """
    size = min(vocabulary_size, tokenizer.vocabulary_size)
    if isinstance(value, (str, list)) and len(value) > most * (_longest(tokenizer) if isinstance(value, str) else 1):
        kind = "characters" if isinstance(value, str) else "tokens"
        raise _too_long(f"{len(value)} {kind}", most)
    if isinstance(value, list) and all(_is_token(token) and 0 <= token < size for token in value) and value:
        return np.array(value, np.int32)
    if not (isinstance(value, str) or value == []):
        wanted = f"text, a list of texts, or lists of tokens from 0 to {size - 1}"
        raise ApiError(400, f"prompt must be {wanted}", param="prompt")
    try:
        tokens = prompt_tokens(value if isinstance(value, str) else "", tokenizer, special, "it")
    except UserError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from None
    if tokens.max() >= size:
        raise ApiError(400, f"prompt has a token that the model doesn't know: {tokens.max()}", param="prompt")
    if len(tokens) > most:
        raise _too_long(f"{len(tokens)} tokens", most)
    return tokens


def _too_long(what: str, most: int) -> ApiError:
    message = f"the prompt's {what} are too many: the model's context leaves {most} tokens beside max_tokens"
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


@functools.lru_cache(maxsize=4)
def _longest(tokenizer: Tokenizer) -> int:
    """Returns the bytes of the longest token: no token has more characters."""
    return max(map(len, tokenizer.tokens))


def _stop(value: str | list) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    fit = (isinstance(text, str) and 0 < len(text) <= MOST_STOP_CHARACTERS for text in texts)
    if len(texts) > MOST_STOP_TEXTS or not all(fit):
        wanted = f"a text, or up to {MOST_STOP_TEXTS} texts, of 1 to {MOST_STOP_CHARACTERS} characters"
        raise ApiError(400, f"stop must be {wanted}", param="stop")
    return tuple(texts)
