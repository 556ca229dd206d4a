"""Byte-pair encodings other than GPT-2's, as tiktoken runs them: OpenAI's later ones, Llama 3's, and trained ones.

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
from jaxgpt.environment import cache_folder
from jaxgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# Llama 3 (Grattafiori et al. 2024, arXiv:2407.21783): 128,000 ranks, then 256 special tokens, of which these are named.
LLAMA3_FILE = "llama3_tokenizer.model"
LLAMA3_REPOSITORY = ("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model")
LLAMA3_RANKS, LLAMA3_SPECIAL = 128_000, 256
LARGEST_RANKS = 1 << 24  # bytes of Llama 3's file
LLAMA3_BEGIN_OF_TEXT = 128_000  # the token that llm.c puts before each document
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def openai(name: str) -> tiktoken.Encoding:
    """Returns the encoding cl100k or o200k, which tiktoken downloads and caches. UserError where that fails."""
    try:
        return tiktoken.get_encoding(f"{name}_base")
    except (OSError, ValueError) as error:  # ValueError: the downloaded file has another hash
        raise UserError(
            f"cannot download the tokenizer {name}: {error}; where it is in a folder that tiktoken has used, name that "
            "folder with TIKTOKEN_CACHE_DIR"
        ) from None


def llama3() -> tiktoken.Encoding:
    """Returns Llama 3's encoding, from Meta's tokenizer.model. UserError where the file is missing or wrong."""
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
    from jaxgpt.data import hub  # here, because it needs an extra that nothing else in this file needs

    try:
        return hub.download(*LLAMA3_REPOSITORY, kind="model")
    except UserError as error:
        raise UserError(
            f"{error}. Llama 3's tokenizer is only given to those who accept Meta's license: do so at "
            f"huggingface.co/{LLAMA3_REPOSITORY[0]} and set HF_TOKEN, or put the file there by hand as {places[-1]}"
        ) from None


# Trained encodings


def from_tokens(tokens: Sequence[bytes]) -> tiktoken.Encoding:
    """Returns the encoding with GPT-2's pattern and these tokens by rank; the end of text has the next id."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)}
    )


def printable_bytes() -> dict[str, int]:
    """Returns the byte that each of 256 printable characters stands for in byte-level files, GPT-2's and later ones."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def train(texts: Iterable[str], vocabulary_size: int) -> list[bytes]:
    """Trains a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909).

    Args:
        texts: The texts to train on.
        vocabulary_size: The number of tokens, the end of text included.

    Returns:
        The tokens by rank, without the end of text. They are fewer where the texts have too few words.

    Raises:
        UserError: The vocabulary is smaller than 257, or the extra `data` is not installed.
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
    """Returns the tokens in base64, as JSON can hold them."""
    return [base64.b64encode(token).decode() for token in tokens]


def tokens_from_text(texts: Sequence[str]) -> list[bytes]:
    """Inverts `tokens_as_text`. UserError unless each byte is a token, no token is empty, and none is there twice."""
    try:
        tokens = [base64.b64decode(text, validate=True) for text in texts]
    except (TypeError, ValueError, binascii.Error):
        tokens = []
    singles = {token for token in tokens if len(token) == 1}
    if len(singles) != 256 or len(set(tokens)) != len(tokens) or b"" in tokens:
        raise UserError("the saved tokenizer is damaged; restore its file from a copy, or train anew")
    return tokens
