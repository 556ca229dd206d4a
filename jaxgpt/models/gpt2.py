"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    x = token[tokens] + position                                   embedding
    x = x + attention(layernorm(x)),  x = x + mlp(layernorm(x))    L blocks
    loss = cross_entropy(layernorm(x) tokenᵀ, targets)             unembedding, tied to the embedding

`loss_and_grads` is the forward pass read from its last line to its first. Blocks are stacked on a leading L axis and
walked by one loop, or apart and written out one after another. With float32 masters the caller casts the parameters to
the compute dtype (`training/step.py`); gradients come back in float32, float64 in float64.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxgpt.config import Compute, Model
from jaxgpt.kernels import cudnn_attention
from jaxgpt.kernels.choose import attention_layer
from jaxgpt.layers import attention, cross_entropy, embedding, gelu, layernorm, linear, random, residual, unembedding
from jaxgpt.layers.numerics import not_before

MATRICES = ("token", "position", "weight")  # names of the tensors that are matrices, one for each layer


class Block(NamedTuple):
    """One block's parameters. F = 4C."""

    attention_norm: layernorm.Params
    qkv: linear.Params  # C to 3C: queries, keys, values
    attention_out: linear.Params  # C to C
    mlp_norm: layernorm.Params
    mlp_in: linear.Params  # C to F
    mlp_out: linear.Params  # F to C


class Params(NamedTuple):
    embedding: embedding.Params
    blocks: Block | tuple[Block, ...]  # all on a leading L axis ("stacked"), or apart
    final_norm: layernorm.Params


Movement = Callable[[Block], Block]  # of a block's parameters or gradients, between devices


def as_it_is(block: Block) -> Block:
    return block


class BlockResiduals(NamedTuple):
    """What a block keeps; None what `compute.recompute` has computed again.

    The input of `attention_out` is attention's own output, so it is not kept twice.
    """

    attention_norm: layernorm.Residuals
    qkv: linear.Residuals | None
    attention: attention.Residuals | cudnn_attention.Residuals
    mlp_norm: layernorm.Residuals
    mlp_in: linear.Residuals | None
    gelu: gelu.Residuals
    mlp_out: linear.Residuals | None


class Residuals(NamedTuple):
    embedding: embedding.Residuals
    blocks: Any  # as the parameters' blocks are: BlockResiduals, or with recompute = "block" the blocks' inputs
    final_norm: layernorm.Residuals


def init(model: Model, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Params:
    """Normal(0, 0.02) weights, 0.02/√(2L) for the two projections into the residual stream, biases 0, scales 1.

    The embedding's rows beyond the vocabulary are 0.
    """
    L, C, V, Vp = model.layers, model.width, model.vocabulary_size, model.padded_vocabulary_size
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int, deviation: float = 0.02) -> Float[Array, "..."]:
        return deviation * random.normal(next(keys), shape, dtype)

    def dense(inputs: int, outputs: int, deviation: float = 0.02) -> linear.Params:
        return linear.Params(normal(L, inputs, outputs, deviation=deviation), jnp.zeros((L, outputs), dtype))

    def norm(*shape: int) -> layernorm.Params:
        return layernorm.Params(jnp.ones(shape, dtype), jnp.zeros(shape, dtype))

    into_stream = 0.02 / math.sqrt(2 * L)
    token = jnp.where(jnp.arange(Vp)[:, None] < V, normal(Vp, C), 0)
    return Params(
        embedding=embedding.Params(token, normal(model.context, C)),
        blocks=Block(
            attention_norm=norm(L, C),
            qkv=dense(C, 3 * C),
            attention_out=dense(C, C, into_stream),
            mlp_norm=norm(L, C),
            mlp_in=dense(C, 4 * C),
            mlp_out=dense(4 * C, C, into_stream),
        ),
        final_norm=norm(C),
    )


def parameter_count(model: Model, *, padded: bool = False) -> int:
    """Number of trained numbers; `padded` counts the embedding's unused rows too."""
    L, C, rows = model.layers, model.width, model.padded_vocabulary_size if padded else model.vocabulary_size
    block = 2 * 2 * C + (C * 3 * C + 3 * C) + (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C)
    return rows * C + model.context * C + L * block + 2 * C


def matrix_shaped(params: Params) -> Params:
    """True for the tensors that weight decay applies to: the embeddings and the blocks' weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].name in MATRICES, params)


def unstacked(params: Params) -> Params:
    """The same parameters with each block's apart."""
    if not isinstance(params.blocks, Block):
        return params
    leaves, block = jax.tree.flatten(params.blocks)
    return params._replace(blocks=tuple(jax.tree.unflatten(block, layer) for layer in zip(*leaves, strict=True)))


def stacked(params: Params) -> Params:
    """The same parameters with all blocks' on a leading L axis."""
    if isinstance(params.blocks, Block):
        return params
    return params._replace(blocks=jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.blocks))


def block_forward(
    params: Block,
    x: Float[Array, "N C"],
    batch: int,
    model: Model,
    compute: Compute,
    starts: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "N C"], BlockResiduals]:
    """One block on N = B·T tokens; `starts` as `document_starts` has them."""
    normalised, attention_norm = layernorm.forward(params.attention_norm, x)
    qkv, qkv_residuals = linear.forward(params.qkv, normalised)
    q, k, v = (split_heads(part, batch, model.heads) for part in jnp.split(qkv, 3, axis=-1))
    mixed, attention_residuals = attention_layer(compute).forward(q, k, v, block=compute.attention_block, starts=starts)
    branch, _ = linear.forward(params.attention_out, merge_heads(mixed))
    x = residual.forward(x, branch)

    normalised, mlp_norm = layernorm.forward(params.mlp_norm, x)
    hidden, mlp_in = linear.forward(params.mlp_in, normalised)
    activated, gelu_residuals = gelu.forward(hidden)
    branch, mlp_out = linear.forward(params.mlp_out, activated)
    x = residual.forward(x, branch)
    keep_norms = compute.recompute != "norms"
    keep_gelu = compute.recompute in ("none", "block")  # a block that is computed again is computed again whole
    return x, BlockResiduals(
        attention_norm=attention_norm,
        qkv=qkv_residuals if keep_norms else None,
        attention=attention_residuals,
        mlp_norm=mlp_norm,
        mlp_in=mlp_in if keep_norms else None,
        gelu=gelu_residuals,
        mlp_out=mlp_out if keep_gelu else None,
    )


def block_backward(
    params: Block,
    residuals: BlockResiduals,
    dx: Float[Array, "N C"],
    compute: Compute,
    starts: Int[Array, "B T"] | None = None,
) -> tuple[Block, Float[Array, "N C"]]:
    """`block_forward` from its last line to its first."""
    dx, dbranch = residual.backward(dx)
    activated = residuals.mlp_out or linear.Residuals(gelu.forward(not_before(dbranch, residuals.gelu.x))[0])
    mlp_out, dactivated = linear.backward(params.mlp_out, activated, dbranch)
    dhidden = gelu.backward(residuals.gelu, dactivated)
    normalised = residuals.mlp_in or linear.Residuals(
        layernorm.output(params.mlp_norm, not_before(dhidden, residuals.mlp_norm))
    )
    mlp_in, dnormalised = linear.backward(params.mlp_in, normalised, dhidden)
    mlp_norm, dx_through_mlp = layernorm.backward(params.mlp_norm, residuals.mlp_norm, dnormalised)
    dx = dx + dx_through_mlp

    dx, dbranch = residual.backward(dx)
    mixed = attention_layer(compute).output(residuals.attention)
    attention_out, dmixed = linear.backward(params.attention_out, linear.Residuals(merge_heads(mixed)), dbranch)
    dmixed = split_heads(dmixed, mixed.shape[0], mixed.shape[2])
    dqkv = attention_layer(compute).backward(residuals.attention, dmixed, block=compute.attention_block, starts=starts)
    dqkv = jnp.concatenate([merge_heads(part) for part in dqkv], axis=-1)
    normalised = residuals.qkv or linear.Residuals(
        layernorm.output(params.attention_norm, not_before(dqkv, residuals.attention_norm))
    )
    qkv, dnormalised = linear.backward(params.qkv, normalised, dqkv)
    attention_norm, dx_through_attention = layernorm.backward(
        params.attention_norm, residuals.attention_norm, dnormalised
    )
    dx = dx + dx_through_attention
    return Block(attention_norm, qkv, attention_out, mlp_norm, mlp_in, mlp_out), dx


def split_heads(x: Float[Array, "N C"], batch: int, heads: int) -> Float[Array, "B T H D"]:
    """Head h takes columns hD to (h+1)D."""
    return x.reshape(batch, x.shape[0] // batch, heads, x.shape[1] // heads)


def merge_heads(x: Float[Array, "B T H D"]) -> Float[Array, "N C"]:
    return x.reshape(x.shape[0] * x.shape[1], -1)


def document_starts(tokens: Int[Array, "B T"], model: Model) -> Int[Array, "B T"] | None:
    """Where each token's document begins; None where documents are not told apart.

    A sequence that begins within a document has the rest of it as its first.
    """
    if model.document_start < 0:
        return None
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.where(tokens == model.document_start, places, 0), axis=1)


def features(
    params: Params, tokens: Int[Array, "B T"], model: Model, compute: Compute, *, gather: Movement = as_it_is
) -> tuple[Float[Array, "N C"], Residuals]:
    """All of the model but the unembedding, for N = B·T tokens. The parameters' dtype is the compute dtype.

    `gather` makes a block's parameters of what `params` has in their place, shortly before that block's turn.
    """
    starts = document_starts(tokens, model)
    x, embedding_residuals = embedding.forward(params.embedding, tokens, starts=starts)
    x = x.reshape(-1, model.width)  # one axis for all tokens: only attention knows of sequences

    def one_block(x, block):
        y, residuals = block_forward(block, x, tokens.shape[0], model, compute, starts)
        return y, x if compute.recompute == "block" else residuals

    x, blocks = walk(one_block, x, params.blocks, gather=gather)
    x, final_norm = layernorm.forward(params.final_norm, x)
    return x, Residuals(embedding_residuals, blocks, final_norm)


def walk(
    body: Callable,
    carry: Array,
    blocks: Block | tuple[Block, ...],
    *more: Any,
    gather: Movement = as_it_is,
    reverse: bool = False,
) -> Any:
    """`body(carry, block, *more's parts)`, which returns (carry, output), over all layers: (carry, outputs).

    Over stacked blocks a loop, which is compiled once and copies each layer out of the stack and its outputs into one;
    over blocks apart its turns written out, which is traced once (jit), compiled L times (inline) and copies nothing.
    There a block may be gathered while the one before it computes: that hides the network's time and has two of them
    in memory.
    """
    if isinstance(blocks, Block):

        def turn(carry, layer):
            block, *parts = layer
            return body(carry, _gathered(gather, block, carry), *parts)

        return lax.scan(turn, carry, (blocks, *more), reverse=reverse)
    body = jax.jit(body, inline=True)
    order = range(len(blocks))[:: -1 if reverse else 1]
    outputs: dict[int, Any] = {}
    following = _gathered(gather, blocks[order[0]], carry)
    for layer, after in zip(order, [*order[1:], None], strict=True):
        block, following = following, None if after is None else _gathered(gather, blocks[after], carry)
        carry, outputs[layer] = body(carry, block, *(part[layer] for part in more))
    return carry, tuple(outputs[layer] for layer in range(len(blocks)))


def _gathered(gather: Movement, block: Block, after: Array) -> Block:
    """A block's parameters, gathered only when `after` is there, a block's input or its gradient.

    Else the compiler may gather all layers first, or keep from the forward what the backward is to gather again.
    """
    return block if gather is as_it_is else gather(not_before(after, block))


def forward(params: Params, tokens: Int[Array, "B T"], model: Model, compute: Compute) -> Float[Array, "B T V"]:
    """Logits over the vocabulary at every place, in float32 at least."""
    x, _ = features(params, tokens, model, compute)
    logits = unembedding.logits(unembedding.Params(params.embedding.token), x)
    return logits[:, : model.vocabulary_size].reshape(*tokens.shape, -1)


def loss(
    params: Params,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    model: Model,
    compute: Compute,
    *,
    scale: Float[Array, ""] | None = None,
    gather: Movement = as_it_is,
) -> Float[Array, ""]:
    """Mean loss of the targets that are not IGNORED; with `scale`, `scale` times their sum."""
    x, _ = features(params, tokens, model, compute, gather=gather)
    value, _ = _classify(params, x, targets, model, compute, scale)
    return value


def loss_and_grads(
    params: Params,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    model: Model,
    compute: Compute,
    *,
    scale: Float[Array, ""] | None = None,
    gather: Movement = as_it_is,
    scatter: Movement = as_it_is,
) -> tuple[Float[Array, ""], Params]:
    """`loss`, and its gradient by every parameter, in the accumulation dtype.

    `scatter` makes of a block's gradients, as soon as they are there, what is returned in their place.
    """
    starts = document_starts(tokens, model)
    x, residuals = features(params, tokens, model, compute, gather=gather)
    value, classifier = _classify(params, x, targets, model, compute, scale)

    head, dx = unembedding.backward(classifier)
    final_norm, dx = layernorm.backward(params.final_norm, residuals.final_norm, dx)

    def one_block(dx, block, residuals):
        if compute.recompute == "block":
            x = not_before(dx, residuals)
            _, residuals = block_forward(block, x, tokens.shape[0], model, compute, starts)
        grads, dx = block_backward(block, residuals, dx, compute, starts)
        return dx, scatter(grads)

    dx, blocks = walk(one_block, dx, params.blocks, residuals.blocks, gather=gather, reverse=True)
    dx = dx.reshape(*tokens.shape, model.width)
    embeddings = embedding.backward(params.embedding, residuals.embedding, dx, token_gradient=head.weight)
    return value, Params(embeddings, blocks, final_norm)


def _classify(
    params: Params,
    x: Float[Array, "N C"],
    targets: Int[Array, "B T"],
    model: Model,
    compute: Compute,
    scale: Float[Array, ""] | None,
) -> tuple[Float[Array, ""], unembedding.Residuals]:
    if scale is None:
        scale = 1 / jnp.maximum(jnp.sum(targets != cross_entropy.IGNORED), 1)
    return unembedding.forward(
        unembedding.Params(params.embedding.token),
        x,
        targets.reshape(-1),
        scale,
        vocabulary_size=model.vocabulary_size,
        chunk=compute.classifier_chunk,
    )
