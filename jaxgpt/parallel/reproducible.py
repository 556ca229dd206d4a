"""Gradients with the same bits on 1, 2, 4 and 8 devices: summed over fixed virtual shards, in a fixed tree.

Floating-point sums depend on their order, and XLA's on the shapes of what it sums. So every micro-batch is cut in 8
virtual shards of the same size, whatever the number of devices D, and each device computes the gradients of its 8/D one
after another. They are added in pairs, as in a tournament: inside of a device first, and then between devices whose
numbers differ in one bit, each adding what the other has:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

On the way between devices a sum is all of the gradients, log2 D times, where an all-reduce sends twice the gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgpt.parallel.mesh import AXIS, SHARDS


def summed(function: Callable[[Any], Any], batch: Any, devices: int) -> Any:
    """Sums `function` over the virtual shards of all devices, of this device's batch, whose arrays are (A, B, T).

    B divides by this device's number of shards, and the number of devices divides 8.
    """

    def shards(array: Any) -> Any:
        A, B, T = array.shape
        count = SHARDS // devices
        return jnp.moveaxis(array.reshape(A, count, B // count, T), 1, 0)

    total = _tree(function, jax.tree.map(shards, batch))
    distance = 1
    while distance < devices:
        pairs = [(device, device ^ distance) for device in range(devices)]
        total = jax.tree.map(lambda mine, pairs=pairs: mine + lax.ppermute(mine, AXIS, pairs), total)
        distance *= 2
    return total


def _tree(function: Callable[[Any], Any], shards: Any) -> Any:
    """Loops in loops, of two turns each, so that it is compiled once and keeps two sums at each height of the tree."""
    count = len(jax.tree.leaves(shards)[0])
    if count == 1:
        return function(jax.tree.map(lambda array: array[0], shards))
    halves = jax.tree.map(lambda array: array.reshape(2, count // 2, *array.shape[1:]), shards)
    sums = lax.map(lambda half: _tree(function, half), halves)
    return jax.tree.map(lambda pair: pair[0] + pair[1], sums)
