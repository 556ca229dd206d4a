"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Llama with a mixture of experts in place of each block's MLP.

    x = x + attention(rmsnorm(x)),  x = x + experts(rmsnorm(x))        L blocks; all else is as in `llama.py`

    loss = next token's + router_balance · balance + router_z · z       (`layers/router.py`)

balance is that of all layers together, as transformers has it: of each expert's mean load and mean probability over the
layers; z is a mean over the layers too. Both are of the tokens that are computed with at once. So on several devices,
and with several micro-batches, they are means over the devices' parts of the micro-batches, weighted by their targets.
An expert of one part then may be busy where it is idle in another, and still the loss asks for balance in each.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxgpt.errors import UserError
from jaxgpt.layers import embedding, linear, moe, random, residual, rmsnorm, router, unembedding
from jaxgpt.layers.numerics import not_before
from jaxgpt.models import grouped_attention, llama, norms
from jaxgpt.models.attend import MLP, Cache, KeptText, WholeText
from jaxgpt.models.blocks import Aux, Context, Inputs, Projection, kept
from jaxgpt.models.llama import LEARNED_POSITIONS, Params, decays, feed_forward, head
from jaxgpt.models.stack import backward_blocks, drop_embedded, drop_embedded_backward, forward_blocks
from jaxgpt.options.config import Model

__all__ = ["LEARNED_POSITIONS", "Params", "decays", "head"]  # Llama's, as they are


class Block(NamedTuple):
    """One block's parameters; the first five are `grouped_attention.Params`. F = `feed_forward`."""

    attention_norm: rmsnorm.Params
    qkv: linear.Params  # C to (H + 2K) D: queries, keys, values
    query_norm: rmsnorm.Params | None
    key_norm: rmsnorm.Params | None
    attention_out: linear.Params  # H D to C
    mlp_norm: rmsnorm.Params
    experts: moe.Params


class BlockResiduals(NamedTuple):
    """Residuals of a block; the first five are `grouped_attention.Residuals`.

    None for what `compute.recompute` has computed again. The experts keep their gates' and up projections' outputs at
    every level but "block"; from "gelu" on their activations are computed again, from "norms" on their inputs.
    """

    attention_norm: rmsnorm.Residuals
    qkv: linear.Residuals | None
    query_norm: rmsnorm.Residuals | None
    key_norm: rmsnorm.Residuals | None
    attention: Any  # as `attend` has them
    mlp_norm: rmsnorm.Residuals  # x None where it is computed again
    experts: moe.Residuals
    aux: router.Statistics


class Residuals(NamedTuple):
    embedding: embedding.Residuals
    blocks: Any  # as the parameters' blocks are: BlockResiduals, or with recompute = "block" the blocks' inputs
    final_norm: rmsnorm.Residuals
    starts: Int[Array, "B T"] | None  # the inputs'
    dprobability: Float[Array, " E"]  # the balance's gradient by each layer's probability


def check(model: Model) -> None:
    """Raises UserError for a shape that this family can't have."""
    grouped_attention.check(model)
    if model.experts < 1:
        raise UserError("--model.experts is 0; with --model.family mixtral there must be one at least, as 8 in Mixtral")
    if model.experts_per_token > model.experts:
        raise UserError(
            f"--model.experts-per-token is {model.experts_per_token}, but --model.experts is {model.experts}: a token "
            "goes to at most all experts"
        )


def init(model: Model, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Params:
    """Llama's weights, and for each expert those of an MLP."""
    L, E, C, F = model.layers, model.experts, model.width, feed_forward(model)
    dense = llama.init(model, key, dtype)
    keys = iter(jax.random.split(jax.random.fold_in(key, E), 3))

    def normal(*shape: int, deviation: float = 0.02) -> Float[Array, "..."]:
        return deviation * random.normal(next(keys), shape, dtype)

    experts = moe.Params(
        router=router.Params(normal(L, C, E)),
        w_in=normal(L, E, C, 2 * F),
        w_out=normal(L, E, F, C, deviation=0.02 / math.sqrt(2 * L)),
    )
    own = {name: getattr(dense.blocks, name) for name in Block._fields if name != "experts"}
    return Params(dense.embedding, Block(**own, experts=experts), dense.final_norm, dense.head)


def parameter_count(model: Model, *, active: bool = False, padded: bool = False) -> int:
    """Number of parameters, or of those that are `active` for one token, which goes to `experts_per_token` experts.

    `padded` counts the tables' unused rows too.
    """
    C, experts = model.width, model.experts_per_token if active else model.experts
    more = (experts - 1) * 3 * C * feed_forward(model) + C * model.experts
    return llama.parameter_count(model, padded=padded) + model.layers * more


def flops_per_token(model: Model, length: int, *, recompute: str = "none") -> float:
    """Operations of the model's matrix products, forward and backward, for a token of sequences of this length.

    As Llama's, whose MLP counts once for each of the k experts that a token goes to, and the router's 2 C E. With
    recompute = "block" the backward has each block's forward once more, but for the experts' last product.
    """
    C, F, k = model.width, feed_forward(model), model.experts_per_token
    more = (k - 1) * 6 * C * F + 2 * C * model.experts
    again = {"block": more - (k - 1) * 2 * C * F}.get(recompute, 0)
    return llama.flops_per_token(model, length, recompute=recompute) + model.layers * (3 * more + again)


def describe(model: Model) -> str:
    """One line for people."""
    return (
        f"Mixtral, {parameter_count(model):,} parameters, {parameter_count(model, active=True):,} of them for a token: "
        f"{model.layers} layers, {grouped_attention.heads(model)}, width {model.width}, {model.experts} experts of "
        f"feed-forward {feed_forward(model)}, {model.experts_per_token} for a token, "
        f"{grouped_attention.context(model)}, vocabulary {model.vocabulary_size:,}"
    )


def projections(model: Model) -> dict[str, Projection]:
    """The products that LoRA can adapt, by their names at Hugging Face: those of attention, not of the experts."""
    return grouped_attention.projections(model)


def columns(model: Model) -> dict[str, tuple[int, ...]]:
    """Columns of the matrices that lie side by side in a tensor, by the name of its field: attention's; gate, up."""
    return grouped_attention.columns(model) | {"w_in": (feed_forward(model),) * 2}


def block_forward(
    params: Block, x: Float[Array, "N C"], attend: WholeText | KeptText, context: Context
) -> tuple[Float[Array, "N C"], BlockResiduals]:
    """One block on N = B·T tokens, of which `attend` says what text they see."""
    model, keep = context.model, kept(context.compute.recompute)
    x, attention = grouped_attention.forward(params, x, attend, keep)

    normalised, mlp_norm = norms.forward(params.mlp_norm, x, context)
    branch, statistics, experts = moe.forward(
        params.experts, normalised, choices=model.experts_per_token, softmax=model.router_softmax
    )
    x = residual.forward(x, attend.drop(branch, MLP))
    return x, BlockResiduals(
        *attention,
        mlp_norm=mlp_norm if keep.projection else mlp_norm._replace(x=None),
        experts=experts._replace(
            router=experts.router if keep.norms else experts.router._replace(x=None),
            activated=experts.activated if keep.activation else None,
        ),
        aux=statistics,
    )


def block_backward(
    params: Block,
    residuals: BlockResiduals,
    dx: Float[Array, "N C"],
    attend: WholeText,
    dstatistics: router.Statistics,
) -> tuple[Block, Float[Array, "N C"]]:
    """Backward of a block: `block_forward` from its last line to its first."""
    first, again = dx, functools.partial(not_before, earlier=dx)
    middle = residuals.mlp_norm.x
    if middle is None:
        middle = grouped_attention.output(params, residuals, dx, attend)

    dx, dbranch = residual.backward(dx)
    dbranch = attend.drop_backward(dbranch, MLP)
    mlp_norm_kept, kept = residuals.mlp_norm._replace(x=middle), residuals.experts
    if kept.router.x is None:
        normalised = norms.output(params.mlp_norm, again(dbranch, mlp_norm_kept))
        kept = kept._replace(router=kept.router._replace(x=normalised))
    experts, dnormalised = moe.backward(
        params.experts, kept, dbranch, dstatistics, softmax=attend.context.model.router_softmax
    )
    mlp_norm, dx = norms.backward(params.mlp_norm, mlp_norm_kept, dnormalised, dx, attend.context, earlier=first)

    attention, dx = grouped_attention.backward(params, residuals, dx, attend, first)
    return Block(*attention, mlp_norm, experts), dx


def features(
    params: Params, inputs: Inputs, context: Context, caches: tuple[Cache, ...] = ()
) -> tuple[Float[Array, "N C"], Residuals, Aux]:
    """All of the model but the head, for N = B·T tokens, and the router's losses.

    With `caches` the tokens are further ones of each text, as `cache.extend` has them.
    """
    model = context.model
    x, embedding_residuals = embedding.forward(params.embedding, inputs.tokens)
    x = drop_embedded(x.reshape(-1, model.width), context)
    x, blocks, statistics = forward_blocks(block_forward, params.blocks, x, inputs, context, caches)
    x, final_norm = norms.forward(params.final_norm, x, context)
    balance, dprobability = router.balance(statistics)
    z = jnp.mean(statistics.z)
    metrics = {"router_balance": balance, "router_z": z, "router_largest_load": jnp.max(statistics.load)}
    aux = Aux(model.router_balance * balance + model.router_z * z, metrics)
    return x, Residuals(embedding_residuals, blocks, final_norm, inputs.starts, dprobability), aux


def features_backward(
    params: Params,
    residuals: Residuals,
    dx: Float[Array, "N C"],
    dhead: unembedding.Params,
    daux: Any,
    context: Context,
) -> Params:
    """The gradient by every parameter, in the accumulation dtype; `dhead` is the head's, of either table."""
    model, dprobability = context.model, residuals.dprobability
    final_norm, dx = norms.backward(params.final_norm, residuals.final_norm, dx, None, context)
    dstatistics = router.Statistics(
        load=jnp.zeros_like(dprobability),  # a count
        probability=daux * model.router_balance * dprobability,
        z=jnp.asarray(daux * model.router_z / model.layers, dprobability.dtype),
    )
    inputs = Inputs(residuals.embedding.tokens, residuals.starts)
    backward = functools.partial(block_backward, dstatistics=dstatistics)
    blocks, dx = backward_blocks(block_forward, backward, params.blocks, residuals.blocks, dx, inputs, context)
    dx = drop_embedded_backward(dx, context).reshape(*inputs.tokens.shape, model.width)
    tied = dhead.weight if params.head is None else None
    embeddings = embedding.backward(params.embedding, residuals.embedding, dx, token_gradient=tied)
    return Params(embeddings, blocks, final_norm, dhead if params.head else None)
