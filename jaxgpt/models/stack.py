"""The way of all families through their blocks, forward and backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.layers.numerics import not_before
from jaxgpt.models.attend import Cache, KeptText, Layer, WholeText
from jaxgpt.models.blocks import Block, Context, Inputs, are_stacked, scan_blocks


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
    B, T = inputs.tokens.shape
    sequences = WholeText(context, B, T, inputs.starts)

    def one_block(x: Array, block: Block, *layers: Layer) -> tuple[Array, Any]:
        attend = sequences
        if layers:
            assert inputs.starts is not None
            attend = KeptText(context, layers, -inputs.starts[:, 0], T)
        y, residuals = block_forward(block, x, attend, context)
        kept = x if context.compute.recompute == "block" else residuals
        return y, (kept, getattr(residuals, "aux", ()))

    x, outputs = scan_blocks(one_block, x, blocks, *caches, gather=context.gather)
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
    B, T = inputs.tokens.shape
    attend = WholeText(context, B, T, inputs.starts)

    def one_block(dx: Array, block: Block, kept: Any) -> tuple[Array, Any]:
        if context.compute.recompute == "block":
            _, kept = block_forward(block, not_before(dx, kept), attend, context)
        grads, dx = block_backward(block, kept, dx, attend)
        return dx, context.scatter(grads)

    dx, grads = scan_blocks(one_block, dx, blocks, residuals, gather=context.gather, reverse=True)
    return grads, dx
