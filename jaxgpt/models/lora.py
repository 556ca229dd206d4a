"""Low-rank adapters for a model of any family: a transformation of its parameters, not a second model.

    frozen = freeze(base)                          the base as it is kept: float32, bfloat16, int8 or NF4
    adapters = init(...)                           all that is trained, by the projections' names at Hugging Face
    params = attach(adapters, frozen)              a family's parameters, with `layers.lora.Params` in its blocks
    grads = gradients(features_backward(params))   the adapters' part of what the family's backward returns
    merge(adapters, frozen)                        plain parameters that compute the same

Several projections may be columns of one weight, as queries, keys and values are. Their adapters are joined then, into
one layer: x [a₁ a₂] next to each other, and b₁ above b₂, each in its own columns with zeros beside it.

The blocks' frozen matrices become numbers of the compute dtype one layer at a time, in `gather`, forward and backward.
"""

import fnmatch
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.layers import linear, lora, quantised
from jaxgpt.layers.lora import Adapter
from jaxgpt.layers.numerics import product
from jaxgpt.models import family
from jaxgpt.models.blocks import (
    Adapters,
    Block,
    BlockTransform,
    Params,
    Projection,
    are_stacked,
    arrange,
    cast,
    identity,
)
from jaxgpt.options.config import Compute, Lora, Model

ALL = "all-linear"
QUANTISED = ("int8", "nf4")


def check(model: Model, options: Lora) -> None:
    """Raises a UserError for targets that the model hasn't, or a storage that can't hold its base."""
    chosen(model, options.targets)
    if options.base in QUANTISED:
        for name, projection in family(model).projections(model).items():
            if projection.outputs % quantised.BLOCK:
                raise UserError(
                    f"--lora.base {options.base} keeps rows in blocks of {quantised.BLOCK} numbers, and {name} has "
                    f"rows of {projection.outputs}: take float32 or bfloat16"
                )


def chosen(model: Model, targets: tuple[str, ...]) -> dict[str, Projection]:
    """Returns the model's projections that a user's targets name.

    A target is `all-linear`, a name as attn.c_proj, its end as c_proj, or a pattern of the whole name as *_proj.
    UserError for one that names none.
    """
    projections = family(model).projections(model)
    found: set[str] = set()
    for target in targets:
        named = {
            name
            for name in projections
            if target in (ALL, name) or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)
        }
        if not named:
            raise UserError(
                f"--lora.targets {shown(target)}: the model has no such projection. There are: "
                f"{', '.join(projections)}; or {ALL}"
            )
        found |= named
    if not found:
        raise UserError(f"--lora.targets is empty: name projections ({', '.join(projections)}), or {ALL}")
    return {name: projection for name, projection in projections.items() if name in found}


def init(model: Model, options: Lora, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Adapters:
    """Adapters that change nothing yet: a uniform in ±1/√in, as PEFT draws it, and b zeros. Layers are stacked."""
    targets = chosen(model, options.targets)
    L, R = model.layers, options.rank

    def one(key: Key[Array, ""], projection: Projection) -> Adapter:
        bound = 1 / math.sqrt(projection.inputs)
        a = jax.random.uniform(key, (L, projection.inputs, R), dtype, -bound, bound)
        return Adapter(a, jnp.zeros((L, R, projection.outputs), dtype))

    keys = jax.random.split(key, len(targets))
    return Adapters({name: one(key, targets[name]) for name, key in zip(targets, keys, strict=True)})


def parameter_count(model: Model, options: Lora) -> int:
    """Number of trained parameters."""
    targets = chosen(model, options.targets).values()
    return model.layers * options.rank * sum(target.inputs + target.outputs for target in targets)


def decays(adapters: Adapters) -> Adapters:
    """Marks all tensors with True: they are matrices."""
    return jax.tree.map(lambda _: True, adapters)


# The base


def freeze(params: Params, options: Lora, compute: Compute) -> Params:
    """Returns whole, stacked parameters as the frozen base is kept, with layers as `compute.layers` asks for.

    With "int8" and "nf4" the blocks' matrices are quantised but for those whose rows are no multiple of 64, as a
    router's. These and the tables at both ends are then in the compute dtype. Vectors stay in float32.
    """
    dtype = jnp.dtype(compute.dtype if options.base in QUANTISED else options.base)

    def one(array: Any, *, in_block: bool) -> Any:  # of NumPy or JAX
        if array.ndim < 2:
            return jnp.asarray(array, jnp.promote_types(array.dtype, jnp.float32))
        if in_block and options.base in QUANTISED and array.shape[-1] % quantised.BLOCK == 0:
            return _quantise(array, options.base, options.double_quantization)
        return jnp.asarray(array, dtype)

    ends = jax.tree.map(functools.partial(one, in_block=False), params._replace(blocks=()))
    layers = len(jax.tree.leaves(params.blocks)[0])
    blocks = tuple(
        jax.tree.map(lambda stack, layer=layer: one(stack[layer], in_block=True), params.blocks)
        for layer in range(layers)
    )
    if are_stacked(arrange(params, compute).blocks):
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return ends._replace(blocks=blocks)


@functools.partial(jax.jit, static_argnames=("form", "double"))
def _quantise(array: Float[Array, "..."], form: str, double: bool) -> Any:
    return quantised.quantise(array, form, double=double)


def gather(frozen: Params, dtype: DTypeLike) -> BlockTransform:
    """Returns a function that has one block's frozen matrices in the compute dtype; the identity where all are."""
    block = frozen.blocks if are_stacked(frozen.blocks) else frozen.blocks[0]
    leaves = jax.tree.leaves(block, is_leaf=quantised.is_quantised)
    axes = 2 + are_stacked(frozen.blocks)
    if not any(quantised.is_quantised(leaf) or (leaf.ndim >= axes and leaf.dtype != dtype) for leaf in leaves):
        return identity

    return lambda block: cast(_dequantised(block, dtype), dtype)


def _dequantised(block: Block, dtype: DTypeLike) -> Block:
    return jax.tree.map(
        lambda leaf: quantised.dequantise(leaf, dtype) if quantised.is_quantised(leaf) else leaf,
        block,
        is_leaf=quantised.is_quantised,
    )


# Together


def attach(adapters: Adapters, frozen: Params, model: Model, options: Lora, dtype: DTypeLike) -> Params:
    """Returns a family's parameters: the base, with `lora.Params` for all the products of its blocks.

    Args:
        adapters: The adapters, in the compute dtype, with layers as the base has them.
        frozen: What `freeze` returned.
        model: The model's shape.
        options: Those that the adapters were made with.
        dtype: The compute dtype, to which the tables at both ends are cast. Of the blocks `gather` takes care.
    """
    ends = cast(frozen._replace(blocks=()), dtype)
    projections = family(model).projections(model)
    join = functools.partial(_attached, projections=projections, scaling=options.alpha / options.rank)
    if are_stacked(frozen.blocks):
        return ends._replace(blocks=join(frozen.blocks, adapters.blocks))
    return ends._replace(blocks=tuple(map(join, frozen.blocks, adapters.blocks)))


def _attached(block: Block, adapters: dict[str, Adapter], projections: dict[str, Projection], scaling: float) -> Block:
    """A block, or all on a leading axis, with its adapters."""
    fields = {}
    for field, params in block._asdict().items():
        if not isinstance(params, linear.Params):
            continue
        parts = {name: part for name, part in projections.items() if part.field == field}
        mine = [(part, adapters[name]) for name, part in parts.items() if name in adapters]
        width = max(part.first + part.outputs for part in parts.values())
        adapter = _joined(mine, width) if mine else None
        factor = None if adapter is None else jnp.full(adapter.a.shape[:-2], scaling, jnp.float32)
        fields[field] = lora.Params(params.weight, params.bias, adapter, factor)
    return block._replace(**fields)


def _joined(parts: list[tuple[Projection, Adapter]], width: int) -> Adapter:
    """One adapter of a weight with so many columns, from those of its parts."""
    if len(parts) == 1 and parts[0][0].outputs == width:
        return parts[0][1]
    rows = []
    for projection, adapter in parts:
        beside = (projection.first, width - projection.first - projection.outputs)
        rows.append(jnp.pad(adapter.b, [(0, 0)] * (adapter.b.ndim - 1) + [beside]))
    return Adapter(jnp.concatenate([adapter.a for _, adapter in parts], axis=-1), jnp.concatenate(rows, axis=-2))


def gradients(grads: Block, model: Model, options: Lora) -> dict[str, Adapter]:
    """Returns the adapters' gradients by name, from those that a family's `block_backward` returns.

    No other gradient is used, and so the compiler computes none.
    """
    targets, found = chosen(model, options.targets), {}
    for field in dict.fromkeys(target.field for target in targets.values()):
        joined, R = getattr(grads, field), options.rank
        for place, (name, target) in enumerate((n, t) for n, t in targets.items() if t.field == field):
            rows = slice(place * R, (place + 1) * R)
            columns = slice(target.first, target.first + target.outputs)
            found[name] = Adapter(joined.a[..., rows], joined.b[..., rows, columns])
    return found


# One again


def merge(adapters: Adapters, frozen: Params, model: Model, options: Lora, dtype: DTypeLike = jnp.float32) -> Params:
    """Returns plain parameters of this dtype that compute the same: w + s a b for each weight with an adapter.

    Adapters and base have their layers in the same form, and so has the result. A sum is taken in float32 before it is
    rounded. A quantised base has the numbers that its codes stand for, which are those that the adapters learned with.
    """
    one = functools.partial(_merged, model=model, options=options, dtype=jnp.dtype(dtype))
    ends = jax.tree.map(lambda array: jnp.asarray(array, dtype), frozen._replace(blocks=()))
    if not are_stacked(frozen.blocks):
        return ends._replace(blocks=tuple(map(one, frozen.blocks, adapters.blocks)))
    both = (frozen.blocks, adapters.blocks)
    layers = [one(*jax.tree.map(lambda stack, layer=layer: stack[layer], both)) for layer in range(model.layers)]
    return ends._replace(blocks=jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))


@functools.partial(jax.jit, static_argnames=("model", "options", "dtype"))
def _merged(block: Block, adapters: dict[str, Adapter], *, model: Model, options: Lora, dtype: jnp.dtype) -> Block:
    """One block's plain parameters."""
    whole, projections = cast(_dequantised(block, jnp.float32), jnp.float32), family(model).projections(model)
    for name, (a, b) in adapters.items():
        field, first, _, outputs = projections[name]
        params = getattr(whole, field)
        change = (options.alpha / options.rank) * product("cr,rf->cf", a.astype(jnp.float32), b.astype(jnp.float32))
        weight = params.weight.at[:, first : first + outputs].add(change)
        whole = whole._replace(**{field: params._replace(weight=weight)})
    return jax.tree.map(lambda array: array.astype(dtype), whole)
