"""Weights in any format, and how the tensors of a Hugging Face folder lie in this project's.

Each family has a table of its own (`gpt2_tables.py`, `llama_tables.py`). One of our tensors is made of one or several
of theirs: queries, keys and values are one matrix here, and three in most of their models.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.data.chat_templates import Template
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.models.blocks import Adapters, Params
from jaxgpt.options.config import Lora, Model

DTYPES = {dtype.name: dtype for dtype in map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16))}
ALIGNMENT = 64  # bytes
NUMBER = "#"  # in a name, where each layer, or each expert, has its number


@dataclass(frozen=True)
class AdapterSource:
    """Adapters of weights that are kept elsewhere."""

    options: Lora
    base: str  # the name of these weights, as the user gave it
    load: Callable[[], Adapters]  # reads the adapters: stacked arrays in float32
    fingerprint: str = ""  # of the base (`bases.fingerprint`), where it is known


@dataclass(frozen=True)
class WeightSource:
    """Weights in files whose headers have all been checked."""

    where: str
    kind: str  # for people
    model: Model
    dtype: str  # as they are stored: a key of DTYPES
    tokenizer: Tokenizer | None  # None where the files name none, or one that can't be read
    load: Callable[[], Params]  # reads the weights: stacked NumPy arrays of that dtype
    readers: Callable[[], Params] | None = None  # the same, each array as a function that reads it, where that can be
    notes: tuple[str, ...] = ()  # printed for the user
    unreadable_tokenizer: bool = False  # the files have a tokenizer that can't be read, and the notes say why
    template: Template | None = None  # of conversations, where the files have one
    adapters: AdapterSource | None = None  # where the files have adapters alone, which `load` merges into their base


class Part(NamedTuple):
    """A tensor of theirs, and its place in one of ours."""

    ours: str  # path in the family's Params
    name: str  # theirs, without the family's prefix, and with NUMBER for each of `counts`
    counts: tuple[int, ...]  # numbers of layers and experts, the leading axes of ours
    shape: tuple[int, ...]  # of one of them, there
    place: tuple[slice, ...] = ()  # within ours, after the leading axes
    turned: bool = False  # (out, in) there, (in, out) here

    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields each name, and the numbers in it."""
        pieces = self.name.split(NUMBER)
        for numbers in _numbers(self.counts):
            filled = "".join(f"{piece}{number}" for piece, number in zip(pieces, numbers, strict=False))
            yield filled + pieces[-1], numbers

    def of(self, array: np.ndarray, numbers: tuple[int, ...]) -> np.ndarray:
        """Returns the view of our stacked tensor that is this tensor of theirs, in their layout."""
        view = array[numbers][self.place]
        return view.T if self.turned else view


def _numbers(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields all numbers below the counts, in order; `itertools.product` would first hold as many as a file claims."""
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for rest in _numbers(counts[1:]):
            yield (first, *rest)


class Table(NamedTuple):
    """All tensors of a model in a Hugging Face folder."""

    kind: str  # of the model, for people
    prefix: str  # of all names but the head's, which some files leave away
    token: str  # name of the token table
    head: str  # name of the unembedding; a model whose head is the token table may have it, or have it alone
    passed_over: str  # pattern of the names of tensors that old files have and nothing needs
    parts: tuple[Part, ...]


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array that begins where JAX wants one to, so that on a CPU it is used in place and not copied."""
    size = math.prod(shape) * dtype.itemsize
    room = np.zeros(size + ALIGNMENT, np.uint8)
    first = -room.ctypes.data % ALIGNMENT
    return room[first : first + size].view(dtype).reshape(shape)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds an array to one of DTYPES. UserError, with the tensor's name, for a number beyond float16's largest."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == DTYPES["float16"] and np.isinf(result).sum() > np.isinf(array).sum():
        raise UserError(f"{name} has numbers beyond 65504, the largest of float16: take bfloat16 or float32 (--dtype)")
    return result
