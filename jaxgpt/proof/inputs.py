"""Inputs of the gradient check's cases, made by NumPy: with JAX each would cost the compilation of a program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxgpt.layers import cross_entropy, dropout
from jaxgpt.proof.gradcheck import Tree


def generator(key: Key[Array, ""]) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def normals(key: Key[Array, ""], *shapes: tuple[int, ...]) -> list[Any]:
    random = generator(key)
    return [random.standard_normal(shape) for shape in shapes]


def noisy(key: Key[Array, ""], params: Tree) -> Tree:
    """Returns parameters with noise, so that biases, scales and adapters aren't at their special values."""
    leaves, structure = jax.tree.flatten(params)
    noise = normals(key, *[leaf.shape for leaf in leaves])
    leaves = [np.asarray(leaf) + 0.02 * more for leaf, more in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def integers(key: Key[Array, ""], shape: tuple[int, ...], end: int) -> Array:
    return jnp.asarray(generator(key).integers(0, end, shape, dtype=np.int32))


def document_starts(key: Key[Array, ""], B: int, T: int) -> Array:
    """Returns the places where each token's document begins, with documents of about three tokens."""
    begins = generator(key).random((B, T)) < 1 / 3
    return jnp.asarray(np.maximum.accumulate(np.where(begins, np.arange(T, dtype=np.int32), 0), axis=1))


def random_targets(key: Key[Array, ""], shape: tuple[int, ...], V: int) -> Array:
    """Random targets, the last of them ignored where there is more than one."""
    targets = np.asarray(integers(key, shape, V)).copy()
    if targets.size > 1:
        targets.flat[-1] = cross_entropy.IGNORED
    return jnp.asarray(targets)


def masks_of(key: Key[Array, ""], B: int, rate: float) -> dropout.Masks | None:
    """Returns dropout's masks of B sequences; None where the rate is 0."""
    return dropout.Masks(key, jnp.arange(B), rate) if rate else None
