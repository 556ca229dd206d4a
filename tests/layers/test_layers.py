"""The contract of every layer's dtypes and shapes, and that annotations are checked in tests at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxgpt.layers import (
    attention,
    embedding,
    gelu,
    layernorm,
    linear,
    lora,
    moe,
    residual,
    rmsnorm,
    rotary,
    router,
    swiglu,
    unembedding,
)

B, T, C, F, V, Vp = 2, 3, 4, 5, 6, 7


def shapes(dtype, *sizes):
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def likelihood(logp):
    return -jnp.sum(logp), -jnp.ones_like(logp)


def forward_and_backward(name, dtype):
    """(y, gradients of the parameters, dx) of a layer, as shapes and dtypes."""
    x, dy, tokens = *shapes(dtype, (B, T, C), (B, T, C)), jax.ShapeDtypeStruct((B, T), jnp.int32)
    match name:
        case "rmsnorm":
            params = rmsnorm.Params(*shapes(dtype, (C,)))
            y, residuals = jax.eval_shape(rmsnorm.forward, params, x)
            return params, x, y, *jax.eval_shape(rmsnorm.backward, params, residuals, y)
        case "rotary":
            (x,) = shapes(dtype, (B, T, 2, C))
            places = jax.ShapeDtypeStruct((1, T), jnp.int32)
            y = jax.eval_shape(rotary.forward, x, places)
            return (), x, y, (), jax.eval_shape(rotary.backward, y, places)
        case "swiglu":
            y, residuals = jax.eval_shape(swiglu.forward, x, x)
            return (), (x, x), y, (), jax.eval_shape(swiglu.backward, residuals, dy)
        case "moe":
            x, dy = shapes(dtype, (T, C), (T, C))
            params = moe.Params(router.Params(*shapes(dtype, (C, 3))), *shapes(dtype, (3, C, 2 * F), (3, F, C)))
            run = functools.partial(moe.forward, choices=2, softmax="after")
            y, statistics, residuals = jax.eval_shape(run, params, x)
            back = functools.partial(moe.backward, softmax="after")
            return params, x, y, *jax.eval_shape(back, params, residuals, dy, statistics)
        case "linear" | "layernorm":
            layer = {"linear": linear, "layernorm": layernorm}[name]
            params = linear.Params(*shapes(dtype, (C, F), (F,))) if layer is linear else None
            params = params or layernorm.Params(*shapes(dtype, (C,), (C,)))
            y, residuals = jax.eval_shape(layer.forward, params, x)
            return params, x, y, *jax.eval_shape(layer.backward, params, residuals, y)
        case "lora":
            weight, bias, *adapter = shapes(dtype, (C, F), (F,), (C, 2), (2, F))
            params = lora.Params(weight, bias, lora.Adapter(*adapter), 0.5)
            y, residuals = jax.eval_shape(lora.forward, params, x)
            return params.adapter, x, y, *jax.eval_shape(lora.backward, params, residuals, y)
        case "gelu":
            y, residuals = jax.eval_shape(gelu.forward, x)
            return (), x, y, (), jax.eval_shape(gelu.backward, residuals, dy)
        case "residual":
            dx, dbranch = jax.eval_shape(residual.backward, dy)
            return (), (x, x), jax.eval_shape(residual.forward, x, x), (), (dx, dbranch)
        case "embedding":
            params = embedding.Params(*shapes(dtype, (Vp, C), (T + 1, C)))
            y, residuals = jax.eval_shape(embedding.forward, params, tokens)
            return params, (), y, jax.eval_shape(embedding.backward, params, residuals, y), ()
        case "attention":
            qkv = shapes(dtype, *[(B, T, 2, C)] * 3)
            y, residuals = jax.eval_shape(lambda *qkv: attention.forward(*qkv, block=2), *qkv)
            gradients = jax.eval_shape(lambda *inputs: attention.backward(*inputs, block=2), residuals, y)
            return (), tuple(qkv), y, (), gradients
        case "unembedding":
            params = unembedding.Params(*shapes(dtype, (Vp, C)))
            loss, residuals = jax.eval_shape(
                lambda *inputs: unembedding.forward(*inputs, likelihood, vocabulary_size=V, chunk=2), params, x, tokens
            )
            return params, x, loss, *jax.eval_shape(unembedding.backward, residuals)


LAYERS = [
    *("embedding", "linear", "layernorm", "gelu", "attention", "residual", "unembedding"),
    *("rmsnorm", "rotary", "swiglu", "moe", "lora"),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_and_shapes(x64, name, dtype):
    """Activations and their gradients stay in the dtype, bfloat16 too; parameters' gradients are in at least float32.

    Gradients have the shapes of what they are gradients of. With 64-bit numbers allowed, so that a float64 that came
    out of a Python or NumPy number would be seen.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    results = forward_and_backward(name, dtype)
    assert results is not None
    params, x, y, dparams, dx = results
    assert y.dtype == (wide if name == "unembedding" else dtype)  # a loss is a sum
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), dx) == jax.tree.map(lambda leaf: (leaf.shape, dtype), x)
    assert jax.tree.map(lambda leaf: leaf.shape, dparams) == jax.tree.map(lambda leaf: leaf.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(dparams)} <= {wide}


def test_leading_axes_are_only_a_shape():
    """(B, T, C) and (B·T, C) give the same, and gradients of the parameters are sums over all leading axes."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, B, T, C)).astype(np.float32)
    weights = rng.normal(size=(C, C)).astype(np.float32)

    @jax.jit
    def run(weights, x, dy):
        linear_params, layernorm_params = linear.Params(weights, weights[0]), layernorm.Params(weights[0], weights[1])
        hidden, linear_residuals = linear.forward(linear_params, x)
        active, gelu_residuals = gelu.forward(hidden)
        y, layernorm_residuals = layernorm.forward(layernorm_params, residual.forward(x, active))

        layernorm_grads, dsum = layernorm.backward(layernorm_params, layernorm_residuals, dy)
        dx, dactive = residual.backward(dsum)
        dhidden = gelu.backward(gelu_residuals, dactive)
        linear_grads, dx_through = linear.backward(linear_params, linear_residuals, dhidden)
        return (y, dx + dx_through), (layernorm_grads, linear_grads)

    arrays, grads = run(weights, x, dy)
    flat_arrays, flat_grads = run(weights, x.reshape(B * T, C), dy.reshape(B * T, C))
    for a, b in zip(arrays, flat_arrays, strict=True):
        np.testing.assert_allclose(np.asarray(a).reshape(B * T, C), b, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, flat_grads)


def test_annotations_are_checked():
    with pytest.raises(TypeCheckError):
        residual.forward(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 4)))
    with pytest.raises(TypeCheckError):
        gelu.forward(jnp.ones((1, 2, 3), jnp.int32))
