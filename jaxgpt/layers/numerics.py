"""The dtype in which sums are taken, for every layer, and the order in which things are computed again."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

GROUPS = 4  # of tokens, as which a CPU sums over them in bfloat16
FEW_COLUMNS = 64  # beside four times as many


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for sums over values of `dtype`: at least float32, and float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def product(
    equation: str,
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    *,
    dtype: DTypeLike | None = None,
    bias: Float[Array, "..."] | None = None,
    precision: lax.Precision | None = None,
) -> Float[Array, "..."]:
    """Returns `einsum` of two arrays, and a bias added to it, in `dtype`; the sums are in the accumulation dtype.

    Where nothing is said `dtype` is the accumulation dtype too. A GPU's products sum in float32 whatever they write, so
    they are asked for what is wanted: then half as many bytes are written, and the bias and what follows becomes part
    of the product. A CPU with bfloat16 products is fast at them only when their result is asked for in float32. Without
    them XLA widens the numbers inside of the product, and takes half as long again as where they are widened before.
    """
    wide = accumulation_dtype(a.dtype)
    dtype = wide if dtype is None else dtype

    def direct(a: Array, b: Array, result: DTypeLike = dtype) -> Array:
        y = jnp.einsum(equation, a, b, precision=precision, preferred_element_type=result)
        return (y if bias is None else y + bias.astype(result)).astype(dtype)

    def on_cpu(a: Array, b: Array) -> Array:
        if a.dtype == jnp.bfloat16 and not _cpu_multiplies_bfloat16():
            a, b = a.astype(wide), b.astype(wide)
        return direct(a, b, wide)

    if a.dtype != jnp.bfloat16:
        return direct(a, b, wide)
    return lax.platform_dependent(a, b, cpu=on_cpu, default=direct)


def product_over_tokens(equation: str, a: Float[Array, "N _"], b: Float[Array, "N _"]) -> Float[Array, "_ _"]:
    """Returns `product` of two arrays whose first axis, n in the equation, is summed over: a weight's gradient.

    A CPU turns a over in memory first. Where b has few columns, that takes much longer than the product (2048 columns
    by 16: 5.2 ms), and so it computes the gradient's transpose, for which it turns b (0.6 ms).
    """
    if a.shape[-1] < 4 * b.shape[-1] or b.shape[-1] > FEW_COLUMNS:
        return _product_over_tokens(equation, a, b)
    terms, result = equation.split("->")
    swapped = f"{','.join(reversed(terms.split(',')))}->{result[::-1]}"

    def transposed(a: Array, b: Array) -> Array:
        # Without the barrier XLA would see that the transpose of this is the other product.
        return lax.optimization_barrier(_product_over_tokens(swapped, b, a)).T

    return lax.platform_dependent(a, b, cpu=transposed, default=lambda a, b: _product_over_tokens(equation, a, b))


def _product_over_tokens(equation: str, a: Float[Array, "N _"], b: Float[Array, "N _"]) -> Float[Array, "_ _"]:
    """A CPU with bfloat16 products runs at half of their rate here, unless a second axis is summed over too.

    It is 390 and 190 GFLOP/s on Zen 4, 1024 tokens of 768 by 3072. So there the tokens are taken as GROUPS groups.
    """
    if a.dtype != jnp.bfloat16 or not _cpu_multiplies_bfloat16() or a.shape[0] % GROUPS:
        return product(equation, a, b)

    def in_groups(a: Array, b: Array) -> Array:
        return product(
            equation.replace("n", "gn"),
            a.reshape(GROUPS, -1, a.shape[-1]),
            b.reshape(GROUPS, -1, b.shape[-1]),
        )

    return lax.platform_dependent(a, b, cpu=in_groups, default=lambda a, b: product(equation, a, b))


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Returns whether this machine's CPU says so; where it says nothing (not on Linux), it is taken not to."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def sum_over_last(x: Float[Array, "N M"]) -> Float[Array, "N 1"]:
    """The sums of the rows of something that has just been computed.

    On a CPU the compiler would compute it inside of the summing loop, one number at a time: exp over a vocabulary takes
    twice as long that way. A product with ones has it computed first, many numbers at a time.
    """

    def by_product(x: Array) -> Array:
        return jnp.einsum("nm,m->n", x, jnp.ones(x.shape[-1], x.dtype))[:, None]

    return lax.platform_dependent(x, cpu=by_product, default=lambda x: jnp.sum(x, axis=-1, keepdims=True))


def not_before(gradient: Float[Array, "..."], residuals: Any, *, earlier: Float[Array, "..."] | None = None) -> Any:
    """The residuals, from which something is to be computed again once the backward pass has come to `gradient`.

    Left alone, the compiler finds out that it had the result in the forward pass (it drops `lax.optimization_barrier`
    before its last search for equal operations) and keeps the memory that computing it again is to free. So a zero is
    added that only the gradient gives: NaN if that is not finite, and then so is the whole gradient in any case.

    Args:
        gradient: What there is first.
        residuals: Arrays of any shapes. What has one number for a row of another, as a mean, is returned as it is.
        earlier: A gradient that is there before, the same for all of a block. A GPU's program takes its zero, a kernel
            for the whole block: it is ordered so that it needs little memory. A CPU's is ordered so that much runs at
            once, and would compute everything again when the block's backward begins.
    """

    def after(gradient: Array, residuals: Any) -> Any:
        zero = 0 * gradient[(0,) * gradient.ndim]
        return jax.tree.map(lambda kept: kept if kept.shape[-1:] == (1,) else kept + zero.astype(kept.dtype), residuals)

    if earlier is None:
        return after(gradient, residuals)
    return lax.platform_dependent(
        gradient,
        earlier,
        residuals,
        cpu=lambda gradient, _, residuals: after(gradient, residuals),
        default=lambda _, earlier, residuals: after(earlier, residuals),
    )
