"""The server's answers in OpenAI's forms, whole and as the events of a stream."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.generation.batching import ScoredToken
from jaxgpt.generation.tool_calls import Call, CallReader

LEAST_LOGPROB = -9999.0  # as OpenAI writes those of tokens that can't come


class Answers(ABC):
    """Puts one request's texts into the form of an endpoint.

    Attributes:
        whole_kind, chunk_kind: The `object` of an answer and of a stream's event.
        prefix: What the answer's id begins with.
    """

    whole_kind: str
    chunk_kind: str
    prefix: str

    @abstractmethod
    def begin(self, number: int) -> dict[str, Any] | None:
        """Returns the choice that begins the stream of text number `number`, if any."""

    @abstractmethod
    def piece(self, number: int, text: str, scored: Sequence[ScoredToken], ended: str) -> dict[str, Any] | None:
        """Returns the choice of a stream for a further piece of a text, if there is anything to say."""

    @abstractmethod
    def whole(self, number: int, text: str, scored: Sequence[ScoredToken], ended: str) -> dict[str, Any]:
        """Returns the choice for a whole text."""


class TextAnswers(Answers):
    """Answers of /v1/completions: `repeated` before each text, and `logprobs` runners-up; -1 for no log-probability."""

    whole_kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, repeated: Sequence[str], logprobs: int):
        self._tokenizer, self._repeated, self._logprobs = tokenizer, repeated, logprobs

    def begin(self, number: int) -> dict[str, Any] | None:
        return self._choice(number, self._repeated[number], (), "") if self._repeated[number] else None

    def piece(self, number: int, text: str, scored: Sequence[ScoredToken], ended: str) -> dict[str, Any] | None:
        return self._choice(number, text, scored, ended) if text or ended else None

    def whole(self, number: int, text: str, scored: Sequence[ScoredToken], ended: str) -> dict[str, Any]:
        return self._choice(number, self._repeated[number] + text, scored, ended)

    def _choice(self, number: int, text: str, scored: Sequence[ScoredToken], ended: str) -> dict[str, Any]:
        logprobs = None if self._logprobs < 0 else self._scores(scored)
        return {"text": text, "index": number, "logprobs": logprobs, "finish_reason": ended or None}

    def _scores(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        name = self._tokenizer
        return {
            "tokens": [token_name(name, one.token) for one in scored],
            "token_logprobs": [_bounded(one.log_probability) for one in scored],
            "top_logprobs": [
                {token_name(name, token): _bounded(logprob) for token, logprob in one.likeliest[: self._logprobs]}
                for one in scored
            ],
            "text_offset": [one.offset for one in scored],
        }


class ChatAnswers(Answers):
    """Answers of /v1/chat/completions.

    Args:
        tokenizer: The tokenizer.
        logprobs: Runners-up of each token; -1 for no log-probability.
        calls: Whether the model may call tools: then calls are taken out of the text.
        texts: The number of texts.
    """

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, logprobs: int, calls: bool, texts: int):
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._readers = [CallReader() if calls else None for _ in range(texts)]

    def begin(self, number: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, number: int, text: str, scored: Sequence[ScoredToken], ended: str) -> dict[str, Any] | None:
        content, calls, called = self._read(number, text, ended)
        if not (content or calls or ended or scored):
            return None
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            first = called - len(calls)
            delta["tool_calls"] = [{"index": first + i} | _call(call) for i, call in enumerate(calls)]
        reason = "tool_calls" if ended == "stop" and called else ended or None
        return {"index": number, "delta": delta, "logprobs": self._scores(scored), "finish_reason": reason}

    def whole(self, number: int, text: str, scored: Sequence[ScoredToken], ended: str) -> dict[str, Any]:
        content, calls, _ = self._read(number, text, ended)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content.strip() or None, "tool_calls": [_call(call) for call in calls]}
        reason = "tool_calls" if ended == "stop" and calls else ended
        return {"index": number, "message": message, "logprobs": self._scores(scored), "finish_reason": reason}

    def _read(self, number: int, text: str, ended: str) -> tuple[str, list[Call], int]:
        """Returns the further content, the further calls, and how many calls there have been."""
        reader = self._readers[number]
        if reader is None:
            return text, [], 0
        content, calls = reader(text, last=bool(ended))
        return content, calls, reader.count

    def _scores(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if self._logprobs < 0:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            written = self._tokenizer.tokens[token]
            text = written.decode("utf-8", "replace")
            return {"token": text, "logprob": _bounded(logprob), "bytes": list(written)}

        return {
            "content": [
                entry(one.token, one.log_probability)
                | {"top_logprobs": [entry(*runner_up) for runner_up in one.likeliest[: self._logprobs]]}
                for one in scored
            ],
            "refusal": None,
        }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""Returns a token's text; where its bytes are no UTF-8, they are written out as OpenAI does: bytes:\xe2\x80."""
    written = tokenizer.tokens[token]
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
