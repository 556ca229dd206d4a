"""Byte-pair encodings other than GPT-2's, as tiktoken runs them: OpenAI's later ones, Llama 3's, and one's own.

An encoding is a list of byte strings by rank: a piece of text begins as its bytes, and the pair whose joined bytes have
the lowest rank is joined, until no pair has one. A pattern cuts the text into pieces first.
"""

import base64
import binascii
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken
import tiktoken.load
from tiktoken_ext.openai_public import r50k_pat_str

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.paths import cache_folder

END_OF_TEXT = "<|endoftext|>"

# Llama 3 (Grattafiori et al. 2024, arXiv:2407.21783): 128,000 ranks, then 256 special tokens, of which these are named.
LLAMA3_FILE = "llama3_tokenizer.model"
LLAMA3_REPOSITORY = ("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model")
LLAMA3_RANKS, LLAMA3_SPECIAL = 128_000, 256
LARGEST_RANKS = 1 << 24  # bytes of the file
LLAMA3_BEGIN_OF_TEXT = 128_000  # what llm.c puts before each document
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def openai(name: str) -> tiktoken.Encoding:
    """cl100k or o200k, whose ranks tiktoken downloads and keeps. UserError where it can't."""
    try:
        return tiktoken.get_encoding(f"{name}_base")
    except (OSError, ValueError) as error:  # ValueError: what came has another hash
        raise UserError(
            f"cannot download the tokenizer {name}: {error}; where it is in a folder that tiktoken has used, name that "
            "folder with TIKTOKEN_CACHE_DIR"
        ) from None


def llama3() -> tiktoken.Encoding:
    """Llama 3's, from Meta's tokenizer.model. UserError where there is none, or it is something else."""
    path = _llama3_file()
    try:
        ranks = dict(_ranks(files.read_bytes(path, LARGEST_RANKS)))
    except ValueError as error:
        raise UserError(f"{path} is not Llama 3's tokenizer.model: {error}") from None
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise UserError(f"{path} is not Llama 3's tokenizer.model: it has {len(ranks):,} ranks, not {LLAMA3_RANKS:,}")
    special = {f"<|special_{i}|>": LLAMA3_RANKS + i for i in range(LLAMA3_SPECIAL)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _ranks(data: bytes) -> Iterable[tuple[bytes, int]]:
    for line in data.splitlines():
        token, _, rank = line.partition(b" ")
        yield base64.b64decode(token, validate=True), int(rank)


def _llama3_file() -> Path:
    own_folder = os.environ.get("JAXGPT_DATA")
    places = [Path(folder, LLAMA3_FILE) for folder in (own_folder, cache_folder()) if folder]
    for path in places:
        if files.is_file(path):
            return path
    from jaxgpt.data import hub  # here, because it needs an extra that all else does without

    try:
        return hub.download(*LLAMA3_REPOSITORY, kind="model")
    except UserError as error:
        raise UserError(
            f"{error}. Llama 3's tokenizer is only given to those who accept Meta's license: do so at "
            f"huggingface.co/{LLAMA3_REPOSITORY[0]} and set HF_TOKEN, or put the file there by hand as {places[-1]}"
        ) from None


# One's own


def from_tokens(tokens: Sequence[bytes]) -> tiktoken.Encoding:
    """GPT-2's pattern, and these ranks; the end of text comes behind them."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)}
    )


def printable_bytes() -> dict[str, int]:
    """The byte that each of 256 printable characters stands for in GPT-2's files and all that came of them."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def train(texts: Iterable[str], vocabulary_size: int) -> list[bytes]:
    """The tokens by rank of a byte-level BPE trained on the texts (Sennrich et al. 2016, arXiv:1508.07909).

    `vocabulary_size` counts the end of text too. Texts without enough words in them give fewer tokens.
    """
    smallest = 256 + 1
    if vocabulary_size < smallest:
        raise UserError(
            f"--vocabulary-size is {vocabulary_size}, and must be at least {smallest}: all bytes, and the end"
        )
    try:
        import tokenizers
    except ImportError:
        raise UserError("training a tokenizer needs the extra `data`: make env EXTRAS=data") from None
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    byte_of = printable_bytes()
    ranked = sorted(model.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[character] for character in token) for token, _ in ranked]


def tokens_as_text(tokens: Sequence[bytes]) -> list[str]:
    """As JSON can hold them."""
    return [base64.b64encode(token).decode() for token in tokens]


def tokens_from_text(texts: Sequence[str]) -> list[bytes]:
    """Back from it. UserError where they are not what a BPE has: each byte, and no token twice."""
    try:
        tokens = [base64.b64decode(text, validate=True) for text in texts]
    except (TypeError, ValueError, binascii.Error):
        tokens = []
    singles = {token for token in tokens if len(token) == 1}
    if len(singles) != 256 or len(set(tokens)) != len(tokens) or b"" in tokens:
        raise UserError("the saved tokenizer is damaged; restore its file from a copy, or train anew")
    return tokens
