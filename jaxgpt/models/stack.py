"""The way of all families through their blocks, forward and backward, and dropout before the first of them.

Masks of dropout (`layers/dropout.py`) differ from layer to layer: that of the embedding has number 0, and the blocks'
count from 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.layers import dropout
from jaxgpt.layers.numerics import not_before
from jaxgpt.models.attend import Cache, KeptText, WholeText
from jaxgpt.models.blocks import Block, Context, Inputs, are_stacked, scan_blocks


def drop_embedded(x: Float[Array, "N C"], context: Context) -> Float[Array, "N C"]:
    """The embedded tokens, with dropout where there is one."""
    return dropout.forward(x, context.masks and context.masks.at(0))


def drop_embedded_backward(dx: Float[Array, "N C"], context: Context) -> Float[Array, "N C"]:
    """The gradient by what `drop_embedded` was given."""
    return dropout.backward(context.masks and context.masks.at(0), dx)


def _numbers(context: Context) -> tuple[Int[Array, " L"], ...]:
    """The blocks' numbers, where their masks depend on them: else nothing, and the program has none."""
    return () if context.masks is None else (jnp.arange(1, context.model.layers + 1),)


def _whole_text(inputs: Inputs, context: Context, *number: Int[Array, ""]) -> WholeText:
    """Attention of a block, of this number where there is dropout."""
    masks = context.masks.at(*number) if context.masks is not None else None
    B, T = inputs.tokens.shape
    return WholeText(context, B, T, inputs.starts, masks)


def forward_blocks(
    block_forward: Callable,
    blocks: Any,
    x: Float[Array, "N C"],
    inputs: Inputs,
    context: Context,
    caches: tuple[Cache, ...] = (),
) -> tuple[Float[Array, "N C"], Any, Any]:
    """Runs a family's `block_forward` through all of its blocks.

    Args:
        block_forward: The family's.
        blocks: The parameters of its blocks.
        x: The embedded tokens, on one axis: only attention knows of sequences.
        inputs: The family's inputs.
        context: Options and transforms.
        caches: The texts' caches, for T further tokens of each.

    Returns:
        The last block's output; what `backward_blocks` needs: each block's residuals, or its input where it is computed
        again; and on a leading L axis what the blocks say of their tokens, the residuals' field `aux`, if a family has
        it. With `caches` the residuals of attention are the caches with the tokens.
    """

    def one_block(x: Array, block: Block, *more: Any) -> tuple[Array, Any]:
        if caches:
            assert inputs.starts is not None
            attend = KeptText(context, more, -inputs.starts[:, 0], inputs.tokens.shape[1])
        else:
            attend = _whole_text(inputs, context, *more)
        y, residuals = block_forward(block, x, attend, context)
        kept = x if context.compute.recompute == "block" else residuals
        return y, (kept, getattr(residuals, "aux", ()))

    x, outputs = scan_blocks(one_block, x, blocks, *(caches or _numbers(context)), gather=context.gather)
    if are_stacked(blocks):
        return x, *outputs
    kept, aux = zip(*outputs, strict=True)
    return x, kept, jax.tree.map(lambda *layers: jnp.stack(layers), *aux)


def backward_blocks(
    block_forward: Callable,
    block_backward: Callable,
    blocks: Any,
    residuals: Any,
    dx: Float[Array, "N C"],
    inputs: Inputs,
    context: Context,
) -> tuple[Any, Float[Array, "N C"]]:
    """Runs a family's `block_backward` from its last block to its first.

    Args:
        block_forward: The family's, for blocks that are computed again.
        block_backward: The family's.
        blocks: The parameters of its blocks.
        residuals: What `forward_blocks` returned.
        dx: The gradient by the last block's output.
        inputs: The family's inputs.
        context: Options and transforms.

    Returns:
        The gradients by the blocks' parameters, and by the first block's input.
    """

    def one_block(dx: Array, block: Block, kept: Any, *number: Int[Array, ""]) -> tuple[Array, Any]:
        attend = _whole_text(inputs, context, *number)
        if context.compute.recompute == "block":
            _, kept = block_forward(block, not_before(dx, kept), attend, context)
        grads, dx = block_backward(block, kept, dx, attend)
        return dx, context.scatter(grads)

    dx, grads = scan_blocks(one_block, dx, blocks, residuals, *_numbers(context), gather=context.gather, reverse=True)
    return grads, dx
