"""Tokenizers that Hugging Face's package `tokenizers` reads from a tokenizer.json, with the same ids.

Normalisers, pre-tokenizers and added tokens are the file's. As with every tokenizer of this package, no special tokens
are put around a text by `encode`; the one that the file's post-processor would put before it is `begin_of_text`.
Truncation and padding are off. The file's text is the tokenizer's state, unchanged.
"""

import contextlib
import functools
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jaxgpt import foreign_text
from jaxgpt.data import encodings
from jaxgpt.data.tokenizers import Tokenizer, check_ids, utf8
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

if TYPE_CHECKING:
    import tokenizers

LARGEST_VOCABULARY = 1 << 21
# Some parts of a tokenizer take more than n steps for a text of n bytes. These limits bound how many times more.
LONGEST_UNIGRAM = 512  # characters of a token: at every place, tokens of all lengths are looked for
LONGEST_WORD = 256  # characters of a word whose beginnings WordPiece tries, the longest first
LARGEST_GROWTH = 1024  # characters that replacements within replacements may make of one
PANIC = "PanicException"  # the class of Rust's panics, which has no public name
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # name of a byte in SentencePiece's vocabularies


class MissingPackage(UserError):
    """Raised where the package `tokenizers` is not installed."""


class HuggingFace(Tokenizer):
    """A tokenizer.json, as the package `tokenizers` runs it."""

    name = "huggingface"
    whole_documents = True  # a normaliser, an added token or a pattern may look at anything

    def __init__(self, text: str, end_of_text: int | None = None, begin_of_text: int | None = None) -> None:
        """Reads the text of a tokenizer.json. UserError where the package can't run it or has no such id.

        MissingPackage where the package is not installed.
        """
        content = parse(text)
        self.text, self.end_of_text, self.begin_of_text = text, end_of_text, begin_of_text
        self._decoders = [part.get("type") for part in _parts(content.get("decoder"))]
        self._tokenizer = _load(text)
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are encoded as characters
        self._size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        if not 1 <= self._size <= LARGEST_VOCABULARY:
            raise UserError(f"ids up to {self._size - 1:,}, where a tokenizer has from 1 to {LARGEST_VOCABULARY:,} ids")
        for what, number in (("end", end_of_text), ("beginning", begin_of_text)):
            if number is not None and not (type(number) is int and 0 <= number < self._size):
                raise UserError(f"the {what} of text is token {shown(number)}, and there are {self._size:,} tokens")

    @property
    def vocabulary_size(self) -> int:
        return self._size

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        utf8(text)
        tokenizer = self._with_special if special else self._tokenizer
        with _errors("can't encode the text"), quiet:
            # Without offsets, which take more memory than the ids.
            return np.array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    @functools.cached_property
    def special_names(self) -> tuple[str, ...]:  # type: ignore[override]
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(sorted(token.content for token in added if token.special and token.content))

    def encode_with_places(self, text: str, *, special: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        utf8(text)
        tokenizer = self._with_special if special else self._tokenizer
        with _errors("can't encode the text"), quiet:
            encoded = tokenizer.encode(text, add_special_tokens=False)
        places = np.array(encoded.offsets, np.int64).reshape(-1, 2).clip(0, len(text))
        return np.array(encoded.ids, np.int32), places[:, 0], places[:, 1]

    def stated_beginning(self) -> int | None:
        """Returns the special token that the file's post-processor puts before a text; None for none."""
        with _errors("can't encode an empty text"), quiet:
            around = self._tokenizer.encode("", add_special_tokens=True).ids
            both = self._tokenizer.encode("a", add_special_tokens=True).ids
            alone = self._tokenizer.encode("a", add_special_tokens=False).ids
        before = both[: next((i for i in range(len(both)) if both[i : i + len(alone)] == alone), 0)]
        known = len(before) == 1 and around[:1] == before and before[0] < self._size
        return before[0] if known else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text as `tokenizers` decodes it: some files drop the space that the first token begins with."""
        checked = check_ids(self, ids).tolist()
        with _errors("can't decode the tokens"):
            return self._tokenizer.decode(checked, skip_special_tokens=False)

    def token(self, token_id: int) -> str | None:
        """Returns a token as the file writes it."""
        return self._tokenizer.id_to_token(token_id)

    def id_of(self, token: str) -> int | None:
        """Returns a token's id."""
        return self._tokenizer.token_to_id(token)

    @functools.cached_property
    def tokens(self) -> Sequence[bytes]:  # type: ignore[override]
        """Bytes that each token adds to a text before it, by id; empty for ids without a token."""
        names = [self._tokenizer.id_to_token(number) for number in range(self._size)]
        if "ByteLevel" in self._decoders:
            return tuple(_byte_level(name or "") for name in names)
        with _errors("can't decode its tokens"), quiet:
            added = self._after_another()
        of_bytes = "ByteFallback" in self._decoders
        for number, name in enumerate(names):
            if of_bytes and name and (match := BYTE.fullmatch(name)):
                added[number] = bytes.fromhex(match[1])
            elif name is None:
                added[number] = b""
        return tuple(added)

    def state(self) -> dict:
        begin = {} if self.begin_of_text is None else {"begin_of_text": self.begin_of_text}
        return {"name": self.name, "file": self.text, "end_of_text": self.end_of_text, **begin}

    @functools.cached_property
    def _with_special(self) -> "tokenizers.Tokenizer":
        """A second tokenizer that finds special tokens: the setting is the whole object's, which threads share."""
        return _load(self.text)

    def _after_another(self) -> list[bytes]:
        """Returns what each token adds to a word that stands before it."""

        def decode(ids: list[list[int]]) -> list[str]:
            return self._tokenizer.decode_batch(ids, skip_special_tokens=False)

        alone = decode([[number] for number in range(self._size)])
        word = next((number for number, text in enumerate(alone) if text.isascii() and text.isalnum()), None)
        if word is None:
            return [text.encode() for text in alone]
        behind = decode([[word, number] for number in range(self._size)])
        return [
            (both.removeprefix(alone[word]) if both.startswith(alone[word]) else text).encode()
            for text, both in zip(alone, behind, strict=True)
        ]


def parse(text: str) -> dict[str, Any]:
    """Returns the object in a tokenizer.json. UserError where there is none, or the package can't run it safely."""
    try:
        content = foreign_text.parse_json(text, unique=True)
    except ValueError as error:
        raise UserError(f"not JSON ({error})") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise UserError("not a tokenizer: there is no model in it")
    if model.get("dropout"):
        raise UserError("the model has dropout, with which a text gets other tokens each time: set it to null")
    _check_costs(content, model)
    return content


def _check_costs(content: dict[str, Any], model: dict[str, Any]) -> None:
    """Raises a UserError where encoding a short text could take the package very long, or very much memory."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # a Unigram's, with or without a type
        names = (row[0] for row in vocabulary if isinstance(row, list) and row and isinstance(row[0], str))
        longest = max(map(len, names), default=0)
        if longest > LONGEST_UNIGRAM:
            raise UserError(f"a token has {longest:,} characters, where a Unigram's have {LONGEST_UNIGRAM} at most")
    most = model.get("max_input_chars_per_word", 0)
    if not (type(most) is int and most <= LONGEST_WORD):
        raise UserError(f"max_input_chars_per_word is {shown(most)}, and may be {LONGEST_WORD} at most")
    for key in ("normalizer", "decoder"):
        growth = 1.0
        for part in _parts(content.get(key)):
            growth *= _growth(part)
        if growth > LARGEST_GROWTH:
            raise UserError(f"its {key} replaces within what it has replaced, and makes of one character thousands")


def _growth(part: dict[str, Any]) -> float:
    """Returns how many characters a replacement makes of one. A regular expression may match a single character."""
    new, pattern = part.get("content"), part.get("pattern")
    if part.get("type") != "Replace" or not isinstance(new, str):
        return 1.0
    old = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(new) / max(1, len(old) if isinstance(old, str) else 1))


def _load(text: str) -> "tokenizers.Tokenizer":
    # The package's threads are of no use for one text, and with them it warns at every later fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError:
        raise MissingPackage("this tokenizer needs the extra `data`: make env EXTRAS=data") from None
    with _errors("the package tokenizers can't read it"), quiet:
        loaded = tokenizers.Tokenizer.from_str(text)
        loaded.no_truncation()
        loaded.no_padding()
        return loaded


class _Quiet:
    """Keeps Rust's message of a panic, which the exception has too, from the terminal. Threads may enter it together.

    Rust prints it to the standard error's file, whatever Python's `sys.stderr` is. So while a thread is inside, that
    file is a temporary one; what else was printed meanwhile is printed when the last thread leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._panicked = 0, False
        self._kept: int | None = None
        self._caught: IO[bytes] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                # Closed, or nowhere to write to: then what Rust prints is printed.
                with contextlib.suppress(OSError):
                    self._caught = self._caught or tempfile.TemporaryFile()  # kept for the next time
                    self._kept = os.dup(2)
                    os.dup2(self._caught.fileno(), 2)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            self._panicked |= kind is not None and kind.__name__ == PANIC
            if not self._inside and self._kept is not None and self._caught:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = None
                if os.fstat(self._caught.fileno()).st_size:
                    self._print(self._caught)
            if not self._inside:
                self._panicked = False

    def _print(self, caught: IO[bytes]) -> None:
        caught.seek(0)
        printed = caught.read()
        caught.seek(0)
        caught.truncate()
        if not self._panicked:
            with contextlib.suppress(OSError):
                os.write(2, printed)


quiet = _Quiet()


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turns the package's exceptions, which have no type of their own, and Rust's panics into UserErrors."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise UserError(f"tokenizer.json: {what} ({shown(error)})") from None


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yields a normaliser or decoder and, where it is a sequence, all its parts."""
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            for key in ("normalizers", "decoders"):
                inner = part.get(key)
                waiting += inner if isinstance(inner, list) else []


def _byte_level(name: str) -> bytes:
    """Returns a token's bytes. An added token with a character that stands for no byte is read as text."""
    if encodings.BYTE_OF.keys() >= set(name):
        return bytes(map(encodings.BYTE_OF.__getitem__, name))
    return name.encode("utf-8", "replace")
