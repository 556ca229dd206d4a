"""GPT-2 in other projects' formats: its config.json at Hugging Face, and its tensors there and in llm.c.

Every key of `transformers.GPT2Config` is in one of the tables here. A key that changes the mathematics is honoured or
refused. A key that is in no table is named in a note.

The tensors are in llm.c's order, which is also that of `gpt2.Params`. Weights are (in, out) here and at Hugging Face,
whose GPT-2 calls such a layer Conv1D, and (out, in) in llm.c.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import config_json
from jaxgpt.interop.tensors import NUMBER, Part, Table
from jaxgpt.layers import embedding, layernorm, linear
from jaxgpt.models import gpt2
from jaxgpt.options.config import Model

KIND, NAME = "gpt2", "GPT-2"
# Sizes by GPT-2's own keys, each with its other keys and transformers' default.
SIZES: dict[str, tuple[tuple[str, ...], int]] = {
    "n_layer": (("num_hidden_layers",), 12),
    "n_head": (("num_attention_heads",), 12),
    "n_embd": (("hidden_size",), 768),
    "n_positions": (("max_position_embeddings", "n_ctx"), 1024),
    "vocab_size": ((), 50257),
}
# All names of GELU stand for its approximation with tanh.
FIXED = config_json.FIXED | {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
# Dropout, heads of other models, and the precision of attention's sums (ours are float32).
WITHOUT_EFFECT = (
    config_json.WITHOUT_EFFECT
    + """
attn_pdrop embd_pdrop n_inner reorder_and_upcast_attn resid_pdrop summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj
"""
)
_ALIASES = {alias for aliases, _ in SIZES.values() for alias in aliases}
KNOWN = _ALIASES | SIZES.keys() | FIXED.keys() | set(WITHOUT_EFFECT.split())


def model_of(path: Path, config: dict[str, Any]) -> Model:
    """Returns the model that a config.json describes. UserError, with the key, where it isn't this project's GPT-2."""
    sizes = {key: config_json.size(path, config, (key, *aliases), size) for key, (aliases, size) in SIZES.items()}
    config_json.check_fixed(path, config, FIXED, NAME)
    inner = config.get("n_inner")
    if inner is not None and (type(inner) is not int or inner != 4 * sizes["n_embd"]):
        raise UserError(f"{shown(path)}: n_inner is {shown(inner)}; this project's GPT-2 has four times n_embd")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(
            f"{shown(path)}: n_embd is {sizes['n_embd']}, and {sizes['n_head']} heads (n_head) don't divide it"
        )
    config_json.check_architectures(path, config, "GPT2", "GPT2LMHeadModel")
    return Model(
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        width=sizes["n_embd"],
        context=sizes["n_positions"],
        vocabulary_size=sizes["vocab_size"],
    )


def content_of(model: Model) -> dict[str, object]:
    """Returns the keys of config.json that are GPT-2's own. Dropout is off, as it was in training."""
    sizes = {"vocab_size": model.vocabulary_size, "n_positions": model.context, "n_ctx": model.context}
    sizes |= {"n_embd": model.width, "n_layer": model.layers, "n_head": model.heads, "n_inner": None}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": KIND,
        **sizes,
        **{key: FIXED[key][0] for key in ("activation_function", "layer_norm_epsilon")},
        "initializer_range": 0.02,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **{key: FIXED[key][0] for key in ("scale_attn_weights", "tie_word_embeddings")},
    }


# Tensors

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
    if model.family != KIND:
        raise UserError(
            f"a model of the family {model.family} (--model.family) can't be written in this format, which has the "
            f"tensors of {KIND} only. --to run writes it as a run's folder"
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
