"""Work that `prepare` shares out to several processes: tokenizing pieces, and collecting their characters."""

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data import chunks, documents, encodings, token_files, tokenizers
from jaxgpt.data.documents import Chunk, Rows
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

PIECES_AHEAD = 4  # pieces in memory for each process
MOST_PARTS = 4096  # arrays of tokens that are kept side by side
TRAINED_ON_BYTES = 1 << 30  # a BPE is trained on about so much of the text's beginning; no more is read
LONGEST_WORD = 1000  # characters of a word that a BPE is trained on

# A long word is only looked for where one begins, so that the search takes time in proportion to the text.
LONG_WORD = re.compile(
    "|".join(rf"(?<!{kind}){kind}{{{LONGEST_WORD + 1}}}{kind}*+" for kind in (r"[!-~]", r"\w", r"\s", r"[^\w\s]"))
)

_tokenizer: tokenizers.Tokenizer | None = None  # each process has its own


class Tokenized(NamedTuple):
    tokens: np.ndarray  # of the token file's dtype
    documents: int
    rows: Rows


class Pool(contextlib.AbstractContextManager):
    """Processes that share the calls of a function. A pool of one is this process itself.

    `tokenizer` is the state of the tokenizer that `tokenize` uses.
    """

    def __init__(self, processes: int, tokenizer: dict[str, Any] | None = None) -> None:
        self._processes, self._executor = processes, None
        if processes == 1:
            _begin(tokenizer)
        else:
            # Spawned rather than forked, because this process has threads.
            context = get_context("spawn")
            self._executor = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(tokenizer,))

    def map(self, function: Callable[[Chunk], Any], items: Iterable[Chunk]) -> Iterator[tuple[Chunk, Any]]:
        """Yields each piece, without its text, and the function's result for it, in order.

        Only a few pieces are read ahead, and fewer where they are long.
        """
        if self._executor is None:
            for piece in items:
                yield piece.emptied(), function(piece)
            return
        most = PIECES_AHEAD * self._processes
        waiting, held = deque(), 0
        for piece in items:
            waiting.append((piece.emptied(), piece.size(), self._executor.submit(function, piece)))
            held += waiting[-1][1]
            while len(waiting) > most or (waiting and held > most * chunks.PIECE_BYTES):
                done, size, future = waiting.popleft()
                yield done, future.result()
                held -= size
        for done, _, future in waiting:
            yield done, future.result()

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def _begin(tokenizer: dict[str, Any] | None) -> None:
    global _tokenizer
    _tokenizer = tokenizers.from_state(tokenizer) if tokenizer else None


def tokenize(piece: Chunk) -> Tokenized:
    """Returns the tokens of a piece's documents, each document behind the tokens that stand between documents."""
    assert _tokenizer is not None
    return tokenize_with(_tokenizer, piece)


def tokenize_with(tokenizer: tokenizers.Tokenizer, piece: Chunk) -> Tokenized:
    """Tokenizes as `tokenize` does, with this tokenizer. UserError for a text that it can't encode."""
    dtype = token_files.format_for(tokenizer.vocabulary_size).dtype
    parts, count, rows = [], 0, Rows()
    for document in documents.of(piece, rows):
        if len(parts) >= MOST_PARTS:  # of one-letter documents, the arrays take a hundred times their tokens' memory
            parts = [np.concatenate(parts)]
        if document.begins:
            count += 1
            parts.append(np.array(tokenizer.before_document, dtype))
        try:
            parts.append(tokenizer.encode(document.text).astype(dtype))
        except UserError as error:
            where = f"{shown(piece.path)}, in the part that begins at {piece.position.offset:,}"
            raise UserError(f"{where}: {error}") from None
    return Tokenized(np.concatenate(parts or [np.empty(0, dtype)]), count, rows)


def characters(piece: Chunk) -> set[str]:
    """Returns the set of characters in a piece's documents."""
    return set().union(*(document.text for document in documents.of(piece, Rows())))


# The vocabulary


class Made(NamedTuple):
    tokenizer: tokenizers.Tokenizer
    left_out: int = 0  # characters of long words that a BPE wasn't trained on


def make_tokenizer(name: str, vocabulary_size: int, texts: Iterable[Chunk], processes: int, skip_bad: int) -> Made:
    """Returns the tokenizer called `name`: one of `tokenizers.NAMES`, or "bpe". UserError where it can't be made.

    Only "characters", which several processes collect, and "bpe", whose training passes over up to `skip_bad` bad rows,
    read the texts.
    """
    if name == "characters":
        with Pool(processes) as pool:
            found = set().union(*(result for _, result in pool.map(characters, texts)))
        if not found:
            raise UserError("there is no text to make the tokenizer characters of: all files or rows are empty")
        return Made(tokenizers.make(name, "".join(found)))
    if name == "bpe":
        sample = Sample(texts, skip_bad)
        return Made(tokenizers.TrainedBytePairs(encodings.train(sample, vocabulary_size)), sample.left_out)
    return Made(tokenizers.make(name, ""))


class Sample:
    """Texts that a BPE is trained on, which can be iterated over once.

    Training takes time in proportion to a word's length for each pair that is joined in it. So anything too long for a
    word, such as a picture in base64, is left out.
    """

    def __init__(self, texts: Iterable[Chunk], skip_bad: int) -> None:
        self._texts, self._skip_bad = texts, skip_bad
        self.left_out = 0  # characters of such words, so far

    def __iter__(self) -> Iterator[str]:
        left, rows = TRAINED_ON_BYTES, Rows()
        for piece in self._texts:
            for document in documents.of(piece, rows):
                text = LONG_WORD.sub("", document.text)
                self.left_out += len(document.text) - len(text)
                yield text
                left -= len(document.text)
            rows.check(self._skip_bad)
            if left <= 0:
                return
