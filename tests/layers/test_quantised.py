"""Quantised weights against an independent computation by NumPy, number by number; and the bits of a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.layers import quantised

FORMS = [(form, double) for form in ("int8", "nf4") for double in (False, True)]


def normal(*shape: int) -> np.ndarray:
    """Numbers of which one block is all zeros and one has an outlier."""
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    numbers[..., 0, :64] = 0
    numbers[..., 1, 7] = 50
    return numbers


def expected(weight: np.ndarray, form: str, double: bool) -> np.ndarray:
    """The numbers that come back, by loops over blocks and numbers."""
    blocks = weight.reshape(-1, 64)
    scales = np.array([max(abs(number) for number in block) for block in blocks], np.float64)
    kept = scales
    if double:
        mean, kept = scales.mean(), np.empty_like(scales)
        for start in range(0, len(scales), 256):
            group = scales[start : start + 256] - mean
            step = np.abs(group).max() / 127
            kept[start : start + 256] = mean + np.round(group / step) * step
    out = np.empty(blocks.shape)
    for row, block in enumerate(blocks):
        for column, number in enumerate(block):
            relative = number / scales[row] if scales[row] else 0.0
            if form == "int8":
                nearest = round(127 * relative) / 127
            else:
                nearest = min(quantised.LEVELS.astype(float), key=lambda level: abs(level - relative))
            out[row, column] = nearest * kept[row]
    return out.reshape(weight.shape)


@pytest.mark.parametrize(("form", "double"), FORMS)
def test_it_is_what_numpy_computes(form, double):
    weight = normal(40, 128)
    matrix = quantised.quantise(jnp.asarray(weight), form, double=double)
    found = quantised.dequantise(matrix, jnp.float32)
    wanted = expected(weight, form, double)
    # Where a number lies in the middle of two codes, rounding decides: of 5120 normal numbers hardly ever.
    close = np.isclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert close.mean() > 0.999
    assert quantised.dequantise(matrix, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(("form", "double", "bits"), [(*FORMS[0], 8.5), (*FORMS[2], 4.5), (*FORMS[3], 4.127)])
def test_bits_of_a_number(form, double, bits):
    shapes = jax.eval_shape(
        lambda weight: quantised.quantise(weight, form, double=double), jax.ShapeDtypeStruct((2048, 8192), jnp.float32)
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert 8 * size / (2048 * 8192) == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize(("form", "levels"), [("int8", np.arange(-127, 128) / 127), ("nf4", quantised.LEVELS)])
def test_what_a_code_stands_for_comes_back(form, levels):
    """The error of a level is 0 but for rounding, and so is that of every scale times it."""
    weight = np.concatenate([np.resize(levels, 256) * scale for scale in (1.0, 0.03, 7.0)]).astype(np.float32)
    weight.reshape(-1, 64)[:, 0] = np.repeat([1.0, 0.03, 7.0], 4)  # the largest of each block
    found = quantised.dequantise(quantised.quantise(jnp.asarray(weight[None]), form), jnp.float32)[0]
    np.testing.assert_allclose(found, weight, rtol=1e-6, atol=1e-7)


def test_the_first_of_two_codes_is_in_the_higher_half():
    weight = np.zeros((1, 64), np.float32)
    weight[0, :2] = 1, -1
    assert quantised.quantise(jnp.asarray(weight), "nf4").codes[0, 0, 0] == 15 << 4 | 0


def test_codes_are_nearly_worth_their_4_bits():
    """The codes have more than 3.8 bits; the outermost are rarer, since ±1 is the largest of 64 numbers."""
    codes = quantised.quantise(jax.random.normal(jax.random.key(0), (512, 512)), "nf4").codes
    counts = np.bincount(np.concatenate([codes.ravel() >> 4, codes.ravel() & 15]), minlength=16) / codes.size / 2
    assert 3.8 < -np.sum(counts * np.log2(counts)) < 4


@pytest.mark.parametrize(("form", "double"), FORMS)
def test_zeros_come_back_as_zeros(form, double):
    matrix = quantised.quantise(jnp.zeros((2, 64)), form, double=double)
    np.testing.assert_array_equal(quantised.dequantise(matrix, jnp.float32), 0)


def test_leading_axes_are_rows():
    """A mixture's experts have a leading axis."""
    weight = jnp.asarray(normal(3, 4, 128))
    both = (quantised.quantise(weight, "nf4"), quantised.quantise(weight.reshape(12, 128), "nf4"))
    one, other = (quantised.dequantise(matrix, jnp.float32) for matrix in both)
    np.testing.assert_array_equal(one, other.reshape(weight.shape))
