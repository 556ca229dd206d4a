"""The proof: every hand-written gradient beside `jax.grad` of the same forward.

The only module of the package that uses autodiff. A `Case` is a forward, its hand-written backward, and inputs;
checking it gives one `Row` per tensor. `jax.grad` always runs in float64, on inputs that have first been rounded to the
dtype under test, so that the figures are the hand-written backward's own rounding and nothing of the oracle's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxgpt.layers.numerics import accumulation_dtype

Tree = Any  # a pytree of arrays


class Case(NamedTuple):
    name: str
    inputs: Tree  # the gradient is taken by these
    forward: Callable[[Tree], Array]
    backward: Callable[[Tree, Array], Tree]  # (inputs, gradient by forward's output) to gradients by inputs
    depth: int = 1  # number of layers, one after another, through which rounding errors add up


class Row(NamedTuple):
    tensor: str
    error: float  # ‖a - b‖ / ‖b‖, a by hand, b by jax.grad
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def tolerance(dtype: DTypeLike, depth: int) -> float:
    """The relative error that rounding explains.

    A gradient passes about ten roundings of its dtype in a layer, each of at most eps/2. Where sums are taken in the
    dtype itself (float32) rather than in a wider one (bfloat16), a sum over a thousand tokens or channels adds a
    thousand more. Errors of random sign add up as their root, over `depth` layers too; twice that is allowed, for the
    tensors that cancel more than others. In float64 the bound is the project's promise, 1e-10, wide of rounding and far
    below any wrong term.
    """
    if jnp.dtype(dtype) == jnp.float64:
        return 1e-10
    roundings = 10 if accumulation_dtype(dtype) != dtype else 1000
    return 2 * float(jnp.finfo(dtype).eps) / 2 * math.sqrt(roundings * depth)


def check(case: Case, dtype: DTypeLike) -> list[Row]:
    """Returns one row per tensor of the case's inputs. Needs `jax_enable_x64`."""
    inputs = jax.tree.map(lambda array: jnp.asarray(array, dtype), case.inputs)
    exact = jax.tree.map(lambda array: jnp.asarray(array, np.float64), inputs)
    output = jax.eval_shape(case.forward, exact)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(output.shape), dtype)
    exact_dy = jnp.asarray(dy, np.float64)

    by_hand = jax.jit(case.backward)(inputs, dy)
    oracle = jax.jit(jax.grad(lambda inputs: jnp.sum(case.forward(inputs) * exact_dy)))(exact)
    by_hand, oracle = jax.tree.map(lambda array: np.asarray(array, np.float64), (by_hand, oracle))

    whole = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(oracle)))
    limit = tolerance(dtype, case.depth)
    rows = []
    for (path, a), b in zip(jax.tree.leaves_with_path(by_hand), jax.tree.leaves(oracle), strict=True):
        norm = float(np.linalg.norm(b))
        if norm < 1e-12 * whole:  # zero but for the oracle's rounding: measured against the whole gradient instead
            norm = whole
        difference = float(np.linalg.norm(a - b))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append(Row(f"{case.name}.{name}" if name else case.name, difference / norm if norm else difference, limit))
    return rows
