"""Renders Jinja templates of others in a process of its own, which a bad one can't do harm from.

A chat template comes with a tokenizer from anywhere. It is rendered in jinja2's immutable sandbox with what
transformers gives it. The sandbox keeps it from Python; it doesn't keep it from looping for ever, or from writing
`'a' * 10**10`. So it runs in a process with little memory, which is killed when it takes too long.

    python -m jaxgpt.data.jinja_process     reads requests and writes answers, a line of JSON each
"""

import functools
import json
import os
import selectors
import subprocess
import sys
import threading
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import parse_json, shown

SECONDS = 10.0  # for one conversation
MEMORY = 1 << 30  # bytes
LARGEST = 1 << 26  # characters of an answer


def render(source: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Returns the template's text, and where its `{% generation %}` blocks are in it.

    UserError where the template refuses these variables, can't be parsed, or takes too long.
    """
    return _process().render(source, variables)


@functools.lru_cache(maxsize=1)
def _process() -> "_Process":
    return _Process()


class _Process:
    """The process, started again after it was killed. It ends by itself when this one does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen | None = None

    def render(self, source: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        line = json.dumps([source, variables]).encode() + b"\n"
        with self._lock:
            try:
                answer = parse_json(self._answer(line))
            except (OSError, ValueError) as error:
                self._kill()
                wrong = "takes too long" if isinstance(error, TimeoutError) else "needs too much memory, or failed"
                raise UserError(f"the chat template {wrong}: it is damaged, or not to be trusted") from None
        if "missing" in answer:
            raise UserError("a chat template in Jinja needs the extra `chat`: make env EXTRAS=chat")
        if "error" in answer:
            raise UserError(f"the chat template can't express this: {shown(answer['error'])}")
        return answer["text"], [(start, end) for start, end in answer["spans"]]

    def _answer(self, line: bytes) -> bytes:
        running = self._start()
        assert running.stdin
        assert running.stdout
        running.stdin.write(line)
        running.stdin.flush()
        parts = []
        with selectors.DefaultSelector() as selector:
            selector.register(running.stdout, selectors.EVENT_READ)
            while not parts or not parts[-1].endswith(b"\n"):
                if not selector.select(SECONDS):
                    raise TimeoutError
                parts.append(os.read(running.stdout.fileno(), 1 << 20))
                if not parts[-1]:
                    raise OSError("the process ended")
        return b"".join(parts)

    def _start(self) -> subprocess.Popen:
        if self._running is None or self._running.poll() is not None:
            environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": os.environ.get("PATH", "")}
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._running

    def _kill(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None


# In the process


def main() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    try:
        import jinja2  # noqa: F401
    except ImportError:
        for _ in sys.stdin.buffer:
            _write(answers, {"missing": "jinja2"})
        return
    _limit()
    for line in sys.stdin.buffer:
        _write(answers, _answer(*json.loads(line)))


def _write(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows; the time is limited there too
        return
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _answer(source: str, variables: dict[str, Any]) -> dict[str, Any]:
    try:
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        template = _compiled(source)
        template.environment.written = pieces, spans
        length = 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > LARGEST:
                return {"error": f"its text has more than {LARGEST:,} characters"}
        return {"text": "".join(pieces), "spans": spans}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # jinja2's own, and whatever an expression in it raises
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """Returns the template, in the environment that transformers compiles it in."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}`, around what the assistant is to write."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

        def _noted(self, caller: Any) -> str:
            text = caller()
            pieces, spans = self.environment.written  # type: ignore[attr-defined]
            start = sum(map(len, pieces))
            spans.append((start, start + len(text)))
            return text

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        import datetime

        return datetime.datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
    return environment.from_string(source)


if __name__ == "__main__":
    main()
