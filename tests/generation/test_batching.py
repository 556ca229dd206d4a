"""Texts from requests: where they end, and in which order they come."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.data import tokenizers
from jaxgpt.generation import batching
from jaxgpt.generation.decoder import Decoder
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Model, Sampling

MODEL = Model(layers=1, heads=2, width=16, context=16, vocabulary_size=256)
BYTES = tokenizers.make("bytes", "")


class Scripted(Decoder):
    """A decoder whose texts go on as they are told to, some tokens at a time."""

    def __init__(self, script: bytes, slots: int, at_once: int):
        self.script, self.at_once = script, at_once
        self.places: list[int | None] = [None] * slots

    def free(self):
        return [slot for slot, place in enumerate(self.places) if place is None]

    def start(self, slot, prompt, sampling, seed):
        self.places[slot] = 1
        return self.script[0]

    def stop(self, slot):
        self.places[slot] = None

    def go_on(self, most=32):
        drawn, count = {}, min(most, self.at_once)
        for slot, place in enumerate(self.places):
            if place is not None:
                drawn[slot] = list(self.script[place : place + count])
                self.places[slot] = place + count
        return drawn


def run(script: str, at_once: int, *options: Sampling, slots: int = 1) -> list[tuple[str, str]]:
    """The whole text of each request, and how it ended."""
    batch = batching.ContinuousBatch(Scripted(script.encode(), slots, at_once), BYTES)
    requests = [batch.add(batching.Request(np.array([65]), option, 0)) for option in options]
    said = {id(text): "" for text in requests}
    while len(batch):
        for text, piece in batch.turn():
            assert said[id(text)] is not None
            said[id(text)] += piece
    return [(said[id(text)], text.ended) for text in requests]


@given(st.text("ab", min_size=1, max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_ends_before_its_first_stop_text(script, stop, data):
    """The result is that of cutting the whole text, however many tokens come at once."""
    at_once = data.draw(st.integers(1, 5))
    places = [place for place in (script.find(text) for text in stop) if place >= 0]
    expected = (script[: min(places)], "stop") if places else (script, "length")
    assert run(script, at_once, Sampling(tokens=len(script), stop=tuple(stop))) == [expected]


def test_what_cannot_be_a_stop_text_any_more_comes_at_once():
    until = batching.UntilStop(BYTES, ("stop",))
    assert [until(token) for token in b"a sto stone"] == [*"a ", "", "", "", "sto ", "", "", "", "ston", "e"]
    assert until.finish() == ""


def test_a_stop_text_of_several_bytes_a_character():
    assert run("naïve — yes", 1, Sampling(tokens=14, stop=("—",))) == [("naïve ", "stop")]


def test_a_half_character_at_the_end_is_replaced():
    assert run("aé", 1, Sampling(tokens=2)) == [("a\ufffd", "length")]


def test_more_requests_than_slots():
    options = [Sampling(tokens=tokens) for tokens in (5, 0, 1, 9, 3)]
    expected = [("x" * option.tokens, "length") for option in options]
    for slots in (1, 2, 5):
        assert run("x" * 9, 4, *options, slots=slots) == expected


def test_a_text_that_nobody_wants_leaves_its_slot():
    batch = batching.ContinuousBatch(Scripted(b"x" * 50, 1, 2), BYTES)
    first, second, third = (batch.add(batching.Request(np.array([65]), Sampling(tokens=9), 0)) for _ in range(3))
    list(batch.turn())
    batch.remove(second)
    batch.remove(first)
    while len(batch):
        list(batch.turn())
    assert (first.ended, second.ended, third.ended) == ("", "", "length")


def test_the_end_of_text_ends_it_where_it_is_asked_for():
    letters = tokenizers.make("characters", "abc")
    letters.end_of_text = 2
    for ends, expected in ((True, ("ab", "stop")), (False, ("abca", "length"))):
        batch = batching.ContinuousBatch(Scripted(bytes([0, 1, 2, 0]), 1, 1), letters)
        text = batch.add(batching.Request(np.array([0]), Sampling(tokens=4), 0, ends=frozenset({2} if ends else ())))
        pieces = ""
        while len(batch):
            pieces += "".join(piece for _, piece in batch.turn())
        assert (pieces, text.ended) == expected


def test_texts_of_a_model_do_not_depend_on_what_is_drawn_beside_them(monkeypatch):
    """Five texts in two slots, and one of them alone."""
    monkeypatch.setattr(batching, "MOST_SLOTS", 2)
    params = jax.tree.map(lambda array: 10 * array, gpt2.init(MODEL, jax.random.key(0)))
    requests = [
        batching.Request(np.arange(65, 66 + seed), Sampling(tokens=2 * seed + 1, temperature=1.0), seed)
        for seed in range(5)
    ]

    def draw(chosen):
        said = [""] * len(chosen)
        for piece in batching.generate(params, chosen, MODEL, Compute(), BYTES):
            said[piece.number] += piece.text
        return said

    assert draw(requests[3:4]) == draw(requests)[3:4]
