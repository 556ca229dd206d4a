"""Weights that are somewhere, whatever the format: what is known of them before they are read, and how to read them."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model


@dataclass(frozen=True)
class Source:
    """Where weights are, all headers checked."""

    where: str
    kind: str  # for people
    model: Model
    dtype: str  # as they are stored: a name of tensors.DTYPES
    tokenizer: Tokenizer | None  # None where the files don't say, or one that this project hasn't got
    load: Callable[[], Params]  # stacked NumPy arrays of that dtype
    notes: tuple[str, ...] = ()  # what else is to be said
    unreadable_tokenizer: bool = False  # whether they have one that isn't to be had here, as the notes say
