"""What `prepare` has several processes do: pieces to tokens, and to the characters they have."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data import encodings, pieces, token_files, tokenizers
from jaxgpt.data.pieces import Piece
from jaxgpt.errors import UserError

PIECES_AHEAD = 4  # for each process
TRAINED_ON_BYTES = 1 << 30  # of which a BPE is made: from its beginning on, no more of the text is read

_tokenizer: tokenizers.Tokenizer | None = None  # a process's own


class Tokenized(NamedTuple):
    tokens: np.ndarray  # of the token file's dtype
    documents: int


class Pool:
    """Processes that share out a function's calls. With one, it is this process itself."""

    def __init__(self, processes: int, tokenizer: dict[str, Any] | None = None) -> None:
        self._processes, self._executor = processes, None
        if processes == 1:
            _begin(tokenizer)
        else:
            # Begun anew rather than forked: this process has threads.
            context = get_context("spawn")
            self._executor = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(tokenizer,))

    def map(self, function: Callable[[Piece], Any], items: Iterable[Piece]) -> Iterator[tuple[Piece, Any]]:
        """Each piece (without its data) and its result, in order. Few pieces are read before they are asked for."""
        if self._executor is None:
            for piece in items:
                yield piece._replace(data=b""), function(piece)
            return
        waiting = deque()
        for piece in items:
            waiting.append((piece._replace(data=b""), self._executor.submit(function, piece)))
            if len(waiting) > PIECES_AHEAD * self._processes:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def _begin(tokenizer: dict[str, Any] | None) -> None:
    global _tokenizer
    _tokenizer = tokenizers.from_state(tokenizer) if tokenizer else None


def tokenize(piece: Piece) -> Tokenized:
    """The piece's documents, each behind the token that separates them where the vocabulary has one."""
    tokenizer = _tokenizer
    assert tokenizer is not None
    parts, documents = [], 0
    for document in pieces.documents(piece):
        if document.begins:
            documents += 1
            if tokenizer.end_of_text is not None:
                parts.append([tokenizer.end_of_text])
        parts.append(_encode(tokenizer, document.text, piece))
    dtype = token_files.format_for(tokenizer.vocabulary_size).dtype
    return Tokenized(np.concatenate([np.asarray(part, dtype) for part in parts] or [np.empty(0, dtype)]), documents)


def _encode(tokenizer: tokenizers.Tokenizer, text: str, piece: Piece) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{piece.path}, in the part that begins at {piece.position.offset}: {error}") from None


def characters(piece: Piece) -> set[str]:
    return {character for document in pieces.documents(piece) for character in document.text}


# The vocabulary


def make_tokenizer(name: str, vocabulary_size: int, texts: Iterable[Piece], processes: int) -> tokenizers.Tokenizer:
    """The tokenizer called `name`; what is made from the text itself reads `texts`, and others don't."""
    if name == "characters":
        with Pool(processes) as pool:
            found = set().union(*(result for _, result in pool.map(characters, texts)))
        return tokenizers.make(name, "".join(found))
    if name == "bpe":
        return tokenizers.Trained(encodings.train(_sample(texts), vocabulary_size))
    return tokenizers.make(name, "")


def _sample(texts: Iterable[Piece]) -> Iterator[str]:
    left = TRAINED_ON_BYTES
    for piece in texts:
        for document in pieces.documents(piece):
            yield document.text
            left -= len(document.text)
        if left <= 0:
            return


def versions(tokenizer: str) -> dict[str, str]:
    """Of the packages that cut the text into tokens."""
    return {name: version(name) for name in ("tiktoken", *(["tokenizers"] if tokenizer == "bpe" else []))}
