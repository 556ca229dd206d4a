"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    x = token[tokens] + position                                   embedding
    x = x + attention(layernorm(x)),  x = x + mlp(layernorm(x))    L blocks
    features = layernorm(x)                                        the head is the token table (tied)

With `model.dropout` the embedding, attention's probabilities and both branches have dropout in training.

`features_backward` is `features` read from its last line to its first. With float32 masters `context.gather` casts a
block's matrices to the compute dtype just before they are used; gradients come back in float32, float64 in float64.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxgpt.errors import UserError
from jaxgpt.layers import embedding, gelu, layernorm, linear, random, residual, unembedding
from jaxgpt.layers.numerics import not_before
from jaxgpt.models import norms, projection
from jaxgpt.models.attend import ATTENTION, MLP, Cache, KeptText, WholeText, merge_heads, split_heads
from jaxgpt.models.blocks import NO_AUX, Aux, Context, Inputs, Projection, kept
from jaxgpt.models.stack import backward_blocks, drop_embedded, drop_embedded_backward, forward_blocks
from jaxgpt.options.config import Model

LEARNED_POSITIONS = True  # so a text ends at the context
# Options that this family doesn't have.
OTHERS = (
    *("kv_heads", "head_width", "feed_forward", "window", "tied", "norm_epsilon", "query_key_norm", "logit_soft_cap"),
    *("rope_base", "rope_scaling", "experts"),
)
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


class BlockResiduals(NamedTuple):
    """Residuals of a block; None for what `compute.recompute` has computed again.

    The input of `attention_out` is attention's own output, so it is not kept twice.
    """

    attention_norm: layernorm.Residuals
    qkv: linear.Residuals | None
    attention: Any  # as `attend` has them
    mlp_norm: layernorm.Residuals  # x None where it is computed again
    mlp_in: linear.Residuals | None
    gelu: gelu.Residuals
    mlp_out: linear.Residuals | None


class Residuals(NamedTuple):
    embedding: embedding.Residuals
    blocks: Any  # as the parameters' blocks are: BlockResiduals, or with recompute = "block" the blocks' inputs
    final_norm: layernorm.Residuals
    starts: Int[Array, "B T"] | None  # the inputs'


def check(model: Model) -> None:
    """Raises UserError for an option that only other families have."""
    plain = Model()
    for key in OTHERS:
        value = getattr(model, key)
        if value != getattr(plain, key):
            option = "--model." + key.replace("_", "-")
            raise UserError(
                f"{option} is {value}, and --model.family is gpt2, which has no such option: leave it away, or take "
                "--model.family llama"
            )


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


def parameter_count(model: Model, *, active: bool = False, padded: bool = False) -> int:
    """Number of parameters; `padded` counts the embedding's unused rows too. All are `active` for every token."""
    L, C, rows = model.layers, model.width, model.padded_vocabulary_size if padded else model.vocabulary_size
    block = 2 * 2 * C + (C * 3 * C + 3 * C) + (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C)
    return rows * C + model.context * C + L * block + 2 * C


def flops_per_token(model: Model, length: int, *, recompute: str = "none") -> int:
    """Operations of the model's matrix products, forward and backward, for a token of sequences of this length.

    Forward, with F = 4C and a query seeing (T+1)/2 keys on average; the backward has two products for each:

        layer        2 C·3C + 2 C·C + 2·2 C·F = 24 C²      queries, keys and values; attention's output; the MLP
        attention    2·2 C (T+1)/2            =  2 C (T+1)  q kᵀ and p v
        classifier   2 C Vp

    With recompute = "block" the backward has each block's forward once more, but for its last product; with
    "projection" that of attention's output.
    """
    C = model.width
    attention, last = 2 * C * (length + 1), 8 * C * C
    again = {"projection": 2 * C * C, "block": attention + 24 * C * C - last}.get(recompute, 0)
    forward = model.layers * (24 * C * C + attention) + 2 * C * model.padded_vocabulary_size
    return 3 * forward + model.layers * again


def describe(model: Model) -> str:
    """One line for people."""
    return (
        f"GPT-2, {parameter_count(model):,} parameters: {model.layers} layers, {model.heads} heads, width "
        f"{model.width}, context {model.context}, vocabulary {model.vocabulary_size:,}"
    )


def decays(params: Params) -> Params:
    """Marks with True the tensors that weight decay applies to: the embeddings and the blocks' weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].name in MATRICES, params)


def projections(model: Model) -> dict[str, Projection]:
    """The products that LoRA can adapt, by their names at Hugging Face."""
    C = model.width
    return {
        "attn.c_attn": Projection("qkv", 0, C, 3 * C),
        "attn.c_proj": Projection("attention_out", 0, C, C),
        "mlp.c_fc": Projection("mlp_in", 0, C, 4 * C),
        "mlp.c_proj": Projection("mlp_out", 0, 4 * C, C),
    }


def columns(model: Model) -> dict[str, tuple[int, ...]]:
    """Columns of the matrices that lie side by side in a tensor, by the name of its field: queries, keys, values."""
    return {"qkv": (model.width,) * 3}


def head(params: Params) -> unembedding.Params:
    """The unembedding, which is the token table."""
    return unembedding.Params(params.embedding.token)


def block_forward(
    params: Block, x: Float[Array, "N C"], attend: WholeText | KeptText, context: Context
) -> tuple[Float[Array, "N C"], BlockResiduals]:
    """One block on N = B·T tokens, of which `attend` says what text they see."""
    normalised, attention_norm = norms.forward(params.attention_norm, x, context)
    qkv, qkv_residuals = projection.forward_in_parts(params.qkv, normalised, 3)
    q, k, v = (split_heads(part, attend.batch, context.model.heads) for part in qkv)
    mixed, attention_residuals = attend.forward(q, k, v)
    branch, _ = projection.forward(params.attention_out, merge_heads(mixed))
    x = residual.forward(x, attend.drop(branch, ATTENTION))

    normalised, mlp_norm = norms.forward(params.mlp_norm, x, context)
    hidden, mlp_in = projection.forward(params.mlp_in, normalised)
    activated, gelu_residuals = gelu.forward(hidden)
    branch, mlp_out = projection.forward(params.mlp_out, activated)
    x = residual.forward(x, attend.drop(branch, MLP))
    keep = kept(context.compute.recompute)
    return x, BlockResiduals(
        attention_norm=attention_norm,
        qkv=qkv_residuals if keep.norms else None,
        attention=attention_residuals,
        mlp_norm=mlp_norm if keep.projection else mlp_norm._replace(x=None),
        mlp_in=mlp_in if keep.norms else None,
        gelu=gelu_residuals,
        mlp_out=mlp_out if keep.activation else None,
    )


def block_backward(
    params: Block, residuals: BlockResiduals, dx: Float[Array, "N C"], attend: WholeText
) -> tuple[Block, Float[Array, "N C"]]:
    """Backward of a block: `block_forward` from its last line to its first."""
    first, context = dx, attend.context
    mixed, again = attend.output(residuals.attention), functools.partial(not_before, earlier=first)
    middle = residuals.mlp_norm.x
    if middle is None:
        branch, _ = projection.forward(not_before(dx, params.attention_out), merge_heads(mixed))
        middle = residual.forward(not_before(dx, residuals.attention_norm.x), attend.drop(branch, ATTENTION))

    dx, dbranch = residual.backward(dx)
    dbranch = attend.drop_backward(dbranch, MLP)
    activated = residuals.mlp_out or linear.Residuals(gelu.output(again(dbranch, residuals.gelu)))
    mlp_out, dactivated = projection.backward(params.mlp_out, activated, dbranch)
    dhidden = gelu.backward(again(dactivated, residuals.gelu), dactivated)
    mlp_norm_kept = residuals.mlp_norm._replace(x=middle)
    normalised = residuals.mlp_in or linear.Residuals(norms.output(params.mlp_norm, again(dhidden, mlp_norm_kept)))
    mlp_in, dnormalised = projection.backward(params.mlp_in, normalised, dhidden)
    mlp_norm, dx = norms.backward(params.mlp_norm, mlp_norm_kept, dnormalised, dx, context, earlier=first)

    dx, dbranch = residual.backward(dx)
    dbranch = attend.drop_backward(dbranch, ATTENTION)
    attention_out, dmixed = projection.backward(params.attention_out, linear.Residuals(merge_heads(mixed)), dbranch)
    dmixed = split_heads(dmixed, mixed.shape[0], mixed.shape[2])
    dqkv = attend.backward(residuals.attention, dmixed)
    dqkv = jnp.concatenate([merge_heads(part) for part in dqkv], axis=-1)
    normalised = residuals.qkv or linear.Residuals(
        norms.output(params.attention_norm, again(dqkv, residuals.attention_norm))
    )
    qkv, dnormalised = projection.backward(params.qkv, normalised, dqkv)
    attention_norm, dx = norms.backward(
        params.attention_norm, residuals.attention_norm, dnormalised, dx, context, earlier=first
    )
    return Block(attention_norm, qkv, attention_out, mlp_norm, mlp_in, mlp_out), dx


def features(
    params: Params, inputs: Inputs, context: Context, caches: tuple[Cache, ...] = ()
) -> tuple[Float[Array, "N C"], Residuals, Aux]:
    """All of the model but the head, for N = B·T tokens.

    With `caches` the tokens are further ones of each text, as `cache.extend` has them.
    """
    x, embedding_residuals = embedding.forward(params.embedding, inputs.tokens, starts=inputs.starts)
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
    """The gradient by every parameter, in the accumulation dtype; `dhead` is added to the token table's."""
    final_norm, dx = norms.backward(params.final_norm, residuals.final_norm, dx, None, context)
    inputs = Inputs(residuals.embedding.tokens, residuals.starts)
    blocks, dx = backward_blocks(block_forward, block_backward, params.blocks, residuals.blocks, dx, inputs, context)
    dx = drop_embedded_backward(dx, context).reshape(*inputs.tokens.shape, context.model.width)
    embeddings = embedding.backward(params.embedding, residuals.embedding, dx, token_gradient=dhead.weight)
    return Params(embeddings, blocks, final_norm)
