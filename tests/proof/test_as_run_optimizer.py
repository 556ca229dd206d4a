"""Muon's orthogonalisation as the check of a step has it: beside the step's, and its error beside a measured one."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.optimizers import newton_schulz
from jaxgpt.proof.as_run_optimizer import Rounding, orthogonalised

EXACT = Rounding(0.0, 0.0, False)


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 7), (24, 40), (40, 24)])
def test_it_is_the_steps(shape, x64):
    """The check computes it by singular values, and the step by products."""
    given = matrix(*shape)
    found, error = orthogonalised(given, 0.0, EXACT)
    np.testing.assert_allclose(found, newton_schulz.orthogonalise(jnp.asarray(given)[None])[0], atol=1e-12)
    assert error == 0


def test_zeros_stay_zeros():
    found, error = orthogonalised(np.zeros((3, 5)), 0.0, EXACT)
    assert not found.any()
    assert error == 0


@pytest.mark.parametrize("shape", [(9, 9), (12, 30), (30, 12)])
def test_an_error_is_amplified_as_the_singular_values_say(shape):
    """The mean of 400 draws, each of which has some hundred independent numbers: to a tenth."""
    given, size, random = matrix(*shape), 1e-6, np.random.default_rng(1)
    right, expected = orthogonalised(given, size, EXACT)
    errors = random.standard_normal((400, *shape))
    errors *= size / np.sqrt(np.prod(shape))
    squares = [np.sum(np.square(orthogonalised(given + error, 0.0, EXACT)[0] - right)) for error in errors]
    assert np.sqrt(np.mean(squares)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_within_what_is_expected_of_it(dtype):
    """eps is twice the largest rounding, and not all are as large."""
    given = np.stack([matrix(20, 30, seed) for seed in range(10)])
    rounding = Rounding(0.0, float(jnp.finfo(dtype).eps), dtype == "float32")
    found = np.asarray(newton_schulz.orthogonalise(jnp.asarray(given, dtype)), np.float64)
    for one, of_step in zip(given, found, strict=True):
        right, expected = orthogonalised(one, 0.0, rounding)
        assert expected / 50 < np.linalg.norm(of_step - right) < expected
