"""Clipping by the global norm (Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063, algorithm 1)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALL = 1 << 16  # numbers in a tensor, below which many are summed in one program rather than each in its own


@jax.named_scope("clipping.global_norm")
def global_norm(grads: Any, total: Callable[[Array], Array] | None = None) -> Float[Array, ""]:
    """Returns the Euclidean norm of all gradients taken as one vector.

    Args:
        grads: The gradients, or this device's shards of them.
        total: Sums the squares over the devices, where each has a shard of the gradients.
    """
    leaves = jax.tree.leaves(grads)
    small = [grad.reshape(-1) for grad in leaves if grad.size < SMALL]
    large = [grad for grad in leaves if grad.size >= SMALL]
    parts = [*large, jnp.concatenate(small)] if small else large
    squares = jnp.asarray(sum(_square(part) for part in parts))
    return jnp.sqrt(total(squares) if total else squares)


@jax.jit  # traced once for all gradients of a shape
def _square(grad: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.square(grad))


def factor(norm: Float[Array, ""], limit: float) -> Float[Array, ""]:
    """Returns the factor that brings gradients of this norm to at most `limit`; 1 where `limit` is 0."""
    return jnp.minimum(1, limit / norm) if limit else jnp.ones_like(norm)
