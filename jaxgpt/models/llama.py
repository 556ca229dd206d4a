"""Llama (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783) and its dense relatives.

    x = token[tokens]                                              embedding, without positions
    x = x + attention(rmsnorm(x)),  x = x + mlp(rmsnorm(x))        L blocks; queries and keys are turned by their places
    features = rmsnorm(x)                                          the head is a table of its own, or the token table

    mlp(x) = (silu(x w_gate) · x w_up) w_out                       SwiGLU

No layer has a bias. Mistral (Jiang et al. 2023, arXiv:2310.06825) has `model.window`; Qwen3 (Qwen Team 2025,
arXiv:2505.09388) `model.query_key_norm`; SmolLM2 (Ben Allal et al. 2025, arXiv:2502.02737) is a small Llama with tied
tables. `features_backward` is `features` read from its last line to its first. Gradients come back in float32, float64
in float64.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxgpt.errors import UserError
from jaxgpt.layers import embedding, linear, random, residual, rmsnorm, swiglu, unembedding
from jaxgpt.layers.numerics import not_before
from jaxgpt.models import grouped_attention, norms, projection
from jaxgpt.models.attend import MLP, Cache, KeptText, WholeText
from jaxgpt.models.blocks import NO_AUX, Aux, Context, Inputs, Projection, kept
from jaxgpt.models.stack import backward_blocks, drop_embedded, drop_embedded_backward, forward_blocks
from jaxgpt.options.config import Model

LEARNED_POSITIONS = False  # so a text may go on beyond the context
# Names of the tensors that are matrices, one for each layer; the last two are those of Mixtral's experts.
MATRICES = ("token", "weight", "w_in", "w_out")


class Block(NamedTuple):
    """One block's parameters; the first five are `grouped_attention.Params`. F = `feed_forward`."""

    attention_norm: rmsnorm.Params
    qkv: linear.Params  # C to (H + 2K) D: queries, keys, values
    query_norm: rmsnorm.Params | None
    key_norm: rmsnorm.Params | None
    attention_out: linear.Params  # H D to C
    mlp_norm: rmsnorm.Params
    mlp_in: linear.Params  # C to 2F: gate, up
    mlp_out: linear.Params  # F to C


class Params(NamedTuple):
    embedding: embedding.Params
    blocks: Any  # all Blocks on a leading L axis ("stacked"), or a tuple of them
    final_norm: rmsnorm.Params
    head: unembedding.Params | None  # None where it is the token table


class BlockResiduals(NamedTuple):
    """Residuals of a block; the first five are `grouped_attention.Residuals`.

    None for what `compute.recompute` has computed again.
    """

    attention_norm: rmsnorm.Residuals
    qkv: linear.Residuals | None
    query_norm: rmsnorm.Residuals | None
    key_norm: rmsnorm.Residuals | None
    attention: Any  # as `attend` has them
    mlp_norm: rmsnorm.Residuals  # x None where it is computed again
    mlp_in: linear.Residuals | None
    swiglu: swiglu.Residuals
    mlp_out: linear.Residuals | None


class Residuals(NamedTuple):
    embedding: embedding.Residuals
    blocks: Any  # as the parameters' blocks are: BlockResiduals, or with recompute = "block" the blocks' inputs
    final_norm: rmsnorm.Residuals
    starts: Int[Array, "B T"] | None  # the inputs'


def check(model: Model) -> None:
    """Raises UserError for a shape that this family can't have."""
    grouped_attention.check(model)
    if model.experts:
        raise UserError(
            f"--model.experts is {model.experts}; with --model.family llama there are none (0). A mixture of experts "
            "is of the family mixtral"
        )


def feed_forward(model: Model) -> int:
    """F: two thirds of 4C, since there are three products rather than two, and rounded up to a multiple of 32."""
    return model.feed_forward or -(-8 * model.width // 3 // 32) * 32


def init(model: Model, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Params:
    """Normal(0, 0.02) weights, 0.02/√(2L) for the two projections into the residual stream, scales 1.

    Both tables' rows beyond the vocabulary are 0.
    """
    L, C, F = model.layers, model.width, feed_forward(model)
    H, K, D = model.heads, model.key_value_heads, model.width_per_head
    V, Vp = model.vocabulary_size, model.padded_vocabulary_size
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int, deviation: float = 0.02) -> Float[Array, "..."]:
        return deviation * random.normal(next(keys), shape, dtype)

    def table() -> Float[Array, "Vp C"]:
        return jnp.where(jnp.arange(Vp)[:, None] < V, normal(Vp, C), 0)

    def norm(*shape: int) -> rmsnorm.Params:
        return rmsnorm.Params(jnp.ones(shape, dtype))

    into_stream = 0.02 / math.sqrt(2 * L)
    return Params(
        embedding=embedding.Params(table()),
        blocks=Block(
            attention_norm=norm(L, C),
            qkv=linear.Params(normal(L, C, (H + 2 * K) * D)),
            query_norm=norm(L, D) if model.query_key_norm else None,
            key_norm=norm(L, D) if model.query_key_norm else None,
            attention_out=linear.Params(normal(L, H * D, C, deviation=into_stream)),
            mlp_norm=norm(L, C),
            mlp_in=linear.Params(normal(L, C, 2 * F)),
            mlp_out=linear.Params(normal(L, F, C, deviation=into_stream)),
        ),
        final_norm=norm(C),
        head=None if model.tied else unembedding.Params(table()),
    )


def parameter_count(model: Model, *, active: bool = False, padded: bool = False) -> int:
    """Number of parameters; `padded` counts the tables' unused rows too. All are `active` for every token."""
    L, C, rows = model.layers, model.width, model.padded_vocabulary_size if padded else model.vocabulary_size
    layer = grouped_attention.parameter_count(model) + C + 3 * C * feed_forward(model)
    return (2 - model.tied) * rows * C + L * layer + C


def flops_per_token(model: Model, length: int, *, recompute: str = "none") -> float:
    """Operations of the model's matrix products, forward and backward, for a token of sequences of this length.

    Forward, with a query seeing S keys on average ((T+1)/2 without a window); the backward has two products for each:

        attention    2 C (H + 2K) D + 4 H D S + 2 H D C      queries, keys and values; q kᵀ and p v; the projection
        MLP          2·3 C F
        classifier   2 C Vp

    With recompute = "block" the backward has each block's forward once more, but for its last product; with
    "projection" that of attention's output.
    """
    C, F = model.width, feed_forward(model)
    qkv, attention, projection = grouped_attention.flops_per_token(model, length)
    layer = qkv + attention + projection + 6 * C * F
    again = {"projection": projection, "block": layer - 2 * C * F}.get(recompute, 0)
    forward = model.layers * layer + 2 * C * model.padded_vocabulary_size
    return 3 * forward + model.layers * again


def describe(model: Model) -> str:
    """One line for people."""
    return (
        f"Llama, {parameter_count(model):,} parameters: {model.layers} layers, {grouped_attention.heads(model)}, width "
        f"{model.width}, feed-forward {feed_forward(model)}, {grouped_attention.context(model)}, vocabulary "
        f"{model.vocabulary_size:,}"
    )


def decays(params: Params) -> Params:
    """Marks with True the tensors that weight decay applies to: the tables and the blocks' weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].name in MATRICES, params)


def projections(model: Model) -> dict[str, Projection]:
    """The products that LoRA can adapt, by their names at Hugging Face."""
    C, F = model.width, feed_forward(model)
    return grouped_attention.projections(model) | {
        "mlp.gate_proj": Projection("mlp_in", 0, C, F),
        "mlp.up_proj": Projection("mlp_in", F, C, F),
        "mlp.down_proj": Projection("mlp_out", 0, F, C),
    }


def columns(model: Model) -> dict[str, tuple[int, ...]]:
    """Columns of the matrices that lie side by side in a tensor, by the name of its field: attention's; gate, up."""
    return grouped_attention.columns(model) | {"mlp_in": (feed_forward(model),) * 2}


def head(params: Params) -> unembedding.Params:
    """The unembedding: a table of its own, or the token table."""
    return unembedding.Params(params.embedding.token) if params.head is None else params.head


def block_forward(
    params: Block, x: Float[Array, "N C"], attend: WholeText | KeptText, context: Context
) -> tuple[Float[Array, "N C"], BlockResiduals]:
    """One block on N = B·T tokens, of which `attend` says what text they see."""
    keep = kept(context.compute.recompute)
    x, attention = grouped_attention.forward(params, x, attend, keep)

    normalised, mlp_norm = norms.forward(params.mlp_norm, x, context)
    (gate, up), mlp_in = projection.forward_in_parts(params.mlp_in, normalised, 2)
    activated, swiglu_residuals = swiglu.forward(gate, up)
    branch, mlp_out = projection.forward(params.mlp_out, activated)
    x = residual.forward(x, attend.drop(branch, MLP))
    return x, BlockResiduals(
        *attention,
        mlp_norm=mlp_norm if keep.projection else mlp_norm._replace(x=None),
        mlp_in=mlp_in if keep.norms else None,
        swiglu=swiglu_residuals,
        mlp_out=mlp_out if keep.activation else None,
    )


def block_backward(
    params: Block, residuals: BlockResiduals, dx: Float[Array, "N C"], attend: WholeText
) -> tuple[Block, Float[Array, "N C"]]:
    """Backward of a block: `block_forward` from its last line to its first."""
    first, again = dx, functools.partial(not_before, earlier=dx)
    middle = residuals.mlp_norm.x
    if middle is None:
        middle = grouped_attention.output(params, residuals, dx, attend)

    dx, dbranch = residual.backward(dx)
    dbranch = attend.drop_backward(dbranch, MLP)
    activated = residuals.mlp_out or linear.Residuals(swiglu.output(again(dbranch, residuals.swiglu)))
    mlp_out, dactivated = projection.backward(params.mlp_out, activated, dbranch)
    dhidden = jnp.concatenate(swiglu.backward(again(dactivated, residuals.swiglu), dactivated), axis=-1)
    mlp_norm_kept = residuals.mlp_norm._replace(x=middle)
    normalised = residuals.mlp_in or linear.Residuals(norms.output(params.mlp_norm, again(dhidden, mlp_norm_kept)))
    mlp_in, dnormalised = projection.backward(params.mlp_in, normalised, dhidden)
    mlp_norm, dx = norms.backward(params.mlp_norm, mlp_norm_kept, dnormalised, dx, attend.context, earlier=first)

    attention, dx = grouped_attention.backward(params, residuals, dx, attend, first)
    return Block(*attention, mlp_norm, mlp_in, mlp_out), dx


def features(
    params: Params, inputs: Inputs, context: Context, caches: tuple[Cache, ...] = ()
) -> tuple[Float[Array, "N C"], Residuals, Aux]:
    """All of the model but the head, for N = B·T tokens.

    With `caches` the tokens are further ones of each text, as `cache.extend` has them.
    """
    x, embedding_residuals = embedding.forward(params.embedding, inputs.tokens)
    x = drop_embedded(x.reshape(-1, context.model.width), context)
    x, blocks, _ = forward_blocks(block_forward, params.blocks, x, inputs, context, caches)
    x, final_norm = norms.forward(params.final_norm, x, context)
    return x, Residuals(embedding_residuals, blocks, final_norm, inputs.starts), NO_AUX


def features_backward(
    params: Params,
    residuals: Residuals,
    dx: Float[Array, "N C"],
    dhead: unembedding.Params,
    daux: Any,
    context: Context,
) -> Params:
    """The gradient by every parameter, in the accumulation dtype; `dhead` is the head's, of either table."""
    final_norm, dx = norms.backward(params.final_norm, residuals.final_norm, dx, None, context)
    inputs = Inputs(residuals.embedding.tokens, residuals.starts)
    blocks, dx = backward_blocks(block_forward, block_backward, params.blocks, residuals.blocks, dx, inputs, context)
    dx = drop_embedded_backward(dx, context).reshape(*inputs.tokens.shape, context.model.width)
    tied = dhead.weight if params.head is None else None
    embeddings = embedding.backward(params.embedding, residuals.embedding, dx, token_gradient=tied)
    return Params(embeddings, blocks, final_norm, dhead if params.head else None)
