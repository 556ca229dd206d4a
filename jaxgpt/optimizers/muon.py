"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the blocks' matrices, AdamW for the rest.

    m ← β m + (1 - β) g
    O ← orthogonalise(β m + (1 - β) g)                  Nesterov's momentum, by `newton_schulz.py`
    θ ← θ - η ( 0.2 √max(M, N) O + λ θ )                of an M by N matrix

The numbers of an orthogonal matrix have 1/√max(M, N) as their root mean square, and those of AdamW's direction about
0.2: with the factor one learning rate and one decay serve both (Liu et al. 2025, "Muon is scalable for LLM training",
arXiv:2502.16982, section 2.2). β is `optimizer.momentum`. A matrix has one moment and no second.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.optimizers import adamw, rounding
from jaxgpt.optimizers.adamw import Moments, Tree
from jaxgpt.optimizers.matrices import Matrices, directions
from jaxgpt.options.config import Optimizer


class Setup(NamedTuple):
    """The tensors that are Muon's, and how they are computed with."""

    matrices: Tree  # Matrices or None for each parameter
    dtype: DTypeLike  # of the products; parameters in float64 have theirs
    # Where each device has a shard of each tensor: from the shards, a row for each layer's tensor, the whole tensors
    # that this device orthogonalises; and from those the shards of so many tensors.
    to_owners: Callable[[Float[Array, "S _"]], Float[Array, "_ _"]]
    to_shards: Callable[[Float[Array, "_ _"], int], Float[Array, "S _"]]


class _Tensor(NamedTuple):
    """A parameter, or this device's shard of it, with all that belongs to it."""

    place: int  # among the parameters
    param: Array
    first: Array
    second: Array | None
    grad: Array
    decay: bool
    matrices: Matrices | None


def init(params: Tree, matrices: Tree) -> Moments:
    """Returns zero moments as AdamW's, with None for the second ones of matrices."""
    first, second = adamw.init(params)
    return Moments(first, jax.tree.map(lambda moment, of: None if of else moment, second, matrices))


@jax.named_scope("muon.update")
def update(
    params: Tree,
    moments: Moments,
    grads: Tree,
    decays: Tree,
    step: Int[Array, ""],
    learning_rate: Float[Array, ""],
    options: Optimizer,
    setup: Setup,
    *,
    advance: Bool[Array, ""] | bool = True,
    key: Key[Array, ""] | None = None,
) -> tuple[Tree, Moments]:
    """Returns the new parameters and moments as `adamw.update` does, whose arguments these are but for `setup`."""
    structure = jax.tree.structure(params)
    beside = (*moments, grads, decays, setup.matrices)
    parts = zip(jax.tree.leaves(params), *(structure.flatten_up_to(tree) for tree in beside), strict=True)
    tensors = [_Tensor(place, *part) for place, part in enumerate(parts)]
    beta, t = options.momentum, step + 1
    corrections = 1 - options.beta1**t, 1 - options.beta2**t
    muon_rate = learning_rate * ((options.muon_learning_rate or options.learning_rate) / options.learning_rate)

    of_muon = [one for one in tensors if one.matrices]
    momenta = {one.place: jnp.where(advance, beta * one.first + (1 - beta) * one.grad, one.first) for one in of_muon}
    ahead = {one.place: beta * momenta[one.place] + (1 - beta) * one.grad for one in of_muon}
    orthogonal = _orthogonalised(of_muon, ahead, setup)

    def updated(one: _Tensor) -> tuple[Array, Array, Array | None]:
        if one.matrices is None:
            scalars = one.place, step, learning_rate, *corrections, advance
            arrays = one.param, one.first, one.second, one.grad
            return adamw.update_one(*arrays, key, *scalars, decay=one.decay, options=options)
        wide = one.param.astype(one.first.dtype)
        direction = orthogonal[one.place]
        if one.decay:
            direction = direction + options.weight_decay * wide
        new = jnp.where(advance, wide - muon_rate * direction, wide)
        return rounding.kept(new, one.param.dtype, key, step, one.place), momenta[one.place], None

    params, first, second = (jax.tree.unflatten(structure, part) for part in zip(*map(updated, tensors), strict=True))
    return params, Moments(first, second)


def _orthogonalised(tensors: list[_Tensor], ahead: dict[int, Array], setup: Setup) -> dict[int, Array]:
    """Returns for each tensor's place the direction in which it goes, from its momentum.

    Tensors of one kind go to their owners together, so that these are as many devices as can be.
    """
    kinds: dict[Matrices, list[_Tensor]] = {}
    for one in tensors:
        if one.matrices:
            kinds.setdefault(one.matrices, []).append(one)

    def rows(one: _Tensor, layers: int) -> Float[Array, "L _"]:
        momentum = ahead[one.place]
        dtype = setup.dtype if momentum.dtype == jnp.float32 else momentum.dtype
        return momentum.astype(dtype).reshape(layers, -1)

    together = {kind: jnp.concatenate([rows(one, kind.rows) for one in same]) for kind, same in kinds.items()}
    found = directions({kind: setup.to_owners(shards) for kind, shards in together.items()})
    back = {kind: setup.to_shards(found[kind], len(shards)) for kind, shards in together.items()}
    return {
        one.place: part.reshape(one.param.shape).astype(one.first.dtype)
        for kind, same in kinds.items()
        for one, part in zip(same, jnp.split(back[kind], len(same)), strict=True)
    }
