"""The chat, from a pipe and from a terminal."""

import io
import os
import re
import signal
import sys

import jax
import numpy as np
import pytest

from jaxgpt.commands import chat, cli, generate
from jaxgpt.data import tokenizers
from jaxgpt.foreign_text import printable
from jaxgpt.generation import batching
from jaxgpt.generation.decoder import Decoder
from jaxgpt.interop import loading
from jaxgpt.models import gpt2
from jaxgpt.options.config import Config, Model, Sampling
from jaxgpt.runs.checkpoints import Trained

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
    """The chat is one text; its oldest tokens are dropped to make room: 26 + 6 are the context."""
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
    """It stays there when the beginning of the chat is dropped, and takes one of the 26 places."""
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


def test_reset_forgets_what_was_said(loaded, answers):
    """The seed goes on, as it does without /reset."""
    out = answers("one\n/reset\ntwo\n", seed=5).splitlines()
    expected = [BYTES.decode(drawn(loaded, line, seed)) for seed, line in ((5, b"one\n"), (6, b"two\n"))]
    assert out == [printable(expected[0]), "Nothing has been said yet.", printable(expected[1])]


def test_exit_ends_and_help_names_every_command(answers):
    assert answers("/exit\none\n") == ""
    out = answers("/help \n/exit \none\n")
    assert [line.split()[0] for line in out.splitlines()][:-1] == ["/help", "/reset", "/exit"] == [*chat.COMMANDS]
    assert "Any other line is for the model" in out


def test_what_looks_like_a_command_and_is_none(loaded, answers, capsys):
    assert answers("/usr/bin\n") == printable(BYTES.decode(drawn(loaded, b"/usr/bin\n", 0))) + "\n"
    assert answers(" /exit not\n")
    assert answers("/exi\n") == ""


def test_an_unknown_command_is_said(loaded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    generate.chat(loaded, OPTIONS, 0)
    assert capsys.readouterr() == ("", "error: there is no command /quit: /help, /reset, /exit are\n")


def test_ctrl_c_ends_the_answer_alone(loaded, answers, monkeypatch):
    """The tokens drawn until then stay part of the chat."""
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
    assert "Ctrl-D ends" in out
    assert printable(BYTES.decode(np.array(drawn(loaded, b"one\n", 0)))) in out
    assert out.count(chat.ASK) == 2


# What texts have to be of, and searching


@pytest.fixture
def generated(loaded, monkeypatch, capsys, tmp_path):
    """A function that runs the command with these options, and returns its status, what it printed, and its errors."""
    monkeypatch.setattr(loading, "load", lambda run, devices: loaded)
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str, str]:
        status = cli.main(["generate", "--run", "here", "--prompt", "ab", "--tokens", "20", *options])
        return status, *capsys.readouterr()

    return run


def test_constrained_texts(generated, tmp_path):
    pytest.importorskip("llguidance", reason="constrains with llguidance, of the serve extra")
    (tmp_path / "s.json").write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}')
    (tmp_path / "g.lark").write_text('start: "x"~2 | "y"~3')
    for option, pattern in (
        (["--json-schema", "s.json"], r"ab\[[12], [12], [12]\]\n"),
        (["--regex", "[a-f]{9}"], r"ab[a-f]{9}\n"),
        (["--grammar", "g.lark"], r"ab(xx|yyy)\n"),
    ):
        for more in ([], ["--best-of", "3"]):
            status, printed, errors = generated(*option, *more)
            assert (status, errors) == (0, "")
            assert re.fullmatch(pattern, printed)
    assert "note: text 1 had --tokens 20 before it was complete" in generated("--regex", "a{30}")[2]


def test_the_best_and_the_likeliest_text(generated, loaded):
    drawn_texts = generated("--samples", "3", "--temperature", "1")[1]
    assert drawn_texts.count("---") == 3
    best = generated("--best-of", "3", "--temperature", "1")[1]
    assert best.removesuffix("\n") in drawn_texts
    greedy = generated("--temperature", "0")
    assert generated("--beams", "1") == greedy
    assert generated("--temperature", "0", "--draft", "here") == greedy
    assert generated("--temperature", "0", "--draft", "here", "--draft-tokens", "7", "--stop", greedy[1][5:7])[1] == (
        greedy[1][: greedy[1].index(greedy[1][5:7], 2)] + "\n"
    )


def test_votes(generated):
    _, printed, _ = generated("--samples", "3", "--temperature", "0", "--vote", "(?s).")
    assert printed.splitlines()[-1].startswith("--- vote: ")
    assert printed.endswith("(3 of 3)\n")
    assert generated("--vote", "never in it")[1].endswith("--- vote: no text has an answer\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a", "--grammar", "g"], "--regex and --grammar don't go together: choose one"),
        (["--beams", "2", "--best-of", "2"], "--best-of and --beams don't go together: choose one"),
        (["--beams", "2", "--regex", "a"], "--beams and --draft know no constraints"),
        (["--draft", "here"], "--draft is for greedy text: give --temperature 0 too"),
        (["--vote", "("], "--vote (: no regular expression"),
        (["--regex", "("], "--regex the grammar can't be followed"),
        (["--json-schema", "missing.json"], "--json-schema missing.json"),
        (["--best-of", "0"], "--best-of is 0"),
        (["--beams", "2", "--tokens", "300"], "the model's context is 32"),
    ],
)
def test_searches_that_cannot_be_done(generated, options, message):
    if "(" in options:
        pytest.importorskip("llguidance", reason="constrains with llguidance, of the serve extra")
    status, _, errors = generated(*options)
    assert status == 2
    assert message in errors


def test_a_draft_of_another_tokenizer(generated, loaded, monkeypatch):
    other = loaded._replace(tokenizer=tokenizers.make("characters", "ab"))
    monkeypatch.setattr(loading, "load", lambda run, devices: other if run == "other" else loaded)
    status, _, errors = generated("--temperature", "0", "--draft", "other")
    assert (status, "take a model of the same tokenizer" in errors) == (2, True)
