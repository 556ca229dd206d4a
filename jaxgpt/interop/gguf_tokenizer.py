"""The tokenizer of a GGUF file, as a tokenizer.json.

    tokenizer.ggml.model    "llama": SentencePiece's BPE with scores; "gpt2": byte-level BPE with merges
    tokenizer.ggml.pre      for "gpt2" the name of the pattern that cuts a text into words
    tokenizer.ggml.tokens, .scores, .merges, .token_type, .bos_token_id, .eos_token_id, .add_bos_token, ...
    tokenizer.chat_template in Jinja

Where a file has another kind, or another pattern, a UserError says so: other ids would be worse than none.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data import chat_templates, llama3, tokenizer_json
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import gguf_header, sentencepiece_bpe

PREFIX = "tokenizer.ggml."
# Tokens that a chat template may name, and their names in the keys.
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of tokens
_QWEN = llama3.PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = {"type": "Digits", "individual_digits": True}
_NFC = {"type": "NFC"}
# By tokenizer.ggml.pre: the pattern, or GPT-2's where there is none; what stands before it; and the normaliser.
PATTERNS: dict[str, tuple[str | None, list[dict[str, Any]], dict[str, Any] | None]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (llama3.PATTERN, [], None)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN, [], _NFC)),
    **dict.fromkeys(("default", "gpt-2"), (None, [], None)),
    "smollm": (None, [_DIGITS], None),
}


def read(values: dict[str, Any]) -> Tokenizer | None:
    """Returns the tokenizer, None where the file has none. UserError for one that this version doesn't know."""
    kind = values.get(f"{PREFIX}model")
    if kind is None:
        return None
    tokens = _texts(values, "tokens")
    types = _numbers(values, "token_type", len(tokens), NORMAL)
    special = {int(i): bool(types[i] == CONTROL) for i in np.flatnonzero((types == CONTROL) | (types == USER_DEFINED))}
    begin, end = (_id(values, f"{name}_token_id", len(tokens)) for name in ("bos", "eos"))
    unknown = _id(values, "unknown_token_id", len(tokens))
    special |= {number: True for number in (begin, end) if number is not None}  # old files have no types of tokens
    if kind == b"llama":
        if not values.get(f"{PREFIX}add_bos_token", True):
            begin = None
        scores = _numbers(values, "scores", len(tokens), 0.0)
        unknown = next(iter(np.flatnonzero(types == UNKNOWN).tolist()), None) if unknown is None else unknown
        prefix = bool(values.get(f"{PREFIX}add_space_prefix", True))
        special |= {} if unknown is None else {unknown: True}
        content = sentencepiece_bpe.tokenizer_json(
            tokens, scores.tolist(), special, unknown=unknown, begin=begin, prefix=prefix
        )
    elif kind == b"gpt2":
        if not values.get(f"{PREFIX}add_bos_token", False):
            begin = None
        content = _byte_level(values, tokens, special, begin)
    else:
        raise UserError(f"{PREFIX}model is {shown(kind)}; this version reads llama and gpt2")
    text = json.dumps(content, ensure_ascii=False)
    return HuggingFace(text, end, begin)


def template(values: dict[str, Any]) -> Template | None:
    """Returns the chat template; None where the file has none. UserError where it is damaged."""
    source = values.get("tokenizer.chat_template")
    if not isinstance(source, bytes) or not source:
        return None
    tokens = _texts(values, "tokens")
    ids = {name: _id(values, f"{theirs}_token_id", len(tokens)) for name, theirs in NAMED.items()}
    variables = {name: tokens[number] for name, number in ids.items() if number is not None}
    text = source.decode("utf-8", "replace")
    return chat_templates.from_state({"name": "jinja", "source": text, "variables": variables})


def read_file(path: Path) -> Tokenizer:
    """Returns the tokenizer of a GGUF file. UserError where it has none that this version knows."""
    values = gguf_header.read(path).values
    try:
        tokenizer = read(values)
    except tokenizer_json.MissingPackage:
        raise
    except UserError as error:
        raise UserError(f"{shown(path)}: {error}") from None
    if tokenizer is None:
        raise UserError(f"{shown(path)}: a GGUF file without a tokenizer")
    return tokenizer


def _byte_level(
    values: dict[str, Any], tokens: Sequence[str], special: dict[int, bool], begin: int | None
) -> dict[str, Any]:
    named = values.get(f"{PREFIX}pre", b"default")
    name = named.decode("utf-8", "replace") if isinstance(named, bytes) else str(named)
    if name not in PATTERNS:
        raise UserError(f"{PREFIX}pre is {quoted(name)}; this version reads {', '.join(PATTERNS)}")
    pattern, before, normalizer = PATTERNS[name]
    merges = [merge.split(" ") for merge in _texts(values, "merges")]
    if not all(len(merge) == 2 for merge in merges):
        raise UserError(f"{PREFIX}merges has a merge that isn't two parts with a space between them")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    if pattern:
        before = [*before, {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sentencepiece_bpe.added_tokens(tokens, special),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, level]} if before else level,
        "post_processor": level if begin is None else sentencepiece_bpe.before_text(tokens[begin], begin),
        "decoder": level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
            "ignore_merges": pattern == llama3.PATTERN,
            "vocab": sentencepiece_bpe.vocabulary_of(tokens),
            "merges": merges,
        },
    }


def _texts(values: dict[str, Any], name: str) -> list[str]:
    found = values.get(f"{PREFIX}{name}")
    if not isinstance(found, list):
        raise UserError(f"there is no list of texts {PREFIX}{name}")
    try:
        return [text.decode() for text in found]
    except UnicodeDecodeError:
        raise UserError(f"{PREFIX}{name} has a text that is not UTF-8") from None


def _numbers(values: dict[str, Any], name: str, count: int, default: float) -> np.ndarray:
    found = values.get(f"{PREFIX}{name}", np.full(count, default))
    if not (isinstance(found, np.ndarray) and found.shape == (count,)):
        raise UserError(f"{PREFIX}{name} is no list of {count:,} numbers, one for each token")
    return found


def _id(values: dict[str, Any], name: str, count: int) -> int | None:
    found = values.get(f"{PREFIX}{name}")
    if found is not None and not (type(found) is int and 0 <= found < count):
        raise UserError(f"{PREFIX}{name} is {shown(found)}, and there are {count:,} tokens")
    return found
