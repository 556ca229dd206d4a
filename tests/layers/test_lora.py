import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import linear, lora
from jaxgpt.proof import cases

counts = st.integers(1, 9)


@given(B=counts, T=counts, inputs=counts, outputs=counts, R=counts)
@example(B=1, T=1, inputs=1, outputs=1, R=1)
@example(B=1, T=5, inputs=3, outputs=130, R=4)
def test_gradients(assert_exact, B, T, inputs, outputs, R):
    for two_products in (False, True):
        assert_exact(cases.lora_case(jax.random.key(0), B, T, inputs, outputs, R, two_products=two_products))


@pytest.fixture
def arrays(x64):
    """(params, x, dy) of 35 tokens, 6 inputs, 10 outputs and rank 2, in float64."""
    rng = np.random.default_rng(0)
    weight, bias, a, b, x, dy = (
        jnp.asarray(rng.normal(size=shape)) for shape in [(6, 10), (10,), (6, 2), (2, 10), (5, 7, 6), (5, 7, 10)]
    )
    return lora.Params(weight, bias, lora.Adapter(a, b), 4.0), x, dy


def test_it_is_a_linear_layer_of_the_merged_weight(arrays):
    params, x, dy = arrays
    weight, bias, (a, b), scaling = params
    merged = linear.Params(weight + scaling * a @ b)
    y, residuals = lora.forward(params, x)
    expected, _ = linear.forward(merged._replace(bias=bias), x)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    grads, dx = lora.backward(params, residuals, dy)
    dmerged, expected_dx = linear.backward(merged, residuals, dy)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-12)
    assert grads is not None
    np.testing.assert_allclose(grads.a, scaling * dmerged.weight @ b.T, atol=1e-11)  # of ∂w that is not formed
    np.testing.assert_allclose(grads.b, scaling * a.T @ dmerged.weight, atol=1e-11)


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def products(function, *arguments, platform: str = "cpu") -> list[tuple[int, ...]]:
    """The sizes (of the result, and at last of the sum) of all matrix products that a function has on a platform."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    shapes = r"\(tensor<([\dx]+)x\w+>.*-> tensor<([\dx]+)x"
    found = re.findall(rf"dot_general.*contracting_dims = \[(\d+)\].*: {shapes}", text)
    return sorted((*sizes(result), sizes(left)[int(axis)]) for axis, left, result in found)


def test_the_gradient_of_the_weight_is_never_formed(arrays):
    """Only products by x are as large as the layer in backward, and none sums over tokens to the weight's shape.

    On a CPU the weight is merged (6, 10, 2): a sum over the rank.
    """
    params, x, dy = arrays
    arguments = linear.Residuals(x), dy
    of_adapter = [(35, 2, 6), (35, 2, 10), (2, 10, 35)]
    found = products(lora.backward, params, *arguments)
    assert found == sorted([*of_adapter, (6, 2, 35), (6, 10, 2), (35, 6, 10)])
    found = products(lora.backward, params, *arguments, platform="cuda")
    assert found == sorted([*of_adapter, (6, 2, 35), (35, 6, 2), (35, 6, 10)])
    assert products(lora.backward, params._replace(adapter=None), *arguments) == [(5, 7, 6, 10)]
    assert (6, 10, 35) in products(linear.backward, linear.Params(params.weight), *arguments)


def test_bfloat16_loses_no_small_adapter():
    """Each weight gets 2⁻¹³, which is less than bfloat16's step at 1; what the weights themselves give is 0."""
    row = 1 - 2 * (jnp.arange(64, dtype=jnp.bfloat16) % 2)
    a, b, ones = (jnp.full(shape, 0.125, jnp.bfloat16) for shape in [(64, 4), (4, 64), (300, 64)])
    params = lora.Params(jnp.outer(row, row), None, lora.Adapter(a, b), 2.0**-9)
    y, residuals = lora.forward(params, 8 * ones)
    _, dx = lora.backward(params, residuals, 8 * ones)
    for found in (y, dx):
        np.testing.assert_array_equal(np.asarray(found, np.float32), 64 * 2.0**-13)


def test_without_an_adapter_it_is_the_frozen_layer(arrays):
    params, x, dy = arrays
    frozen = params._replace(adapter=None)
    y, residuals = lora.forward(frozen, x)
    expected, _ = linear.forward(linear.Params(params.weight, params.bias), x)
    np.testing.assert_array_equal(y, expected)
    grads, dx = lora.backward(frozen, residuals, dy)
    assert grads is None
    np.testing.assert_array_equal(dx, linear.backward(linear.Params(params.weight), residuals, dy)[1])
