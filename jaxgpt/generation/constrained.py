"""Constrained decoding: only tokens are drawn with which a text can still become one of a grammar's.

A grammar is a JSON schema, a regular expression or a grammar in Lark's notation; `llguidance` (extra `serve`) compiles
it, and says for each place of a text which tokens may follow. Then the others' logits are -∞ (`sampling.draw`).

A text ends at the tokenizer's end of text, which is allowed where the text is complete, or where nothing could follow.
A tokenizer without an end of text can't say that a complete text ends: there it ends at the first place where it is
complete. So it does in JSON at the last bracket, whose whitespace is fixed, as `json.dumps` has it: a model that likes
spaces would draw them for ever.

Grammars come from clients. `llguidance` limits the work and memory that one may take, and what it says of a bad one
becomes a UserError.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import parse_json, shown

if TYPE_CHECKING:
    import llguidance

LARGEST_GRAMMAR = 1 << 18  # bytes
NEVER = 0xFF  # a byte that UTF-8 doesn't have; llguidance marks special tokens by it
JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
    "whitespace_pattern": None,
}
# What one text's grammar may take: some 40 MB, and 10 ms for a token.
LIMITS = {
    "max_items_in_row": 500,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Constraint:
    """One text's grammar, and the place in it. `copy` makes the same for another text, from the beginning.

    Attributes:
        at_once: Whether the text ends as soon as it is complete.
        error: Why the text can't go on: its grammar takes too much, or no token of the vocabulary fits; empty so far.
    """

    def __init__(self, vocabulary: "Vocabulary", matcher: "llguidance.LLMatcher", *, at_once: bool):
        self._vocabulary, self._matcher, self.at_once = vocabulary, matcher, at_once
        self._start = matcher.deep_copy()
        self._taken_end = False
        self.error = ""

    def copy(self) -> "Constraint":
        return Constraint(self._vocabulary, self._start.deep_copy(), at_once=self.at_once)

    @property
    def ended(self) -> bool:
        """Is true where the text has ended: nothing can follow, its end of text was drawn, or there is an error."""
        if self.error or self._taken_end:
            return True
        if self._matcher.is_error():
            return False  # then `mask` says so
        return self._matcher.is_stopped() or (self.at_once and self._matcher.is_accepting())

    def mask(self) -> np.ndarray:
        """Returns which of the vocabulary's tokens may follow; where none may there is an error, and all do."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").view(bool)
        said = self._matcher.get_error() if self._matcher.is_error() else ""
        if said and "NoExtension" not in said:
            self.error = f"the grammar takes too much: {_first_line(said)}"
        elif said or not mask.any():
            self.error = (
                "no token of this model's vocabulary goes on with a text of this grammar: ask for one that can be "
                "written in the characters of its tokenizer"
            )
        return np.ones_like(mask) if self.error else mask

    def take(self, token: int) -> None:
        """Goes on behind a token that the mask allows."""
        if token in self._vocabulary.ends:
            self._taken_end = True
        else:
            self._matcher.consume_token(token)


class Vocabulary:
    """A tokenizer's first `size` tokens, as `llguidance` looks for those that fit.

    Args:
        tokenizer: The tokenizer.
        size: How many of its tokens the model has.
        ends: The tokens that end a text. Without one its end is known by the grammar alone.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]):
        library = load_library()
        self.size, self.ends = size, frozenset(end for end in ends if end < size)
        special = {token for token in (tokenizer.end_of_text, tokenizer.begin_of_text) if token is not None}
        special |= tokenizer.special_ids
        tokens = [b"" if NEVER in token or number in special else token for number, token in
                  enumerate(tokenizer.tokens[:size])]  # fmt: skip
        end = sorted(self.ends) or [size]  # one that the model doesn't have
        if not self.ends:
            tokens.append(b"")
        for number in end:
            tokens[number] = b"<|end|>"
        wrapped = library.TokenizerWrapper(_Wrapped(tokens, end, tokenizer))
        self._tokenizer = library.LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=end)

    def json_schema(self, schema: Any, *, lenient: bool = False) -> Constraint:
        """Constrains a text to JSON of a schema, or any object for an empty one.

        UserError where the schema is none, or has keywords that can't be promised. With `lenient` those are passed by.
        """
        if not isinstance(schema, dict):
            raise UserError("a JSON schema is an object")
        return self._compiled(json_grammar(schema, lenient=lenient))

    def regex(self, pattern: str) -> Constraint:
        """Constrains a text to a regular expression, in the syntax of Rust's crate regex. UserError where it's none."""
        return self._compiled(_made("regular expression", "grammar_from_regex", pattern))

    def lark(self, grammar: str, *, open_ended: bool = False) -> Constraint:
        """Constrains a text to a grammar in Lark's notation. UserError where it is none.

        With `open_ended` a complete text goes on, also where the tokenizer has no end of text: a stop text ends it.
        """
        return self._compiled(_made("grammar", "grammar_from_lark", grammar), open_ended=open_ended)

    def _compiled(self, grammar: str, *, open_ended: bool = False) -> Constraint:
        library = load_library()
        matcher = library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise UserError(f"the grammar can't be followed: {_first_line(matcher.get_error())}")
        return Constraint(self, matcher, at_once=not self.ends and not open_ended)


class _Wrapped:
    """A tokenizer as `llguidance` asks of one."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: list[int], tokenizer: Tokenizer):
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, end[0], end
        self._tokenizer = tokenizer
        self._ids = {token: number for number, token in enumerate(tokens) if token and number not in end}
        self._most = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Returns the tokens of a part of a text that can't be another: such a part is drawn in these."""
        if isinstance(text, bytes):
            raise TypeError("texts are encoded")
        with contextlib.suppress(UserError):  # characters that it doesn't have
            ids = self._tokenizer.encode(text).tolist()
            if max(ids, default=0) < len(self.tokens) and b"".join([self.tokens[i] for i in ids]) == text.encode():
                return ids
        return self._longest(text.encode())  # SentencePiece has a space before every text

    def _longest(self, text: bytes) -> list[int]:
        """Returns the longest tokens from the left, as far as there are any."""
        ids, place = [], 0
        while place < len(text):
            lengths = range(min(self._most, len(text) - place), 0, -1)
            found = (self._ids.get(text[place : place + length]) for length in lengths)
            if (token := next((one for one in found if one is not None), None)) is None:
                break
            ids.append(token)
            place += len(self.tokens[token])
        return ids


@functools.lru_cache(maxsize=8)
def vocabulary(tokenizer: Tokenizer, size: int, ends: tuple[int, ...]) -> Vocabulary:
    """Returns the vocabulary of a tokenizer, made once: it takes a second for 100,000 tokens."""
    return Vocabulary(tokenizer, size, ends)


def json_grammar(schema: dict[str, Any], *, lenient: bool = False) -> str:
    """Returns a grammar of JSON of this schema, in `llguidance`'s form."""
    overrides = JSON | {"lenient": lenient, "coerce_one_of": lenient}
    return _made("JSON schema", "grammar_from_json_schema", schema, overrides=overrides)


def _made(called: str, maker: str, given: Any, **options: Any) -> str:
    """Returns a grammar in `llguidance`'s form. UserError where it is too long, or can't be one."""
    try:
        grammar = getattr(load_library().LLMatcher, maker)(given, **options)
    except UnicodeEncodeError:
        raise UserError(f"the {called} has half a surrogate pair, and is not Unicode") from None
    except ValueError as error:
        raise UserError(f"the {called} can't be followed: {_first_line(str(error))}") from None
    if len(grammar) > LARGEST_GRAMMAR:
        raise UserError(f"the {called} is longer than {LARGEST_GRAMMAR:,} characters")
    return grammar


def parse_schema(text: str | bytes) -> dict[str, Any]:
    """Returns the JSON schema in a text. UserError where there is none."""
    try:
        schema = parse_json(text, unique=True)
    except ValueError as error:
        raise UserError(f"the JSON schema is not JSON: {shown(error)}") from None
    if not isinstance(schema, dict):
        raise UserError("the JSON schema is not an object")
    return schema


def load_library() -> Any:
    """Returns the package `llguidance`. UserError where it is missing."""
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "constrained texts need llguidance: make env EXTRAS=serve (or pip install -e '.[serve]') installs it"
        ) from None
    return llguidance


def _first_line(message: str) -> str:
    """Returns the reason in an error of `llguidance`, which goes on with the grammar."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("<non-verbose")]
    reason = next((line for line in lines if line.startswith("error:")), "")  # of a regular expression
    return shown(f"{lines[0]} {reason}".strip() if lines else "no reason is given")
