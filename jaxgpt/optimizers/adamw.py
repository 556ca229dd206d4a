"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Kingma and Ba 2015, arXiv:1412.6980).

    m ← β₁ m + (1 - β₁) g            m̂ = m / (1 - β₁ᵗ)
    v ← β₂ v + (1 - β₂) g²           v̂ = v / (1 - β₂ᵗ)
    θ ← θ - η ( m̂ / (√v̂ + ε) + λ θ )

with t = 1 for the first step, and λ = 0 for tensors that are not to decay.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config import Optimizer

Tree = Any


class Moments(NamedTuple):
    first: Tree  # m, like the parameters
    second: Tree  # v, like the parameters


def init(params: Tree) -> Moments:
    return Moments(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))


def update(
    params: Tree,
    moments: Moments,
    grads: Tree,
    decays: Tree,
    step: Int[Array, ""],
    learning_rate: Float[Array, ""],
    options: Optimizer,
) -> tuple[Tree, Moments]:
    """New parameters and moments. `step` counts from 0; `decays` is a tree of bools like `params`."""
    t = step + 1
    correction1 = 1 - options.beta1**t
    correction2 = 1 - options.beta2**t

    def one(param, first, second, grad, decay):
        first = options.beta1 * first + (1 - options.beta1) * grad
        second = options.beta2 * second + (1 - options.beta2) * jnp.square(grad)
        direction = (first / correction1) / (jnp.sqrt(second / correction2) + options.epsilon)
        if decay:
            direction = direction + options.weight_decay * param
        return param - learning_rate * direction, first, second

    updated = jax.tree.map(one, params, *moments, grads, decays)
    params, first, second = jax.tree.transpose(jax.tree.structure(params), None, updated)
    return params, Moments(first, second)
