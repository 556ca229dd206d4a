"""The blocks that every model family is made of, whatever is in them, and what all families share.

A family's parameters are a NamedTuple with a field `blocks`: all layers on a leading L axis ("stacked"), or a plain
tuple of L of them ("unstacked"). Stacked blocks are walked by one loop, unstacked ones are written out one after
another. Sharding, checkpoints and the memory plan know of a model only what stands here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxgpt.layers.dropout import Masks
from jaxgpt.layers.numerics import not_before
from jaxgpt.optimizers.matrices import Matrices
from jaxgpt.options.config import Compute, Model, Objective

# Layers; more take minutes to compile. XLA for GPUs is the faster one, and its loops cost more.
MOST_UNROLLED = {"gpu": 48, "tpu": 0}
ELSEWHERE = 24
RECOMPUTE_LEVELS = ("none", "gelu", "norms", "projection", "block")  # the fastest first

Block = Any  # a family's NamedTuple of one layer's parameters
Params = Any  # a family's NamedTuple of all of them
BlockTransform = Callable[[Block], Block]  # moves a block's parameters or gradients between devices


def identity(block: Block) -> Block:
    return block


class Context(NamedTuple):
    """Options and transforms that every function of a family needs and none of them changes."""

    model: Model
    compute: Compute
    frozen: Any = None  # parameters that are not trained; None where all are
    gather: BlockTransform = identity  # casts and all-gathers a block's parameters just before they are used
    scatter: BlockTransform = identity  # reduce-scatters a block's gradients as soon as they are computed
    objective: Objective = Objective()
    masks: Masks | None = None  # of dropout; None everywhere but in training with dropout
    eight_bits: bool = False  # products have factors of 8 bits; in training alone


class Inputs(NamedTuple):
    """Inputs of a family's `features`."""

    tokens: Int[Array, "B T"]
    starts: Int[Array, "B T"] | None = None  # the place where each token's document begins; None: all at 0


class Aux(NamedTuple):
    """Terms that a family adds to the loss itself, such as the balance of a router, and its metrics by name."""

    loss: Float[Array, ""] | float = 0.0
    metrics: Any = ()

    def added(
        self, loss: Float[Array, ""], metrics: dict[str, Any], share: Float[Array, ""] | float
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Adds the terms to an objective's, weighted by a batch's share of all that its mean is over."""
        if self is NO_AUX:
            return loss, metrics
        own = {name: share * value for name, value in self.metrics.items()}
        return loss + share * self.loss, metrics | own


NO_AUX = Aux()  # of a dense model


class Projection(NamedTuple):
    """A product of every block by its name at Hugging Face: some columns of one of a `Block`'s weights."""

    field: str  # of the Block
    first: int  # column
    inputs: int
    outputs: int


class Adapters(NamedTuple):
    """The parameters that LoRA trains (`models/lora.py`)."""

    blocks: Any  # by a projection's name its `layers.lora.Adapter`; layers stacked, or a tuple of such dicts


def inputs_of(tokens: Int[Array, "B T"], model: Model, starts: Int[Array, "B T"] | None = None) -> Inputs:
    """A family's inputs, with the documents told apart by `starts`, or where `model.document_start` says how.

    A sequence that begins within a document has the rest of it as its first.
    """
    if starts is not None or model.document_start < 0:
        return Inputs(tokens, starts)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return Inputs(tokens, lax.cummax(jnp.where(tokens == model.document_start, places, 0), axis=1))


class Kept(NamedTuple):
    """Marks what a block keeps for its backward. What it doesn't, `block_backward` computes again."""

    activation: bool  # the input of the MLP's last product
    norms: bool  # the inputs of the products after the norms
    projection: bool  # the sum of the attention's branch, which is a product, and the block's input


def kept(recompute: str) -> Kept:
    """Returns what a block keeps at this level; at "block", which computes it again whole, all."""
    level = RECOMPUTE_LEVELS.index("none" if recompute == "block" else recompute)
    return Kept(*(level < RECOMPUTE_LEVELS.index(first) for first in ("gelu", "norms", "projection")))


def matrices(shapes: Params) -> Params:
    """Marks the tensors that are matrices, one for each layer; of a model's parameters, or of one block's.

    A router's, which is small and decides by the last digit, is not among them.
    """
    stacked = stacked_marks(shapes) if hasattr(shapes, "blocks") else jax.tree.map(lambda _: False, shapes)

    def one(path: tuple, shape: Any, by_layer: bool) -> bool:
        return len(shape.shape) - by_layer > 1 and all(getattr(part, "name", None) != "router" for part in path)

    return jax.tree_util.tree_map_with_path(one, shapes, stacked)


def as_matrices(shapes: Params, columns: dict[str, tuple[int, ...]]) -> Params:
    """Returns the blocks' `matrices` as Muon takes them, a `Matrices` each, and None for every other tensor.

    `columns` is the family's.
    """
    layers = are_stacked(shapes.blocks)

    def one(path: tuple, shape: Any, matrix: bool) -> Matrices | None:
        names = [part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey)]
        if not matrix or "blocks" not in names:
            return None
        of_layer = shape.shape[1:] if layers else shape.shape
        beside = next((columns[name] for name in names if name in columns), (of_layer[-1],))
        return Matrices(shape.shape[0] if layers else 0, of_layer, beside)

    return jax.tree_util.tree_map_with_path(one, shapes, matrices(shapes))


def cast(params: Params, dtype: DTypeLike, marks: Params | None = None) -> Params:
    """Casts matrices to the activations' dtype. What is small is cast to it only from a narrower one.

    Args:
        params: A model's parameters, or one block's, or shards of them.
        dtype: The dtype that the activations have.
        marks: The `matrices` of the whole parameters; those of `params` where nothing is given.
    """

    def one(array: Array, matrix: bool) -> Array:
        return array.astype(dtype if matrix else jnp.promote_types(array.dtype, dtype))

    return jax.tree.map(one, params, matrices(params) if marks is None else marks)


# Stacked and unstacked


def are_stacked(blocks: Any) -> bool:
    """Returns whether these blocks, or what belongs to them layer by layer, lie on a leading L axis."""
    return type(blocks) is not tuple


def unstacked(params: Params) -> Params:
    """Returns the parameters with each block's apart."""
    if not are_stacked(params.blocks):
        return params
    leaves, block = jax.tree.flatten(params.blocks)
    return params._replace(blocks=tuple(jax.tree.unflatten(block, layer) for layer in zip(*leaves, strict=True)))


def stacked(params: Params) -> Params:
    """Returns the parameters with all blocks' on a leading L axis."""
    if are_stacked(params.blocks):
        return params
    return params._replace(blocks=jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.blocks))


def arrange(params: Params, compute: Compute) -> Params:
    """Stacked parameters, or moments, in the form that `compute.layers` asks for: the step follows their form."""
    unroll = compute.layers == "unrolled"
    if compute.layers == "auto":
        unroll = len(jax.tree.leaves(params.blocks)[0]) <= MOST_UNROLLED.get(jax.default_backend(), ELSEWHERE)
    return unstacked(params) if unroll else params


def block_shapes(shapes: Params) -> Block:
    """The shapes of one block's parameters, from those of all parameters."""
    if not are_stacked(shapes.blocks):
        return shapes.blocks[0]
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype), shapes.blocks)


def stacked_marks(params: Params) -> Params:
    """Marks for each tensor whether its first axis counts layers."""
    marks = jax.tree.map(lambda _: False, params)
    if are_stacked(params.blocks):
        marks = marks._replace(blocks=jax.tree.map(lambda _: True, params.blocks))
    return marks


# Scanning


def scan_blocks(
    body: Callable, carry: Array, blocks: Any, *more: Any, gather: BlockTransform = identity, reverse: bool = False
) -> Any:
    """Scans `body(carry, block, *more's parts)`, which returns (carry, output), over all layers: (carry, outputs).

    Over stacked blocks this is a loop, which is compiled once and copies each layer out of the stack and its outputs
    into one. Over blocks apart its turns are written out, which is traced once (jit), compiled L times (inline) and
    copies nothing. There a block may be gathered while the one before it computes: that hides the network's time and
    has two of them in memory.
    """
    if are_stacked(blocks):

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


def _gathered(gather: BlockTransform, block: Block, after: Array) -> Block:
    """A block's parameters, gathered only when `after` is there, a block's input or its gradient.

    Else the compiler may gather all layers first, or keep from the forward what the backward is to gather again.
    """
    return block if gather is identity else gather(not_before(after, block))
