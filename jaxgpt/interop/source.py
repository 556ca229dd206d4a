"""A source of weights in any format: what is known of them before they are read, and a function that reads them."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model


@dataclass(frozen=True)
class WeightSource:
    """Weights in files whose headers have all been checked."""

    where: str
    kind: str  # for people
    model: Model
    dtype: str  # as they are stored: a key of tensors.DTYPES
    tokenizer: Tokenizer | None  # None where the files name none, or one that can't be read
    load: Callable[[], Params]  # reads the weights: stacked NumPy arrays of that dtype
    notes: tuple[str, ...] = ()  # printed for the user
    unreadable_tokenizer: bool = False  # the files have a tokenizer that can't be read, and the notes say why
