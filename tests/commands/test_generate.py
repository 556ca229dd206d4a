"""The chat, from a pipe and from a terminal."""

import io
import os
import signal
import sys

import jax
import numpy as np
import pytest

from jaxgpt.commands import chat, generate
from jaxgpt.data import tokenizers
from jaxgpt.foreign_text import printable
from jaxgpt.generation import batching
from jaxgpt.generation.decoder import Decoder
from jaxgpt.models import gpt2
from jaxgpt.options.config import Config, Model, Sampling
from jaxgpt.runs.checkpoints import Trained

pytestmark = pytest.mark.usefixtures("quickly_compiled")

MODEL = Model(layers=1, heads=2, width=16, context=32, vocabulary_size=256)
BYTES = tokenizers.make("bytes", "")
OPTIONS = Sampling(tokens=6, temperature=1.0)


@pytest.fixture(scope="module")
def loaded():
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(0)))
    return Trained(Config(model=MODEL), params, BYTES, {})


@pytest.fixture
def answers(loaded, monkeypatch, capsys):
    """A function that pipes a text into the chat, and returns what it prints."""

    def run(typed: str, options=OPTIONS, seed=0) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        generate.chat(loaded, options, seed)
        return capsys.readouterr().out

    return run


def drawn(loaded, prompt: bytes, seed: int, options=OPTIONS) -> list[int]:
    decoder = Decoder(loaded.params, MODEL, loaded.config.compute, slots=1, capacity=32)
    tokens = [decoder.start(0, list(prompt), options, seed)]
    while len(tokens) < options.tokens:
        tokens += decoder.go_on(options.tokens - len(tokens))[0]
    return tokens


def test_each_answer_goes_on_with_all_that_was_said(loaded, answers):
    """As one text, of which the oldest tokens are forgotten when there would be no room: 26 + 6 are the context."""
    said, expected = b"", ""
    for seed, line in enumerate(("one", "two", "a longer line")):
        said = (said + line.encode() + b"\n")[-26:]
        tokens = drawn(loaded, said, seed + 5)
        said += bytes(tokens)
        expected += printable(BYTES.decode(tokens)) + "\n"
    assert len(said) == 32
    assert answers("one\n\ntwo\na longer line\n", seed=5) == expected  # an empty line is none


def test_more_tokens_than_the_context(answers):
    assert len(answers("x\n", Sampling(tokens=50, temperature=0.0))) >= 50


def test_the_token_before_every_text_stands_before_the_chat_too(loaded, monkeypatch, capsys):
    """Also where its beginning is forgotten: it takes one of the 26 places."""
    tokenizer = tokenizers.make("bytes", "")
    tokenizer.begin_of_text = 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\na longer line\n"))
    generate.chat(loaded._replace(tokenizer=tokenizer), OPTIONS, 5)
    said, expected = b"", ""
    for seed, line in enumerate(("one", "two", "a longer line")):
        said = (said + line.encode() + b"\n")[-25:]
        tokens = drawn(loaded, b"\x01" + said, seed + 5)
        said += bytes(tokens)
        expected += printable(BYTES.decode(tokens)) + "\n"
    assert capsys.readouterr().out == expected


def test_what_cannot_be_encoded_is_said_and_the_chat_goes_on(loaded, monkeypatch, capsys):
    letters = tokenizers.make("characters", "abc\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("abd\nabc\n"))
    generate.chat(loaded._replace(tokenizer=letters), OPTIONS, 0)
    out, err = capsys.readouterr()
    assert "the character 'd'" in err
    assert len(out) == 7


def test_ctrl_c_ends_the_answer_alone(loaded, answers, monkeypatch):
    """What was drawn until then stays said."""
    asked = []

    class Interrupted(batching.ContinuousBatch):
        def add(self, request):
            asked.append(bytes(request.prompt.tolist()))
            return super().add(request)

        def turn(self):
            yield from super().turn()
            if len(asked) == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(batching, "ContinuousBatch", Interrupted)
    answers("one\ntwo\n", Sampling(tokens=15, temperature=0.0))
    assert asked[0] == b"one\n"
    assert asked[1].startswith(b"one\n")
    assert asked[1].endswith(b"two\n")
    assert 0 < len(asked[1]) - len(b"one\ntwo\n") < 15


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_there_is_a_prompt_sign_and_ctrl_d_ends(loaded, monkeypatch, capsys):
    ours, theirs = os.openpty()
    with open(theirs, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(ours, b"one\n\x04")
        generate.chat(loaded, OPTIONS, 0)
    os.close(ours)
    out = capsys.readouterr().out
    assert "Ctrl-D ends." in out
    assert printable(BYTES.decode(np.array(drawn(loaded, b"one\n", 0)))) in out
    assert out.count(chat.ASK) == 2
