"""The names and layouts of GPT-2's tensors in this project, in llm.c and at Hugging Face.

The order is llm.c's, which is also that of `gpt2.Params`. Weights are (in, out) here and at Hugging Face, whose GPT-2
calls such a layer Conv1D, and (out, in) in llm.c.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxgpt.errors import UserError
from jaxgpt.interop.tensors import NUMBER, Part, Table
from jaxgpt.layers import embedding, layernorm, linear
from jaxgpt.models import gpt2
from jaxgpt.options.config import Model

FAMILY = "gpt2"  # the family of models with these tensors
TOKEN = "wte.weight"


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


def table(model: Model) -> Table:
    """Returns the table of a Hugging Face folder."""

    def part(tensor: Tensor) -> Part:
        full = shape(tensor, model)[tensor.stacked :]  # of one layer
        if tensor.huggingface == TOKEN:
            return Part(tensor.ours, TOKEN, (), (model.vocabulary_size, *full[1:]), (slice(model.vocabulary_size),))
        if not tensor.stacked:
            return Part(tensor.ours, tensor.huggingface, (), full)
        return Part(tensor.ours, f"h.{NUMBER}.{tensor.huggingface}", (model.layers,), full)

    return Table(
        kind="a GPT-2",
        prefix="transformer.",
        token=TOKEN,
        head="lm_head.weight",
        passed_over=r"h\.\d{1,9}\.attn\.(bias|masked_bias)",  # the causal mask
        parts=tuple(part(tensor) for tensor in TENSORS),
    )
