import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import fp8, linear, unembedding
from jaxgpt.proof import cases

E4M3, E5M2 = fp8.FORMATS
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
sizes = st.integers(1, 9)


@given(B=sizes, T=sizes, inputs=sizes, outputs=sizes, again=st.booleans())
@example(B=1, T=1, inputs=1, outputs=1, again=False)
@example(B=1, T=5, inputs=3, outputs=130, again=True)
def test_gradients(assert_exact, B, T, inputs, outputs, again):
    assert_exact(cases.fp8_case(jax.random.key(0), B, T, inputs, outputs, again=again))


def emulated(x, form, largest):
    """The numbers that a tensor has in 8 bits, by NumPy and ml_dtypes in float64, and its scale."""
    largest = np.max(np.abs(x)) if largest is None else largest
    scale = 2.0 ** np.ceil(np.log2(largest / LARGEST[form]))
    codes = np.clip(x.astype(np.float64) / scale, -LARGEST[form], LARGEST[form]).astype(form)
    return codes.astype(np.float64) * scale, scale


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_rounding_is_that_of_the_format_for_every_bfloat16_number(form):
    """The compiled rounding is exact, though a compiler might leave it out."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    wide = bits.astype(np.float32)

    @jax.jit
    def numbers(x):
        return fp8.quantise(x, form, jnp.float32(LARGEST[form] / 4)).numbers(x.dtype)

    with np.errstate(all="ignore"):
        codes = np.clip(wide * 4, -LARGEST[form], LARGEST[form]).astype(form).astype(np.float32)
    expected = np.where(np.isfinite(wide), codes / 4, np.nan)
    np.testing.assert_array_equal(np.asarray(numbers(bits)).astype(np.float32), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("largest", [None, (2.0, 0.04, 0.5)])
def test_products_are_those_of_the_rounded_factors(dtype, largest):
    """NumPy multiplies them in float64; the rounding of float32 sums and of the result remains."""
    rng = np.random.default_rng(0)
    x, weight, bias, dy = (rng.normal(size=shape) for shape in [(2, 35, 48), (48, 30), (30,), (2, 35, 30)])
    x, weight, bias, dy = (np.asarray(part, dtype) for part in (x, 0.02 * weight, bias, dy))
    params = fp8.Params(weight, bias, None if largest is None else jnp.asarray(largest))
    y, kept = jax.jit(fp8.forward)(params, x)
    grads, dx = jax.jit(fp8.backward)(params, kept, dy)

    forms, wide = (E4M3, E4M3, E5M2), [part.astype(np.float64) for part in (x, weight, dy)]
    (x8, _), (w8, _), (g8, _) = (
        emulated(part, form, None if largest is None else largest[place])
        for place, (part, form) in enumerate(zip(wide, forms, strict=True))
    )
    rounding = float(jnp.finfo(dtype).eps)
    for found, expected, of_dtype in (
        (y, x8 @ w8 + bias.astype(np.float64), rounding),
        (dx, g8 @ w8.T, rounding),
        (grads.weight, np.einsum("btc,btf->cf", x8, g8), 0),
        (grads.bias, wide[2].sum((0, 1)), 0),
    ):
        difference = np.linalg.norm(np.asarray(found, np.float64) - expected)
        assert difference <= (of_dtype + 1e-6) * np.linalg.norm(expected)
    seen = [np.max(np.abs(part)) for part in wide]
    np.testing.assert_array_equal(grads.largest, np.asarray(seen, np.float32))


@given(st.floats(1e-25, 1e25))
@example(448.0)
@example(448.0 * 2**-9)
def test_a_scale_is_the_smallest_power_of_two_with_room(largest):
    largest = np.float32(largest)
    for form, limit in LARGEST.items():
        scale = float(fp8.scale_of(jnp.asarray(largest), form))
        assert np.frexp(scale)[0] == 0.5
        assert limit * scale / 2 < largest * (1 + 1e-6)
        assert largest <= limit * scale * (1 + 1e-6)


@pytest.mark.parametrize("largest", [0.0, np.inf, np.nan])
def test_what_has_no_magnitude_has_the_scale_1(largest):
    assert fp8.scale_of(jnp.float32(largest), E4M3) == 1


def test_numbers_beyond_the_expected_are_clamped():
    """A scale for 3 leaves room up to 448 / 128 = 3.5."""
    x = jnp.asarray([1.0, -3.0, 3.4, 5.0, -700.0])
    found = fp8.quantise(x, E4M3, jnp.float32(3.0))
    np.testing.assert_array_equal(found.numbers(jnp.float32), [1.0, -3.0, 3.5, 3.5, -3.5])
    assert found.largest == 700


def test_zeros_stay_zeros():
    params = fp8.Params(jnp.zeros((4, 3)), jnp.ones(3))
    y, kept = fp8.forward(params, jnp.zeros((2, 4)))
    grads, dx = fp8.backward(params, kept, jnp.zeros((2, 3)))
    np.testing.assert_array_equal(y, np.ones((2, 3)))
    for zeros in (dx, *grads):
        assert not np.any(zeros)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_becomes_nan(bad):
    """e4m3 has no infinity: clamped, one would be a plain number, and the step would not be skipped."""
    params, x, dy = fp8.Params(jnp.ones((2, 2)), None, jnp.ones(3)), jnp.ones((3, 2)), jnp.ones((3, 2))
    y, kept = fp8.forward(params, x.at[1, 1].set(bad))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[0]).all()
    _, dx = fp8.backward(params, kept, dy.at[0, 0].set(bad))
    assert np.isnan(dx[0]).all()
    assert np.isnan(fp8.forward(params._replace(weight=params.weight.at[0, 0].set(bad)), x)[0][:, 0]).all()


@pytest.mark.parametrize("tokens", [3, 300])
def test_parts_are_those_of_the_whole(tokens):
    rng = np.random.default_rng(0)
    weight, bias, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(8, 12), (12,), (tokens, 8)])
    params = fp8.Params(weight, bias, jnp.full(3, 4.0))
    parts, kept = fp8.forward_in_parts(params, x, (4, 6))
    y, again = fp8.forward(params, x)
    np.testing.assert_allclose(np.concatenate(parts, axis=-1), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept.numbers(jnp.float32), again.numbers(jnp.float32))


def test_residuals_have_a_byte_a_number():
    _, kept = jax.eval_shape(fp8.forward, fp8.Params(jnp.ones((4, 3), jnp.bfloat16)), jnp.ones((2, 4), jnp.bfloat16))
    assert kept.codes.dtype.itemsize == 1
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == 8 + 2


def test_gradients_from_x_are_those_from_what_forward_kept():
    rng = np.random.default_rng(1)
    weight, x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(5, 4), (7, 5), (7, 4)])
    params = fp8.Params(weight, None, jnp.full(3, 2.0))
    _, kept = fp8.forward(params, x)
    for one, other in zip(
        jax.tree.leaves(fp8.backward(params, kept, dy)),
        jax.tree.leaves(fp8.backward(params, linear.Residuals(x), dy)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_the_heads_products_are_those_of_the_rounded_factors():
    """NumPy computes logits, their gradient in e5m2, and its products with both; each chunk has its own scales."""
    rng = np.random.default_rng(0)
    weight, x = (rng.normal(size=shape).astype(np.float32) for shape in [(11, 6), (5, 6)])
    targets = rng.integers(0, 11, 5)

    def objective(logp):
        return -jnp.sum(logp), jnp.full(logp.shape, -1.0, logp.dtype)

    loss, found = jax.jit(
        lambda weight, x: unembedding.forward(
            unembedding.Params(weight), x, jnp.asarray(targets), objective, vocabulary_size=11, chunk=3, eight_bits=True
        )
    )(weight, x)
    w8, _ = emulated(weight, E4M3, None)
    expected, dx, dweight = 0.0, [], np.zeros((11, 6))
    for rows in (slice(0, 3), slice(3, 5)):
        x8, _ = emulated(x[rows], E4M3, None)
        shifted = x8 @ w8.T
        logp = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        chosen = np.eye(11)[targets[rows]]
        expected -= (logp * chosen).sum()
        g8, _ = emulated((np.exp(logp) - chosen).astype(np.float32), E5M2, None)
        dx.append(g8 @ w8)
        dweight += g8.T @ x8
    assert loss == pytest.approx(expected, rel=1e-5)
    for one, other in ((found.dx, np.concatenate(dx)), (found.dweight, dweight)):
        assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(other)  # a number between two may go either way
