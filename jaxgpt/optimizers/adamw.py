"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Kingma and Ba 2015, arXiv:1412.6980).

    m ← β₁ m + (1 - β₁) g            m̂ = m / (1 - β₁ᵗ)
    v ← β₂ v + (1 - β₂) g²           v̂ = v / (1 - β₂ᵗ)
    θ ← θ - η ( m̂ / (√v̂ + ε) + λ θ )

with t = 1 for the first step, and λ = 0 for tensors that are not to decay. Moments are float32 whatever the parameters
are; a bfloat16 parameter's new value is rounded at random (`rounding.py`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.optimizers import rounding
from jaxgpt.options.config import Optimizer

Tree = Any


class Moments(NamedTuple):
    first: Tree  # m, like the parameters
    second: Tree  # v, like the parameters; None in the place of Muon's


def init(params: Tree) -> Moments:
    """Returns zero moments in the accumulation dtype, each in memory of its own."""

    def zeros() -> Tree:
        return jax.tree.map(lambda param: jnp.zeros(param.shape, accumulation_dtype(param.dtype)), params)

    return Moments(zeros(), zeros())


@jax.named_scope("adamw.update")
def update(
    params: Tree,
    moments: Moments,
    grads: Tree,
    decays: Tree,
    step: Int[Array, ""],
    learning_rate: Float[Array, ""],
    options: Optimizer,
    *,
    advance: Bool[Array, ""] | bool = True,
    key: Key[Array, ""] | None = None,
) -> tuple[Tree, Moments]:
    """Returns the new parameters and moments; the old ones where `advance` is False.

    Args:
        params: The parameters.
        moments: Their moments.
        grads: Their gradients, already clipped.
        decays: A tree of bools like `params`: which of them decay.
        step: The step's number, from 0.
        learning_rate: η.
        options: β₁, β₂, ε and λ.
        advance: False leaves everything as it is.
        key: Needed by bfloat16 parameters, whose new values are rounded at random.
    """
    t = step + 1
    correction1 = 1 - options.beta1**t
    correction2 = 1 - options.beta2**t

    def one(place, param, first, second, grad, decay):
        scalars = place, step, learning_rate, correction1, correction2, advance
        return update_one(param, first, second, grad, key, *scalars, decay=decay, options=options)

    places = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
    updated = jax.tree.map(one, places, params, *moments, grads, decays)
    params, first, second = jax.tree.transpose(jax.tree.structure(params), None, updated)
    return params, Moments(first, second)


@functools.partial(jax.jit, static_argnames=("decay", "options"))  # traced once for all tensors of a shape
def update_one(
    param: Array,
    first: Array,
    second: Array,
    grad: Array,
    key: Key[Array, ""] | None,
    place: ArrayLike,
    step: ArrayLike,
    learning_rate: ArrayLike,
    correction1: ArrayLike,
    correction2: ArrayLike,
    advance: ArrayLike,
    *,
    decay: bool,
    options: Optimizer,
) -> tuple[Array, Array, Array]:
    """Returns one tensor's new value and moments; `place` is its number among the parameters."""
    first = jnp.where(advance, options.beta1 * first + (1 - options.beta1) * grad, first)
    second = jnp.where(advance, options.beta2 * second + (1 - options.beta2) * jnp.square(grad), second)
    # Keeps a CPU's compiler from computing the moments a second time for the parameter, which would need copies of the
    # old ones: with it, all three are written over the old ones. A GPU's computes all three in one kernel.
    first, second = lax.platform_dependent(
        first, second, cpu=lambda *moments: lax.optimization_barrier(moments), default=lambda *moments: moments
    )
    direction = (first / correction1) / (jnp.sqrt(second / correction2) + options.epsilon)
    wide = param.astype(first.dtype)
    if decay:
        direction = direction + options.weight_decay * wide
    new = jnp.where(advance, wide - learning_rate * direction, wide)
    return rounding.kept(new, param.dtype, key, step, place), first, second
