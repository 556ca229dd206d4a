"""Weights in any format, and the names and layouts of GPT-2's tensors in this project, in llm.c and at Hugging Face.

The order is llm.c's, which is also that of `gpt2.Params`. Weights are (in, out) here and at Hugging Face, whose GPT-2
calls such a layer Conv1D, and (out, in) in llm.c.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.layers import embedding, layernorm, linear
from jaxgpt.models import gpt2
from jaxgpt.models.blocks import Adapters, Params
from jaxgpt.options.config import Lora, Model

FAMILY = "gpt2"  # the family of models with these tensors
DTYPES = {dtype.name: dtype for dtype in map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16))}


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
    notes: tuple[str, ...] = ()  # printed for the user
    unreadable_tokenizer: bool = False  # the files have a tokenizer that can't be read, and the notes say why
    adapters: AdapterSource | None = None  # where the files have adapters alone, which `load` merges into their base


@dataclass(frozen=True)
class Tensor:
    """One tensor of the whole model, or one of each block."""

    ours: str  # path in gpt2.Params
    llmc: str
    huggingface: str  # name within the block, where it is a block's
    axes: tuple[str, ...]  # axes of one layer; T is the context
    stacked: bool = True  # each block has one

    @property
    def is_weight(self) -> bool:
        """Returns whether it is a matrix that llm.c stores as (out, in)."""
        return self.stacked and len(self.axes) == 2


def _norm(ours: str, llmc: str, huggingface: str, *, stacked: bool = True) -> Any:
    return layernorm.Params(
        Tensor(f"{ours}.scale", f"{llmc}w", f"{huggingface}.weight", ("C",), stacked),  # type: ignore[arg-type]
        Tensor(f"{ours}.bias", f"{llmc}b", f"{huggingface}.bias", ("C",), stacked),  # type: ignore[arg-type]
    )


def _dense(ours: str, llmc: str, huggingface: str, inputs: str, outputs: str) -> Any:
    return linear.Params(
        Tensor(f"{ours}.weight", f"{llmc}w", f"{huggingface}.weight", (inputs, outputs)),  # type: ignore[arg-type]
        Tensor(f"{ours}.bias", f"{llmc}b", f"{huggingface}.bias", (outputs,)),  # type: ignore[arg-type]
    )


LAYOUT = gpt2.Params(  # with a Tensor in the place of each array
    embedding=embedding.Params(
        Tensor("embedding.token", "wte", "wte.weight", ("Vp", "C"), stacked=False),  # type: ignore[arg-type]
        Tensor("embedding.position", "wpe", "wpe.weight", ("T", "C"), stacked=False),  # type: ignore[arg-type]
    ),
    blocks=gpt2.Block(
        attention_norm=_norm("blocks.attention_norm", "ln1", "ln_1"),
        qkv=_dense("blocks.qkv", "qkv", "attn.c_attn", "C", "3C"),
        attention_out=_dense("blocks.attention_out", "attproj", "attn.c_proj", "C", "C"),
        mlp_norm=_norm("blocks.mlp_norm", "ln2", "ln_2"),
        mlp_in=_dense("blocks.mlp_in", "fc", "mlp.c_fc", "C", "4C"),
        mlp_out=_dense("blocks.mlp_out", "fcproj", "mlp.c_proj", "4C", "C"),
    ),
    final_norm=_norm("final_norm", "lnf", "ln_f", stacked=False),
)
TENSORS: tuple[Tensor, ...] = tuple(jax.tree.leaves(LAYOUT))


def check(model: Model) -> None:
    """Raises a UserError for a model of another family, whose tensors have no names here."""
    if model.family != FAMILY:
        raise UserError(
            f"a model of the family {model.family} (--model.family) can't be written in this format, which has the "
            f"tensors of {FAMILY} only. --to run writes it as a run's folder"
        )


def shape(tensor: Tensor, model: Model) -> tuple[int, ...]:
    """Returns the shape of the whole tensor, with a leading L axis where it is stacked."""
    C = model.width
    sizes = {"Vp": model.padded_vocabulary_size, "T": model.context, "C": C, "3C": 3 * C, "4C": 4 * C}
    return (*[model.layers] * tensor.stacked, *(sizes[axis] for axis in tensor.axes))


def count(model: Model) -> int:
    """Returns the count of numbers in all tensors, padded rows of the embedding included; a plain int of any size."""
    return sum(math.prod(shape(tensor, model)) for tensor in TENSORS)


def from_named(arrays: Mapping[str, Any]) -> gpt2.Params:
    """Builds parameters from arrays by our names."""
    return jax.tree.map(lambda tensor: arrays[tensor.ours], LAYOUT)


def paired(params: gpt2.Params) -> Iterator[tuple[Tensor, Any]]:
    """Pairs tensors with the arrays of stacked parameters or gradients, in llm.c's order."""
    return zip(TENSORS, jax.tree.leaves(params), strict=True)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds an array to one of DTYPES. UserError, with the tensor's name, for a number beyond float16's largest."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == DTYPES["float16"] and np.isinf(result).sum() > np.isinf(array).sum():
        raise UserError(f"{name} has numbers beyond 65504, the largest of float16: take bfloat16 or float32 (--dtype)")
    return result
