import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import linear, lora
from jaxgpt.proof import cases

sizes = st.integers(1, 9)


@given(B=sizes, T=sizes, inputs=sizes, outputs=sizes, R=sizes)
@example(B=1, T=1, inputs=1, outputs=1, R=1)
@example(B=1, T=5, inputs=3, outputs=130, R=4)
def test_gradients(assert_exact, B, T, inputs, outputs, R):
    assert_exact(cases.lora_case(jax.random.key(0), B, T, inputs, outputs, R))


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


def products(function, *arguments) -> list[tuple[int, ...]]:
    """The shapes of the results of all matrix products that a function has."""
    equations = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    return sorted(equation.outvars[0].aval.shape for equation in equations if equation.primitive.name == "dot_general")


def test_the_gradient_of_the_weight_is_never_formed(arrays):
    """Among backward's products only the gradient by x is as large as the layer, and none has the weight's shape."""
    params, x, dy = arrays
    found = products(lora.backward, params, linear.Residuals(x), dy)
    assert found == sorted([(5, 7, 6), (35, 2), (35, 2), (2, 10), (6, 2), (35, 6)])
    assert products(lora.backward, params._replace(adapter=None), linear.Residuals(x), dy) == [(5, 7, 6)]
    assert (6, 10) in products(linear.backward, linear.Params(params.weight), linear.Residuals(x), dy)


def test_without_an_adapter_it_is_the_frozen_layer(arrays):
    params, x, dy = arrays
    frozen = params._replace(adapter=None)
    y, residuals = lora.forward(frozen, x)
    expected, _ = linear.forward(linear.Params(params.weight, params.bias), x)
    np.testing.assert_array_equal(y, expected)
    grads, dx = lora.backward(frozen, residuals, dy)
    assert grads is None
    np.testing.assert_array_equal(dx, linear.backward(linear.Params(params.weight), residuals, dy)[1])
