"""Constrained texts of random models: always of the grammar, whatever the tokenizer and however they are drawn."""

import json
import random
import re

import jax
import numpy as np
import pytest

from jaxgpt.data import tokenizers
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.errors import RunError, UserError
from jaxgpt.generation import batching, constrained
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Model, Sampling
from tests.data import foreign_tokenizers
from tests.generation import schemas
from tests.nightly import nightly

pytest.importorskip("llguidance", reason="constrains with llguidance, of the serve extra")


CHARACTERS = "".join(sorted({chr(code) for code in range(32, 127)} | set("\nïöß")))
KINDS = {
    "bytes": lambda: tokenizers.make("bytes", ""),
    "characters": lambda: tokenizers.make("characters", CHARACTERS),
    "gpt2": lambda: tokenizers.make("gpt2", ""),
    "huggingface, byte level": lambda: HuggingFace(foreign_tokenizers.file_of(foreign_tokenizers.of_llama3)),
    "huggingface, SentencePiece": lambda: HuggingFace(foreign_tokenizers.file_of(foreign_tokenizers.of_llama2)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
SAMPLING = Sampling(tokens=1500, temperature=1.0)


class Drawing:
    """A random model of a tokenizer's vocabulary."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, size: int = 0):
        self.tokenizer = tokenizer
        self.model = Model(layers=1, heads=1, width=8, context=128, vocabulary_size=size or tokenizer.vocabulary_size)
        self.params = jax.tree.map(lambda array: 10 * array, gpt2.init(self.model, jax.random.key(0)))
        self.ends = batching.end_of_text(tokenizer)
        self.vocabulary = constrained.vocabulary(tokenizer, self.model.vocabulary_size, tuple(self.ends))

    def texts(self, constraints, sampling=SAMPLING) -> list[str]:
        prompt = np.array([self.model.vocabulary_size // 2], np.int32)
        requests = [
            batching.Request(prompt, sampling, seed, self.ends, constraint)
            for seed, constraint in enumerate(constraints)
        ]
        said = [""] * len(requests)
        for piece in batching.generate(self.params, requests, self.model, Compute(), self.tokenizer):
            said[piece.number] += piece.text
        return said


@pytest.fixture(scope="module")
def drawing():
    made: dict[str, Drawing] = {}

    def of(kind):
        if kind not in made:
            made[kind] = Drawing(KINDS[kind]())
        return made[kind]

    return of


def check_schemas(drawing: Drawing, count: int, seed: int) -> None:
    choose = random.Random(seed)
    made = [schemas.whole(choose) for _ in range(count)]
    texts = drawing.texts([drawing.vocabulary.json_schema(one.schema) for one in made])
    for one, text in zip(made, texts, strict=True):
        assert one.fits(json.loads(text)), (one.schema, text)


@pytest.mark.parametrize("kind", nightly(KINDS, every_time=["bytes", "huggingface, byte level"]))
def test_texts_fit_their_schemas(drawing, kind):
    check_schemas(drawing(kind), 10, seed=0)


@pytest.mark.slow
@kinds
def test_texts_fit_a_thousand_schemas(drawing, kind):
    for seed in range(1, 5):
        check_schemas(drawing(kind), 50, seed)


@kinds
@pytest.mark.parametrize(
    "pattern", ["[a-f]{20}", "(red|green|blue)(, (red|green|blue)){2}", "x{3}é?y", "[0-9]{1,9}\\.[0-9]{2}"]
)
def test_texts_match_their_expressions(drawing, kind, pattern):
    if kind == "characters" and "é" in pattern:
        pattern = pattern.replace("é", "ö")
    vocabulary = drawing(kind).vocabulary
    texts = drawing(kind).texts([vocabulary.regex(pattern)] * 3, Sampling(tokens=400, temperature=1.0))
    assert all(re.fullmatch(pattern, text) for text in texts), texts


@kinds
def test_texts_are_of_their_grammars(drawing, kind):
    grammar = 'start: sum\nsum: part ("+" part)~1..3\npart: /[0-9]{1,3}/ | "(" sum ")"'
    greedy = Sampling(tokens=1000, temperature=0.0, repetition_penalty=1.5)
    for sampling in (Sampling(tokens=1000, temperature=1.0, top_k=5, min_p=0.01), greedy):
        for text in drawing(kind).texts([drawing(kind).vocabulary.lark(grammar)] * 4, sampling):
            assert re.fullmatch(r"[0-9()+]+", text)
            assert isinstance(eval(re.sub(r"\b0+(?=[0-9])", "", text)), int)


def test_a_copy_begins_anew_and_a_text_goes_on_beyond_the_context(drawing):
    """128 tokens are the context."""
    bytes_ = drawing("bytes")
    constraint = bytes_.vocabulary.regex("(ab|cd){200}")
    assert all(re.fullmatch("(ab|cd){200}", text) for text in bytes_.texts([constraint] * 3))


def test_special_tokens_are_no_characters_of_a_text(drawing):
    """Even where a string may have any character, tokens with such names can't be drawn."""
    for kind in ("gpt2", "huggingface, byte level"):
        vocabulary = drawing(kind).vocabulary
        tokenizer = drawing(kind).tokenizer
        bits = vocabulary.regex("(?s:.){9}").mask()
        assert not bits[sorted(tokenizer.special_ids)].any()
        assert bits.sum() > 100


def test_a_model_with_fewer_tokens_than_its_tokenizer(drawing):
    """Its mask has none that it doesn't have."""
    tokenizer = tokenizers.make("gpt2", "")
    few = Drawing(tokenizer, 300)
    assert all(re.fullmatch("[a-z]{9}", text) for text in few.texts([few.vocabulary.regex("[a-z]{9}")] * 2))


def test_a_grammar_that_the_characters_cannot_write_is_said(drawing):
    letters = Drawing(tokenizers.make("characters", "ab"))
    assert letters.texts([letters.vocabulary.regex("a|x")]) == ["a"]
    with pytest.raises(RunError, match="no token of this model's vocabulary goes on"):
        letters.texts([letters.vocabulary.regex("bx")])


def test_a_grammar_that_takes_too_much_is_said(drawing):
    bytes_ = drawing("bytes")
    for make, grammar in (
        (bytes_.vocabulary.regex, "((a{1000}){1000}){1000}"),
        (bytes_.vocabulary.json_schema, {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    ):
        with pytest.raises(RunError, match="the grammar takes too much"):
            bytes_.texts([make(grammar)])


@pytest.mark.parametrize(
    ("kind", "grammar", "message"),
    [
        ("json_schema", [], "a JSON schema is an object"),
        ("json_schema", {"type": "nonsense"}, "Invalid type: nonsense"),
        ("json_schema", {"enum": []}, "Unsatisfiable schema"),
        ("json_schema", {"uniqueItems": True, "type": "array"}, "Unimplemented keys"),
        ("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported"),
        ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ("json_schema", {"$ref": "http://127.0.0.1/a"}, "does not fetch"),
        ("json_schema", {"enum": ["x" * 300_000]}, "the JSON schema is longer than"),
        ("regex", "(", "the grammar can't be followed"),
        ("regex", "(?=a)b", "the grammar can't be followed"),
        ("regex", "(" * 100_000, "the grammar can't be followed"),
        ("regex", "\ud800", "half a surrogate pair"),
        ("lark", "start: foo", "unknown name"),
        ("lark", "start: " + "(" * 10_000, "too deeply nested"),
        ("lark", "%import /etc/passwd", "the grammar can't be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(drawing, kind, grammar, message):
    with pytest.raises(UserError) as raised:
        getattr(drawing("bytes").vocabulary, kind)(grammar)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "not an object"), ('{"a":1,"a":2}', "twice")])
def test_a_file_without_a_schema(text, message):
    with pytest.raises(UserError, match=message):
        constrained.parse_schema(text)
