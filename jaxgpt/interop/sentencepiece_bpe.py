"""The tokenizer.json of SentencePiece's BPE (Kudo and Richardson 2018, arXiv:1808.06226): pieces with scores.

llama.cpp and llama2.c keep the pieces of Llama 2's tokenizer and their scores, and of all pairs of neighbours that make
a piece they join the one of the highest score first. The package `tokenizers` joins pairs in the order of a list. So
the list has each pair that makes a piece, by the piece's score, as transformers builds it from the same files. A space
is put before every text, also before one that begins with a space, as SentencePiece and the first tokenizer.json of
Llama 2 have it; transformers leaves it away there when it reads GGUF.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted

SPACE = "▁"
LONGEST = 256  # characters of a piece that pairs are looked for in, which takes the square of its length
LARGEST_VOCABULARY = 1 << 21


def tokenizer_json(
    pieces: Sequence[str],
    scores: Sequence[float],
    special: Mapping[int, bool],
    *,
    unknown: int | None = 0,
    begin: int | None = None,
    prefix: bool = True,
) -> dict[str, Any]:
    """Returns the content of a tokenizer.json.

    Args:
        pieces: The pieces by id, with SPACE for a space and <0x00> to <0xFF> for bytes that no other piece has.
        scores: Their scores.
        special: Pieces that no pair makes, by id: True for special ones, such as <s>, and False for others.
        unknown: Id of the piece for what even bytes can't express.
        begin: Id of the piece that stands before each text.
        prefix: Whether a space is put before a text.

    Raises:
        UserError: A piece is there twice, or is too long.
    """
    vocabulary = vocabulary_of(pieces)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(pieces, special),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None if begin is None else before_text(pieces[begin], begin),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
            "unk_token": None if unknown is None else pieces[unknown],
            **dict.fromkeys(("fuse_unk", "byte_fallback"), True),
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(vocabulary, scores, special),
        },
    }


def vocabulary_of(pieces: Sequence[str]) -> dict[str, int]:
    """Returns the ids by piece. UserError where a piece is there twice, or there are too many."""
    if len(pieces) > LARGEST_VOCABULARY:
        raise UserError(f"{len(pieces):,} tokens, where a tokenizer has {LARGEST_VOCABULARY:,} at most")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        twice = next(piece for number, piece in enumerate(pieces) if vocabulary[piece] != number)
        raise UserError(f"the token {quoted(twice[:80])} is there twice")
    return vocabulary


def added_tokens(pieces: Sequence[str], special: Mapping[int, bool]) -> list[dict[str, Any]]:
    """Returns the entries of tokens that are found in a text before anything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": pieces[number], **flags, "special": is_special}
        for number, is_special in sorted(special.items())
        if pieces[number]
    ]


def before_text(piece: str, number: int) -> dict[str, Any]:
    """Returns the post-processor that puts a token before each text."""
    begin = {"SpecialToken": {"id": piece, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, a],
        "pair": [begin, a, {"SpecialToken": {"id": piece, "type_id": 1}}, b],
        "special_tokens": {piece: {"id": piece, "ids": [number], "tokens": [piece]}},
    }


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], special: Mapping[int, bool]) -> list[list[str]]:
    """Returns the pairs that make a piece, those of the highest score first, and of one score the longer left part."""
    pairs = []
    for piece, number in vocabulary.items():
        if number in special:
            continue
        if len(piece) > LONGEST:
            raise UserError(f"the token {quoted(piece[:40])} has {len(piece):,} characters, and may have {LONGEST}")
        for end in range(1, len(piece)):
            left, right = piece[:end], piece[end:]
            if left in vocabulary and right in vocabulary:
                pairs.append((scores[number], len(left), len(right), left, right))
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [[left, right] for *_, left, right in pairs]
