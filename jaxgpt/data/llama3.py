"""Llama 3's tokenizer (Grattafiori et al. 2024, arXiv:2407.21783), from the tokenizer.model that Meta publishes.

Each line of the file is a token in base64 and its rank: 128,000 of them. Behind them come 256 special tokens, whose
names stand in Meta's code alone. `encoding` is the tokenizer as tiktoken runs it, and `tokenizer_json` as Hugging
Face's package `tokenizers` does, where a begin-of-text token stands before each text.
"""

import base64
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiktoken

from jaxgpt import files
from jaxgpt.data import encodings
from jaxgpt.environment import cache_folder
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

FILE = "llama3_tokenizer.model"
REPOSITORY = ("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model")
PACKAGE, IN_PACKAGE = "llama_models", ("llama3", "tokenizer.model")  # Meta's own, of the extra `llama3`
LARGEST = 1 << 24  # bytes of the file
RANKS = 128_000
BEGIN_OF_TEXT, END_OF_TEXT = 128_000, 128_001
_NAMED = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"),
)
SPECIAL = tuple(f"<|{name}|>" for name in (*_NAMED, *(f"reserved_special_token_{i}" for i in range(2, 246))))
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def encoding() -> tiktoken.Encoding:
    """Returns the encoding. UserError where the file is missing or wrong."""
    ranks = {token: rank for rank, token in enumerate(read(_find()))}
    special = {name: RANKS + number for number, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def read(path: Path, within: Path | None = None, *, count: int = 0) -> list[bytes]:
    """Returns the tokens of a tokenizer.model by rank, RANKS or `count`. UserError where it isn't Llama 3's."""
    count = count or RANKS
    try:
        lines = [line.partition(b" ") for line in files.read_bytes(path, LARGEST, within).splitlines()]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, _, rank in lines}
    except ValueError as error:
        raise UserError(f"{shown(path)} is not Llama 3's tokenizer.model: {shown(error)}") from None
    tokens = [ranks[rank] for rank in sorted(ranks)]
    if sorted(ranks) != list(range(count)) or len(lines) != count or len(set(tokens)) != count:
        raise UserError(
            f"{shown(path)} is not Llama 3's tokenizer.model: it has {len(lines):,} ranks, not {count:,} different ones"
        )
    if sum(len(token) == 1 for token in tokens) != 256:
        raise UserError(f"{shown(path)} is not Llama 3's tokenizer.model: not each of the 256 bytes is a token")
    return tokens


def tokenizer_json(tokens: Sequence[bytes]) -> dict[str, Any]:
    """Returns the content of the tokenizer.json with these tokens by rank."""
    first = len(tokens)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": first + i, "content": name, **flags, "special": True} for i, name in enumerate(SPECIAL)]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    begin = {"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [begin, a],
        "pair": [begin, a, {"SpecialToken": {"id": SPECIAL[0], "type_id": 1}}, b],
        "special_tokens": {SPECIAL[0]: {"id": SPECIAL[0], "ids": [first], "tokens": [SPECIAL[0]]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "Sequence", "processors": [level, template]},
        "decoder": level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
            "ignore_merges": True,  # a word that is a token is taken whole, also where no merges make it
            "vocab": {encodings.written(token): rank for rank, token in enumerate(tokens)},
            "merges": _merges(tokens),
        },
    }


def _merges(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """Returns all pairs of tokens that make a token, by its rank: tiktoken joins whatever pair makes one."""
    ranks, pairs = {token: rank for rank, token in enumerate(tokens)}, []
    for token in tokens:
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((ranks[left], ranks[right]) for left, right in parts if left in ranks and right in ranks)
        pairs += [(encodings.written(tokens[left]), encodings.written(tokens[right])) for left, right in known]
    return pairs


def _find() -> Path:
    own_folder = os.environ.get("JAXGPT_DATA")
    places = [Path(folder, FILE) for folder in (own_folder, cache_folder()) if folder]
    package = importlib.util.find_spec(PACKAGE)  # found without being imported
    folders = package.submodule_search_locations if package else None
    for path in (*places, *(Path(folder, *IN_PACKAGE) for folder in folders or ())):
        if files.is_file(path):
            return path
    from jaxgpt.data import hub  # here, because it needs an extra that nothing else in this file needs

    try:
        return hub.download(*REPOSITORY, kind="model")
    except UserError as error:
        raise UserError(
            f"{error}. Llama 3's tokenizer is in Meta's package llama-models (make env EXTRAS=llama3). Or accept "
            f"Meta's license at huggingface.co/{REPOSITORY[0]} and set HF_TOKEN, or put the file there as {places[-1]}"
        ) from None
