"""The attention half of a block of Llama's kind, which its relatives share.

    x = x + attention(rmsnorm(x)) w_out

H query heads of width D share K key and value heads. Queries and keys are turned by their places (`layers/rotary.py`),
after a norm of their own over each head's D columns where `model.query_key_norm` asks for it (Qwen Team 2025,
arXiv:2505.09388). Nothing has a bias.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.errors import UserError
from jaxgpt.layers import linear, residual, rmsnorm, rotary
from jaxgpt.layers.attention import keys_seen
from jaxgpt.layers.numerics import not_before
from jaxgpt.models import norms, projection
from jaxgpt.models.attend import ATTENTION, KeptText, WholeText, merge_heads, split_heads
from jaxgpt.models.blocks import Kept, Projection
from jaxgpt.options.config import Model


class Params(NamedTuple):
    """Parameters, by the names that they have in a family's Block."""

    attention_norm: rmsnorm.Params
    qkv: linear.Params  # C to (H + 2K) D: queries, keys, values
    query_norm: rmsnorm.Params | None  # of one head's D columns; None without norms
    key_norm: rmsnorm.Params | None
    attention_out: linear.Params  # H D to C


class Residuals(NamedTuple):
    """Residuals; None for what is computed again.

    The input of `attention_out` is attention's own output, so it is not kept twice. Where queries and keys have norms
    their inputs are kept, and from the level "norms" on attention's own queries and keys are computed from them.
    """

    attention_norm: rmsnorm.Residuals
    qkv: linear.Residuals | None
    query_norm: rmsnorm.Residuals | None
    key_norm: rmsnorm.Residuals | None
    attention: Any  # as `attend` has them


def check(model: Model) -> None:
    """Raises UserError for heads whose columns can't be paired."""
    D = model.width_per_head
    if D % 2:
        given = "--model.head-width" if model.head_width else f"--model.width {model.width} / --model.heads"
        raise UserError(
            f"--model.heads is {model.heads}, which makes heads {D} wide ({given}); with --model.family {model.family} "
            "their width must be even"
        )


def frequencies(model: Model) -> rotary.Frequencies:
    """Returns the frequencies of the rotary positions."""
    return rotary.Frequencies(
        base=model.rope_base,
        factor=1.0 if model.rope_scaling == "none" else model.rope_factor,
        linear=model.rope_scaling == "linear",
        low=model.rope_low_frequency,
        high=model.rope_high_frequency,
        original_context=model.rope_original_context,
    )


def heads(model: Model) -> str:
    """Returns the number of heads, for people."""
    shared = f" ({model.kv_heads} of keys and values)" if model.key_value_heads < model.heads else ""
    return f"{model.heads} heads{shared}"


def context(model: Model) -> str:
    """Returns how far a token sees, for people."""
    return f"context {model.context}" + (f", window {model.window}" if model.window else "")


def parameter_count(model: Model) -> int:
    """Number of a layer's parameters, its norm included."""
    C, H, K, D = model.width, model.heads, model.key_value_heads, model.width_per_head
    return C + C * (H + 2 * K) * D + H * D * C + 2 * D * model.query_key_norm


def projections(model: Model) -> dict[str, Projection]:
    """The products that LoRA can adapt, by their names at Hugging Face."""
    C, H, K, D = model.width, model.heads, model.key_value_heads, model.width_per_head
    return {
        "self_attn.q_proj": Projection("qkv", 0, C, H * D),
        "self_attn.k_proj": Projection("qkv", H * D, C, K * D),
        "self_attn.v_proj": Projection("qkv", (H + K) * D, C, K * D),
        "self_attn.o_proj": Projection("attention_out", 0, H * D, C),
    }


def columns(model: Model) -> dict[str, tuple[int, ...]]:
    """Columns of the matrices that lie side by side in a tensor, by the name of its field: queries, keys, values."""
    H, K, D = model.heads, model.key_value_heads, model.width_per_head
    return {"qkv": (H * D, K * D, K * D)}


def flops_per_token(model: Model, length: int) -> tuple[int, float, int]:
    """Operations of a layer's forward for a token: of queries, keys and values; of attention; of its projection.

    A query sees `keys_seen` keys on average, each with two products of D columns: q kᵀ and p v.
    """
    C, H, K, D = model.width, model.heads, model.key_value_heads, model.width_per_head
    return 2 * C * (H + 2 * K) * D, 4 * H * D * keys_seen(length, model.window), 2 * H * D * C


def forward(
    params: Any, x: Float[Array, "N C"], attend: WholeText | KeptText, keep: Kept
) -> tuple[Float[Array, "N C"], Residuals]:
    """Runs it on N = B·T tokens, of which `attend` says what text they see. `params` has the fields of `Params`."""
    model, batch = attend.context.model, attend.batch
    H, K, D = model.heads, model.key_value_heads, model.width_per_head
    normalised, attention_norm = norms.forward(params.attention_norm, x, attend.context)
    parts, qkv = projection.forward_in_parts(params.qkv, normalised, (H * D, (H + K) * D))
    q, k, v = (split_heads(part, batch, heads) for part, heads in zip(parts, (H, K, K), strict=True))
    query_norm = key_norm = None
    if params.query_norm is not None:
        q, query_norm = rmsnorm.forward(params.query_norm, q, epsilon=model.norm_epsilon)
        k, key_norm = rmsnorm.forward(params.key_norm, k, epsilon=model.norm_epsilon)
    q, k = (rotary.forward(part, attend.places, frequencies=frequencies(model)) for part in (q, k))
    attention: Any
    mixed, attention = attend.forward(q, k, v)
    branch, _ = projection.forward(params.attention_out, merge_heads(mixed))
    if query_norm is not None and not keep.norms:
        attention = attention._replace(q=None, k=None)
    qkv = qkv if keep.norms else None
    return residual.forward(x, attend.drop(branch, ATTENTION)), Residuals(
        attention_norm, qkv, query_norm, key_norm, attention
    )


def backward(
    params: Any, residuals: Any, dx: Float[Array, "N C"], attend: WholeText, earlier: Float[Array, "N C"]
) -> tuple[Params, Float[Array, "N C"]]:
    """`forward` from its last line to its first; `earlier` is the gradient that the block's backward begins with.

    `residuals` has the fields of `Residuals`.
    """
    model, again = attend.context.model, functools.partial(not_before, earlier=earlier)
    turned = {"frequencies": frequencies(model)}
    dx, dbranch = residual.backward(dx)
    dbranch = attend.drop_backward(dbranch, ATTENTION)
    mixed, attention = attend.output(residuals.attention), residuals.attention
    attention_out, dmixed = projection.backward(params.attention_out, linear.Residuals(merge_heads(mixed)), dbranch)
    dmixed = split_heads(dmixed, attend.batch, model.heads)
    if attention.q is None:
        kept = again(dmixed, (residuals.query_norm, residuals.key_norm))
        q, k = (rmsnorm.output(*of) for of in zip((params.query_norm, params.key_norm), kept, strict=True))
        attention = attend.with_inputs(attention, *(rotary.forward(part, attend.places, **turned) for part in (q, k)))
    dq, dk, dv = attend.backward(attention, dmixed)
    dq, dk = (rotary.backward(part, attend.places, **turned) for part in (dq, dk))
    query_norm = key_norm = None
    if residuals.query_norm is not None and residuals.key_norm is not None:
        query_norm, dq = rmsnorm.backward(params.query_norm, again(dq, residuals.query_norm), dq)
        key_norm, dk = rmsnorm.backward(params.key_norm, again(dk, residuals.key_norm), dk)
    dqkv = jnp.concatenate([merge_heads(part) for part in (dq, dk, dv)], axis=-1)
    normalised = residuals.qkv or linear.Residuals(
        norms.output(params.attention_norm, again(dqkv, residuals.attention_norm))
    )
    qkv, dnormalised = projection.backward(params.qkv, normalised, dqkv)
    attention_norm, dx = norms.backward(
        params.attention_norm, residuals.attention_norm, dnormalised, dx, attend.context, earlier=earlier
    )
    return Params(attention_norm, qkv, query_norm, key_norm, attention_out), dx


def output(params: Any, residuals: Any, dx: Float[Array, "N C"], attend: WholeText) -> Float[Array, "N C"]:
    """Forward's output from its residuals, which costs the product with `attention_out`."""
    branch, _ = projection.forward(
        not_before(dx, params.attention_out), merge_heads(attend.output(residuals.attention))
    )
    return residual.forward(not_before(dx, residuals.attention_norm.x), attend.drop(branch, ATTENTION))
