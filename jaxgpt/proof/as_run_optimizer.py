"""The optimizers' formulas a second time, by NumPy in float64 and of whole tensors, for the check of a step.

The step's own could not be found to be wrong with themselves. Muon's matrices are orthogonalised by their singular
values here, and not by products alone: M / (1.02 ‖M‖) = U Σ Vᵀ becomes U p(Σ) Vᵀ, where p is all five polynomials one
after another. U and Σ² are the eigenvectors and eigenvalues of its product with its transpose.

An orthogonalisation amplifies errors, small singular values' by up to p'(0) = 990. By how much is known from the
singular values. An error E of X becomes, in the bases of U and V, to first order (Higham 2008, chapter 3; p is odd)

    symmetric part        p[σ_i, σ_j] (E_ij + E_ji) / 2            p[x, y] = (p(x) - p(y)) / (x - y)
    the other part        p[σ_i, -σ_j] (E_ij - E_ji) / 2
    columns beyond M      p[σ_i, 0] E_ij

An E of random numbers, whose norm is e, therefore becomes one of the norm

    e √( Σ_ij ½ (p[σ_i, σ_j]² + p[σ_i, -σ_j]²) + (N - M) Σ_i p[σ_i, 0]² ) / √(M N)

with p'(σ_i) in both places where i = j. p rises and falls from 0.001 to 1, so that p' is large in between too.

The gradient's error comes in before the first polynomial, (1 - β²) of it, and so does the rounding of the momentum to
the dtype of the products. Behind each polynomial come the roundings of its terms, eps of |a| σ + |b| σ³ + |c| σ⁵; where
sums are no wider than their terms, √N times that. All are independent, so that their squares add up.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.optimizers import schedules
from jaxgpt.optimizers.newton_schulz import COEFFICIENTS, EPSILON, SAFETY
from jaxgpt.options.config import Config
from jaxgpt.proof.as_run import parts
from jaxgpt.proof.gradcheck_oracle import Tree, Truth

WIDE = 4  # times a gradient's relative error that a moment may have, and AdamW's update: it is divided and squared
RMS = 0.2  # of the numbers of Muon's direction
GATED = ("mlp_in", "w_in")  # fields with a gate and its up projection side by side, but for GPT-2


class Rounding(NamedTuple):
    """The relative errors that the step's dtype explains."""

    gradient: float
    eps: float  # of products
    sums: bool  # whether sums are rounded as their terms are


class Expected(NamedTuple):
    """A tensor and its moments after a step; Muon's has one moment."""

    arrays: tuple[np.ndarray, ...]
    limits: tuple[float, ...]  # relative errors of their changes that rounding explains


def norm(grads: Tree) -> float:
    return math.sqrt(sum(float(np.vdot(grad, grad)) for grad in jax.tree.leaves(grads)))


def matrices_beside(path: tuple, shape: tuple[int, ...], config: Config) -> list[Any] | None:
    """Returns the columns of the matrices that lie side by side in a stacked tensor; None where it is AdamW's."""
    names = {getattr(part, "name", "") for part in path}
    if config.optimizer.name != "muon" or "blocks" not in names or "router" in names or len(shape) < 3:
        return None
    if names & set(GATED) and config.model.family != "gpt2":
        half = shape[-1] // 2
        return [(..., slice(half)), (..., slice(half, None))]
    return [columns for _, columns in parts(path, shape, config.model)]


def make_update(truth: Truth, step: int, config: Config, rounding: Rounding) -> Callable[..., Expected]:
    """Returns what the optimizer makes of a tensor, its moments and its gradient before clipping, in float64.

    The function's arguments are those four, stacked, whether the tensor decays, and its `matrices_beside`.
    """
    options, size = config.optimizer, norm(truth.grads)
    factor = min(1.0, options.clip_norm / size) if options.clip_norm and size else 1.0
    rate = float(schedules.learning_rate(jnp.int32(step), config.training.steps, options))
    of_muon = rate * (options.muon_learning_rate or options.learning_rate) / options.learning_rate

    def update(param: Any, first: Any, second: Any, grad: Any, decay: bool, columns: list[Any] | None) -> Expected:
        param, first, grad = (np.asarray(array, np.float64) for array in (param, first, factor * grad))
        decayed = options.weight_decay * decay * param
        if columns is not None:
            first = options.momentum * first + (1 - options.momentum) * grad
            direction, errors = _directions(first, grad, columns, options.momentum, rounding)
            change = -of_muon * (direction + decayed)
            limit = float(np.max(of_muon * errors / _norms(change)))
            return Expected((param + change, first), (limit, WIDE * rounding.gradient))
        t = step + 1
        first = options.beta1 * first + (1 - options.beta1) * grad
        second = options.beta2 * np.asarray(second, np.float64) + (1 - options.beta2) * np.square(grad)
        scaled = first / (1 - options.beta1**t) / (np.sqrt(second / (1 - options.beta2**t)) + options.epsilon)
        return Expected((param - rate * (scaled + decayed), first, second), 3 * (WIDE * rounding.gradient,))

    return update


def _norms(layers: np.ndarray) -> np.ndarray:
    """Returns each layer's norm; 1 of zeros."""
    norms = np.linalg.norm(layers.reshape(len(layers), -1), axis=1)
    return np.where(norms > 0, norms, 1)


def _directions(
    momentum: np.ndarray, grad: np.ndarray, columns: list[Any], beta: float, rounding: Rounding
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions in which a stacked tensor's matrices go, and the norm of each layer's error."""
    ahead = beta * momentum + (1 - beta) * grad
    directions, squares = np.zeros_like(ahead), np.zeros(len(ahead))
    for place in np.ndindex(ahead.shape[:-2]):  # the layer, and the expert
        for part in columns:
            matrix, of_gradient = ahead[place][part], float(np.linalg.norm(grad[place][part]))
            found, error = orthogonalised(matrix, (1 - beta**2) * rounding.gradient * of_gradient, rounding)
            scale = RMS * math.sqrt(max(matrix.shape))
            directions[place][part] = scale * found
            squares[place[0]] += (scale * error) ** 2
    return directions, np.sqrt(squares)


def orthogonalised(matrix: np.ndarray, error: float, rounding: Rounding) -> tuple[np.ndarray, float]:
    """Returns U p(Σ) Vᵀ of a matrix, and its error's norm, where that of the matrix has this norm."""
    if matrix.shape[0] > matrix.shape[1]:
        found, error = orthogonalised(matrix.T, error, rounding)
        return found.T, error
    length = SAFETY * (float(np.linalg.norm(matrix)) + EPSILON)
    x = matrix / length
    squares, left = np.linalg.eigh(x @ x.T)
    values, unit = np.sqrt(np.maximum(squares, 0)), rounding.eps * (math.sqrt(x.shape[1]) if rounding.sums else 1)
    growth = np.ones_like(values)
    entering = [math.hypot(error / length, unit * float(np.linalg.norm(x)))]
    slopes = []
    for a, b, c in COEFFICIENTS:
        slopes.append([_slope(values[:, None], y, (a, b, c)) for y in (values, -values, np.zeros(1))])
        entering.append(unit * float(np.linalg.norm(abs(a) * values + abs(b) * values**3 + abs(c) * values**5)))
        growth = growth * slopes[-1][2][:, 0]
        values = values * slopes[-1][2][:, 0]
    return (left * growth) @ (left.T @ x), _amplified(entering, slopes, *x.shape)


def _slope(x: np.ndarray, y: np.ndarray, coefficients: tuple[float, float, float]) -> np.ndarray:
    """Returns p[x, y] of p(x) = a x + b x³ + c x⁵."""
    a, b, c = coefficients
    square = x**2 + x * y + y**2
    return a + b * square + c * (square**2 - x * y * (x + y) ** 2)


def _amplified(entering: list[float], slopes: list[list[np.ndarray]], M: int, N: int) -> float:
    """Returns the norm of all errors behind the last polynomial, of what enters before each of them and behind it."""
    *before, total = (size**2 for size in entering)
    behind = [np.ones_like(slope) for slope in slopes[0]]
    for size, slope in zip(reversed(before), reversed(slopes), strict=True):
        behind = [later * now for later, now in zip(behind, slope, strict=True)]
        same, opposite, beyond = map(np.square, behind)
        np.fill_diagonal(opposite, np.diag(same))  # where there is no other part
        total += size * float(np.sum(same + opposite) / 2 + (N - M) * np.sum(beyond)) / (M * N)
    return math.sqrt(total)
