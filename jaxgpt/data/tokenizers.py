"""Tokenizers: text to token ids and back.

A tokenizer is a list of tokens, each some bytes, and a way to cut a text into them. Decoding is the same for all: the
tokens' bytes are joined and read as UTF-8, in which one character may span several tokens.

- characters: the characters of the training text, sorted
- bytes: the 256 bytes of UTF-8; encodes any text
- gpt2: GPT-2's byte-level byte-pair encoding (Radford et al. 2019), 50,257 tokens; encodes any text
- cl100k, o200k, llama3: GPT-4's, GPT-4o's and Llama 3's, of the same kind with 100,277, 200,019 and 128,256 tokens
- bpe: one of the same kind, trained on a text by `run.py prepare`
- huggingface: any other, read from a tokenizer.json (`tokenizer_json.py`)
"""

import base64
import codecs
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import tiktoken

from jaxgpt.data import encodings, llama3
from jaxgpt.errors import UserError
from jaxgpt.options.command_line import nearest

NAMES = ("characters", "bytes", "gpt2", "cl100k", "o200k", "llama3")

AT_ONCE = 1 << 16  # characters that Characters looks up at a time


class Tokenizer(ABC):
    """Cuts text into tokens, and joins tokens to text.

    Attributes:
        name: One of NAMES, "bpe" or "huggingface".
        tokens: The bytes of each token, by id.
        end_of_text: The id that separates documents, or None where the vocabulary has none.
        begin_of_text: The id that models of the Llama kind expect before every text, or None.
        whole_documents: Whether documents must be encoded whole: where they are cut, even at the places that
            `chunks` lists, their tokens may change.
    """

    name: str
    tokens: Sequence[bytes]
    end_of_text: int | None = None
    begin_of_text: int | None = None
    whole_documents: bool = False

    @property
    def vocabulary_size(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Returns the text's token ids, int32, 1-D. UserError where the vocabulary can't express a character.

        With `special`, the names of special tokens in the text, such as <|endoftext|>, become these tokens. Otherwise
        they are encoded as the characters that they consist of, so that a text can't end its document.
        """

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names of the tokens that `encode` finds in a text only with `special`."""
        return ()

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of these tokens."""
        return frozenset(number for name in self.special_names for number in self.encode(name, special=True).tolist())

    def encode_with_places(self, text: str, *, special: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `encode`'s ids, and the characters of the text at which each token begins and ends, int64.

        A token of a part of a character has the whole character.
        """
        ids = self.encode(text, special=special)
        lengths = np.array([len(self.tokens[number]) for number in ids.tolist()], np.int64)
        ends = np.cumsum(lengths)
        leading = np.frombuffer(utf8(text), np.uint8) & 0xC0 != 0x80  # the first bytes of characters
        character = np.concatenate([np.cumsum(leading) - 1, [len(text)]])
        return ids, character[ends - lengths], character[np.maximum(ends - 1, 0)] + (lengths > 0)

    def begin(self, ids: np.ndarray) -> np.ndarray:
        """Returns the ids of a prompt, or of a text to score, with `begin_of_text` before them where there is one.

        transformers puts it there too. Other than there, it isn't put before ids that begin with it: a prompt of
        special tokens often spells it out.
        """
        if self.begin_of_text is None or (len(ids) and ids[0] == self.begin_of_text):
            return ids
        return np.concatenate([np.array([self.begin_of_text], np.int32), ids])

    def prompt_text(self, ids: np.ndarray) -> str:
        """Returns a prompt's text, without the `begin_of_text` that `begin` puts before it."""
        begins = int(len(ids) > 0 and ids[0] == self.begin_of_text)
        return self.decode(ids[begins:])

    @property
    def before_document(self) -> list[int]:
        """Ids between documents: the end of one, and the beginning of the next. Each stands before a document."""
        both = dict.fromkeys((self.end_of_text, self.begin_of_text))
        return [number for number in both if number is not None]

    @property
    def document_start(self) -> int | None:
        """The last of these ids, with which a document begins that is a sequence of its own."""
        return self.before_document[-1] if self.before_document else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of a 1-D sequence of ids; bytes that aren't UTF-8 become U+FFFD. UserError as `join`."""
        return self.join(ids).decode("utf-8", "replace")

    def join(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the joined bytes of a 1-D sequence of ids. UserError for an id outside the vocabulary."""
        return b"".join([self.tokens[i] for i in check_ids(self, ids).tolist()])

    def state(self) -> dict:
        """Returns the state from which `from_state` makes the same tokenizer, as JSON can hold it."""
        return {"name": self.name}


def check_ids(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns a 1-D sequence of ids as an int64 array. UserError for an id outside the vocabulary."""
    ids = np.asarray(ids, dtype=np.int64)
    unknown = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocabulary_size))
    if unknown.size:
        raise UserError(
            f"token {ids[unknown[0]]} at position {unknown[0]} is not in the vocabulary of tokenizer {tokenizer.name} "
            f"(0 to {tokenizer.vocabulary_size - 1}); decode with the tokenizer that the tokens were made with"
        )
    return ids


class StreamDecoder:
    """Decodes ids one by one.

    `decoder(i)` returns the text that i completes, which may be empty, and `finish()` returns the rest. Together they
    are the text that `Tokenizer.decode` gives for the same ids behind others. With a tokenizer.json, the text of the
    same ids alone can differ: there the first token may lose the space that it begins with.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.join([token_id]))

    def finish(self) -> str:
        """Returns U+FFFD for an unfinished character at the end, and nothing where there is none."""
        return self._utf8.decode(b"", final=True)


class Characters(Tokenizer):
    """One token per character, with ids in the characters' order. `characters` is sorted, without duplicates."""

    name = "characters"

    def __init__(self, characters: str) -> None:
        self._characters = characters
        self._codes = _codes(characters)
        self.tokens = [utf8(character) for character in characters]

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
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int32)


class BytePairs(Tokenizer):
    """A byte-level byte-pair encoding."""

    def __init__(
        self, name: str, encoding: tiktoken.Encoding, end_of_text: int, begin_of_text: int | None = None
    ) -> None:
        self.name, self._encoding = name, encoding
        self.end_of_text, self.begin_of_text = end_of_text, begin_of_text
        self.tokens = _tokens(encoding)

    @property
    def special_names(self) -> tuple[str, ...]:
        return tuple(sorted(self._encoding.special_tokens_set))

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        utf8(text)  # tiktoken would replace characters that UTF-8 can't express
        allowed = "all" if special else frozenset()
        return self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=()).astype(np.int32)


class GPT2(BytePairs):
    """GPT-2's tokens."""

    def __init__(self) -> None:
        encoding = encodings.gpt2()
        super().__init__("gpt2", encoding, encoding.eot_token)


class TrainedBytePairs(BytePairs):
    """A trained BPE: its tokens by rank, each of the 256 bytes among them. The end of text has the next id."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        super().__init__("bpe", encodings.from_tokens(tokens), len(tokens))

    def state(self) -> dict:
        return {"name": self.name, "tokens": [base64.b64encode(token).decode() for token in self.tokens[:-1]]}


def make(name: str, text: str) -> Tokenizer:
    """Returns the tokenizer called `name`; the tokens of "characters" are those of the text.

    UserError where the name is unknown, the text is empty, or the tokenizer's files are damaged or can't be had.
    """
    match name:
        case "characters" if not text:
            raise UserError("the tokenizer characters is made from a text, and this text is empty; choose another text")
        case "characters":
            return Characters("".join(sorted(set(text))))
        case "bytes":
            return Bytes()
        case "gpt2":
            return GPT2()
        case "cl100k" | "o200k":
            encoding = encodings.openai(name)
            return BytePairs(name, encoding, encoding.eot_token)
        case "llama3":
            begin = llama3.BEGIN_OF_TEXT  # which llm.c has between documents too
            return BytePairs(name, llama3.encoding(), begin, begin)
    raise UserError(f"there is no tokenizer {name!r}: name one of {', '.join(NAMES)}{nearest(name, NAMES)}")


def from_state(state: dict) -> Tokenizer:
    """Returns the tokenizer whose `state()` this is. UserError for a damaged state."""
    fields = state if isinstance(state, dict) else {}
    name, characters = fields.get("name"), fields.get("characters", "")
    if name == "bpe" and isinstance(fields.get("tokens"), list):
        return TrainedBytePairs(encodings.from_base64(fields["tokens"]))
    if name == "huggingface" and isinstance(fields.get("file"), str):
        from jaxgpt.data.tokenizer_json import HuggingFace  # here, because that file imports this one

        return HuggingFace(fields["file"], fields.get("end_of_text"), fields.get("begin_of_text"))
    if not (isinstance(name, str) and isinstance(characters, str) and list(characters) == sorted(set(characters))):
        raise UserError("the saved tokenizer is damaged; restore its file from a copy, or train anew")
    return make(name, characters)


def _codes(text: str) -> np.ndarray:
    """Returns the code points of a text, uint32, 1-D."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def utf8(text: str) -> bytes:
    """Returns the text's UTF-8. UserError for half a surrogate pair, which Python strings can hold and UTF-8 can't."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise UserError(f"the text has half a surrogate pair, {character}, and is not Unicode: take it out") from None


@functools.lru_cache(maxsize=4)
def _tokens(encoding: tiktoken.Encoding) -> tuple[bytes, ...]:
    """Returns each token's bytes, by id; empty for ids that the encoding leaves free."""
    written = [*encoding.token_byte_values(), *(name.encode() for name in encoding.special_tokens_set)]
    byte_strings = {encoding.encode_single_token(token): token for token in written}
    return tuple(byte_strings.get(i, b"") for i in range(encoding.n_vocab))
