"""The iteration beside the singular values that it is about, and its coefficients beside their derivation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.optimizers import newton_schulz
from jaxgpt.optimizers.newton_schulz import COEFFICIENTS, EPSILON, SAFETY

LEAST, LOWEST, HIGHEST = 1e-3, 0.8588, 1.1412  # singular values from 0.001 to 1 end between the other two


def matrix(shape=(6, 9), singular_values=None, seed=0):
    """A random matrix, with these singular values."""
    rng = np.random.default_rng(seed)
    if singular_values is None:
        return rng.normal(size=shape)
    rank = len(singular_values)
    left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in shape)
    return left * np.asarray(singular_values) @ right.T


def polynomials(values):
    """Applies the iteration's polynomials to singular values."""
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    return values


def by_singular_values(m):
    """Orthogonalises without an iteration on matrices, in float64: the polynomials act on the singular values."""
    left, values, right = np.linalg.svd(np.asarray(m, np.float64), full_matrices=False)
    return left * polynomials(values / (SAFETY * (np.linalg.norm(values) + EPSILON))) @ right


def test_the_coefficients_are_the_best_polynomials():
    """Remez's exchange, as in the paper's appendix, finds them: it makes the greatest distance from 1 smallest.

    On [l, u] it is attained at four points, with alternating signs; the inner two are the polynomial's own extremes.
    """
    safety, cushion = 1.02, 0.02
    low, high = LEAST, 1.0
    for number, found in enumerate(COEFFICIENTS):
        points = np.linspace(max(low, cushion * high), high, 4)
        for _ in range(50):
            equations = [[x, x**3, x**5, (-1) ** place] for place, x in enumerate(points)]
            a, b, c, _ = np.linalg.solve(equations, np.ones(4))
            points[1:3] = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a])))

        def p(x, a=a, b=b, c=c):
            return a * x + b * x**3 + c * x**5

        # Below the cushion the interval is wider than the polynomial was made for: 1 is put in its middle again.
        scale = 2 / (p(low) + p(high)) if cushion * high > low else 1.0
        shrink = safety if number < len(COEFFICIENTS) - 1 else 1.0
        expected = np.array([a / shrink, b / shrink**3, c / shrink**5]) * scale
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        low, high = np.dot(found, [low, low**3, low**5]), 0.0
        high = 2 - low


def test_singular_values_end_near_one():
    values = np.geomspace(LEAST, 1, 100_001)
    assert LOWEST < polynomials(values).min() < LOWEST + 1e-3
    assert HIGHEST - 1e-3 < polynomials(values).max() < HIGHEST
    small = np.geomspace(1e-12, LEAST, 1001)
    assert (polynomials(small) / small).max() < 990
    assert (polynomials(small) > 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 5), (6, 9), (9, 6), (32, 100)])
def test_it_equals_the_polynomials_of_the_singular_values_in_float64(x64, shape):
    several = np.stack([matrix(shape, seed=seed) for seed in range(3)])
    found = newton_schulz.orthogonalise(jnp.asarray(several))
    np.testing.assert_allclose(found, [by_singular_values(m) for m in several], atol=1e-12)


def test_the_result_is_nearly_u_vt():
    """It has the same singular vectors, and values within the bounds, in float32 at a condition number of 300."""
    m = matrix((6, 9), np.geomspace(1, 1 / 300, 6))
    found = np.asarray(newton_schulz.orthogonalise(jnp.asarray(m[None], jnp.float32))[0], np.float64)
    left, _, right = np.linalg.svd(m, full_matrices=False)
    values = left.T @ found @ right.T
    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-4)
    assert (np.diag(values) > LOWEST - 1e-3).all()
    assert (np.diag(values) < HIGHEST + 1e-3).all()


def test_bfloat16_stays_in_the_bounds_but_for_its_rounding():
    """Numbers of 8 bits, five iterations: what two singular values add to each other is a few of the last bits."""
    m = matrix((24, 40), np.geomspace(1, 1 / 100, 24))
    found = newton_schulz.orthogonalise(jnp.asarray(m[None], jnp.bfloat16))[0]
    assert found.dtype == jnp.bfloat16
    values = np.linalg.svd(np.asarray(found, np.float64), compute_uv=False)
    assert values.min() > LOWEST - 0.1
    assert values.max() < HIGHEST + 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_direction_counts(dtype):
    """The gradient is scaled by 10⁻³ and by 10⁶; one at the size of epsilon fades, and zeros stay zeros."""
    m = jnp.asarray(matrix(singular_values=np.geomspace(1, 0.1, 6))[None], dtype)
    found = np.asarray(newton_schulz.orthogonalise(m), np.float32)
    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[dtype]
    for scale in (1e-3, 1e6):
        scaled = newton_schulz.orthogonalise((m * scale).astype(dtype))
        np.testing.assert_allclose(np.asarray(scaled, np.float32), found, atol=tolerance)
    assert np.abs(newton_schulz.orthogonalise(m * 1e-15)).max() < 1e-3
    assert not newton_schulz.orthogonalise(jnp.zeros((2, 3, 4), dtype)).any()


def test_matrices_one_after_another_are_those_together(monkeypatch):
    """Any number may be multiplied at once, also one that divides nothing; each matrix is orthogonalised by itself."""
    several = jnp.asarray(np.stack([matrix(seed=seed) for seed in range(7)]), jnp.float32)
    together = newton_schulz.orthogonalise(several)
    for at_once in (1, 3):
        monkeypatch.setattr(newton_schulz, "TOGETHER", at_once * 6 * 9)
        np.testing.assert_allclose(newton_schulz.orthogonalise(several), together, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48)])
def test_the_operations_are_those_of_the_compiled_program(shape):
    """Products are all but a few numbers' worth: those of one matrix, for which there is no loop to be counted."""
    program = jax.jit(newton_schulz._orthogonalised).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    products = newton_schulz.operations(*shape)
    M, N = shape
    elementwise = 4 * M * N + 5 * (3 * M * M + 2 * M * N)
    found: Any = program.cost_analysis()
    assert found["flops"] == pytest.approx(products + elementwise, rel=0.02)
    assert newton_schulz.operations(*reversed(shape)) == products
