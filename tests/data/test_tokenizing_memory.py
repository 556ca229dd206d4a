"""Memory in which a piece of a text becomes tokens: some times the piece's, whatever is in it."""

import tracemalloc

import numpy as np
import pytest

from jaxgpt.data import tokenizers, workers
from jaxgpt.data.documents import Chunk, Position, TextLayout


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
@pytest.mark.parametrize(
    ("text", "separator", "count"),
    [("\n", "\n", 1 << 15), ("a \n\n", "\n", 1 << 13), ("a", "", 1 << 20), ("是", "", 1 << 19)],
)
def test_memory_is_in_proportion_to_the_piece(tokenizer, text, separator, count):
    """This holds even if each character is a document."""
    whole = text * count
    data = whole.encode()
    piece = Chunk("a.txt", "text", TextLayout(separator=separator), Position(), data, len(data))
    made = tokenizers.make(tokenizer, text)
    tracemalloc.start()
    try:
        tokenized = workers.tokenize_with(made, piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(tokenized.tokens, made.encode(whole))
    assert peak < 12 * len(data) + (2 << 20)
