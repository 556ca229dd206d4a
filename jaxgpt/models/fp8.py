"""A model whose blocks' products have factors of 8 bits (`layers/fp8.py`): how their scales get in, and magnitudes out.

Each of L blocks has P products, its linear layers in the order of its fields, and each of these three factors: x, w and
∂y. The magnitudes that are expected of them go beside the blocks' parameters through the loop over layers, and those
that were seen come back beside the gradients. All else is in the compute dtype: norms, attention, both tables.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgpt.layers import fp8, linear
from jaxgpt.models.blocks import Block, BlockTransform, Context, Params, are_stacked

Largest = Float[Array, "L P 3"]  # magnitudes


class Scaled(NamedTuple):
    """A block, or all on a leading axis, and magnitudes of its products' factors."""

    block: Block
    largest: Float[Array, "*L P 3"] | None  # expected, or beside gradients seen; None lets each factor take its own


def products(blocks: Any) -> list[str]:
    """Returns the fields of a block that are its products, in their order."""
    block = blocks if are_stacked(blocks) else blocks[0]
    return [name for name, value in block._asdict().items() if isinstance(value, linear.Params)]


def attach(params: Params, largest: Largest | None, context: Context) -> tuple[Params, Context]:
    """Returns the parameters and the context with which a family's functions have products of 8 bits."""
    if are_stacked(params.blocks):
        blocks: Any = Scaled(params.blocks, largest)
    else:
        parts = [None] * len(params.blocks) if largest is None else list(largest)
        blocks = tuple(map(Scaled, params.blocks, parts))
    gather, scatter = context.gather, context.scatter
    return params._replace(blocks=blocks), context._replace(
        gather=lambda scaled: _joined(gather(scaled.block), scaled.largest),
        scatter=lambda grads: _apart(grads, scatter),
        eight_bits=True,
    )


def _joined(block: Block, largest: Float[Array, "P 3"] | None) -> Block:
    """Returns a block whose products are `fp8.Params`."""
    own = {}
    for place, name in enumerate(products(block)):
        weight, bias = getattr(block, name)
        own[name] = fp8.Params(weight, bias, None if largest is None else largest[place])
    return block._replace(**own)


def _apart(grads: Block, scatter: BlockTransform) -> Scaled:
    """Returns a block's gradients, scattered, and the magnitudes that were seen."""
    seen: dict[str, Any] = {name: value for name, value in grads._asdict().items() if isinstance(value, fp8.Params)}
    plain = {name: linear.Params(value.weight, value.bias) for name, value in seen.items()}
    largest = jnp.stack([value.largest for value in seen.values()])
    return Scaled(scatter(grads._replace(**plain)), largest)


def detach(grads: Params) -> tuple[Params, Largest | None]:
    """Returns the gradients of a model's parameters, and the magnitudes that were seen; None where there are none."""
    blocks = grads.blocks
    if isinstance(blocks, Scaled):
        return grads._replace(blocks=blocks.block), blocks.largest
    if blocks and isinstance(blocks, tuple) and isinstance(blocks[0], Scaled):
        largest = jnp.stack([block.largest for block in blocks])
        return grads._replace(blocks=tuple(block.block for block in blocks)), largest
    return grads, None


def beside(grads: Params, seen: Largest | None) -> Params:
    """Returns gradients from which `detach` gets these magnitudes."""
    if seen is None:
        return grads
    blocks = grads.blocks
    scaled = Scaled(blocks, seen) if are_stacked(blocks) else tuple(map(Scaled, blocks, seen))
    return grads._replace(blocks=scaled)
