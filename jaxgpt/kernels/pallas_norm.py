"""LayerNorm and RMSNorm by fused kernels of our own, written in Pallas for Triton.

The same functions as `layers/layernorm.py` and `layers/rmsnorm.py`, whose derivations hold here. XLA makes two kernels
of the forward and two of the backward, which read the same arrays; here it is one each:

    forward     a program has R rows on the chip, and reads x once for its statistics and its output
    backward    a program goes through every P-th tile of R rows, writes ∂x, and sums ∂γ and ∂β of its rows

What the P programs have summed is added up in their order, so that the same bits come out every time. Backward takes
the gradient that goes past the norm along, in a residual stream, and adds it to ∂x before that is rounded.

No GPU has run these kernels yet: they have been compiled for one, and interpreted on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.kernels import pallas
from jaxgpt.layers import layernorm, rmsnorm
from jaxgpt.layers.numerics import accumulation_dtype

WIDEST = 32 * 1024  # row that a program holds
TILE = 4096  # numbers of a program's rows, 32 for each thread of 4 warps
PROGRAMS = 512  # of the backward, of which each writes sums of its own

Params = TypeVar("Params", layernorm.Params, rmsnorm.Params)
Residuals = Any  # the layer's


class Sizes(NamedTuple):
    """Sizes of the arrays and of a program's tile."""

    N: int
    C: int
    epsilon: float
    centred: bool  # LayerNorm's, which takes the mean away

    @property
    def columns(self) -> int:
        """A row's columns with those that are masked, as Triton's tiles have powers of 2."""
        return pl.next_power_of_2(self.C)

    @property
    def rows(self) -> int:
        """Rows of a tile, R."""
        return min(max(1, TILE // self.columns), pl.next_power_of_2(self.N))

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.N, self.rows)

    @property
    def programs(self) -> int:
        """Programs of the backward, P."""
        return min(self.tiles, PROGRAMS)

    @property
    def warps(self) -> int:
        return max(4, self.columns // (TILE // 4))


def forward(params: Params, x: Float[Array, "N C"], *, epsilon: float) -> tuple[Float[Array, "N C"], Residuals]:
    """The layer's output and residuals; which layer it is, its parameters say."""
    centred = isinstance(params, layernorm.Params)
    sizes = Sizes(x.shape[0], x.shape[1], epsilon, centred)
    statistic = jax.ShapeDtypeStruct((sizes.N,), accumulation_dtype(x.dtype))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype), *[statistic] * (1 + centred)]
    with jax.named_scope("layernorm.forward" if centred else "rmsnorm.forward"):
        run = pallas.call(functools.partial(_forward_kernel, sizes), shapes, (sizes.tiles,), warps=sizes.warps)
        y, *statistics = run(x, *params)
    made: Callable = layernorm.Residuals if centred else rmsnorm.Residuals
    return y, made(x, *(numbers[:, None] for numbers in statistics))


def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "N C"], past: Float[Array, "N C"] | None = None
) -> tuple[Params, Float[Array, "N C"]]:
    """Gradients of the parameters in the accumulation dtype, dx in the dtype of dy.

    `past` is added to dx: the gradient by the same x that goes past the norm.
    """
    centred = isinstance(params, layernorm.Params)
    sizes = Sizes(dy.shape[0], dy.shape[1], 0.0, centred)
    sums = jax.ShapeDtypeStruct((sizes.programs, sizes.C), accumulation_dtype(dy.dtype))
    shapes = [jax.ShapeDtypeStruct(dy.shape, dy.dtype), *[sums] * (1 + centred)]
    x, *statistics = residuals
    kernel = functools.partial(_backward_kernel, sizes, past is not None)
    arrays = (x, *(numbers[:, 0] for numbers in statistics), params.scale, dy, *([] if past is None else [past]))
    with jax.named_scope("layernorm.backward" if centred else "rmsnorm.backward"):
        dx, *partial = pallas.call(kernel, shapes, (sizes.programs,), warps=sizes.warps)(*arrays)
        return type(params)(*(jnp.sum(array, axis=0) for array in partial)), dx


# Kernels. Their references are to whole arrays.


def _forward_kernel(sizes: Sizes, *refs: Any) -> None:
    """References to x, γ, with LayerNorm β, and to y, with LayerNorm the mean, and 1/σ."""
    following = iter(refs)
    x_ref, scale_ref = next(following), next(following)
    bias_ref = next(following) if sizes.centred else None
    y_ref, *statistics = following
    tile = pl.program_id(0)
    seen = _mask(sizes, tile)
    x = _wide(_load(sizes, x_ref, tile, seen))
    means = []
    if sizes.centred:
        means = [jnp.sum(x, axis=1) / sizes.C]
        x = jnp.where(seen, x - means[0][:, None], 0)
    rstd = lax.rsqrt(jnp.sum(x * x, axis=1) / sizes.C + sizes.epsilon)
    y = x * rstd[:, None] * _row(sizes, scale_ref)
    if bias_ref is not None:
        y = y + _row(sizes, bias_ref)
    _store(sizes, y_ref, tile, seen, y)
    for ref, numbers in zip(statistics, [*means, rstd], strict=True):
        triton.store(ref.at[_rows(sizes, tile)], numbers, mask=_rows_mask(sizes, tile))


def _backward_kernel(sizes: Sizes, with_past: bool, *refs: Any) -> None:
    """References to x, with LayerNorm the mean, 1/σ, γ, ∂y, `past`, and to ∂x, ∂γ's parts, with LayerNorm ∂β's."""
    following = iter(refs)
    x_ref = next(following)
    mean_ref = next(following) if sizes.centred else None
    rstd_ref, scale_ref, dy_ref = (next(following) for _ in range(3))
    past_ref = next(following) if with_past else None
    dx_ref, *sums = following
    program = pl.program_id(0)
    scale = _row(sizes, scale_ref)

    def numbers(ref: Any, tile: Int[Array, ""]) -> Float[Array, "R 1"]:
        return triton.load(ref.at[_rows(sizes, tile)], mask=_rows_mask(sizes, tile), other=0.0)[:, None]

    def turn(number: Int[Array, ""] | int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = program + number * sizes.programs
        seen = _mask(sizes, tile)
        x, dy = (_wide(_load(sizes, ref, tile, seen)) for ref in (x_ref, dy_ref))
        rstd = numbers(rstd_ref, tile)
        if mean_ref is not None:
            x = x - numbers(mean_ref, tile)
        normalised, g = x * rstd, dy * scale
        dx = g - normalised * (jnp.sum(g * normalised, axis=1) / sizes.C)[:, None]
        if sizes.centred:
            dx = dx - (jnp.sum(g, axis=1) / sizes.C)[:, None]
        dx = dx * rstd
        if past_ref is not None:
            dx = dx + _wide(_load(sizes, past_ref, tile, seen))
        _store(sizes, dx_ref, tile, seen, dx)
        return tuple(total + part for total, part in zip(carry, (dy * normalised, dy), strict=False))

    zeros = jnp.zeros((sizes.rows, sizes.columns), accumulation_dtype(dy_ref.dtype))
    totals = lax.fori_loop(0, pl.cdiv(sizes.tiles, sizes.programs), turn, tuple(zeros for _ in sums))
    for ref, total in zip(sums, totals, strict=True):
        triton.store(ref.at[program, _columns(sizes, program)], jnp.sum(total, axis=0), mask=_columns_mask(sizes))


def _load(sizes: Sizes, ref: Any, tile: Int[Array, ""], seen: Bool[Array, "R Cp"]) -> Float[Array, "R Cp"]:
    """Returns a tile, 0 where it isn't `seen`: beyond the array, as some programs' last tile is whole."""
    return triton.load(ref.at[_rows(sizes, tile), _columns(sizes, tile)], mask=seen, other=0.0)


def _store(
    sizes: Sizes, ref: Any, tile: Int[Array, ""], seen: Bool[Array, "R Cp"], numbers: Float[Array, "R Cp"]
) -> None:
    triton.store(ref.at[_rows(sizes, tile), _columns(sizes, tile)], numbers.astype(ref.dtype), mask=seen)


def _row(sizes: Sizes, ref: Any) -> Float[Array, "1 Cp"]:
    """Returns a parameter in the accumulation dtype."""
    return _wide(triton.load(ref.at[pl.ds(0, sizes.columns)], mask=_columns_mask(sizes), other=0.0))[None, :]


def _rows(sizes: Sizes, tile: Int[Array, ""]) -> Any:
    return pl.ds(tile * sizes.rows, sizes.rows)


def _columns(sizes: Sizes, row: Int[Array, ""]) -> Any:
    return pl.ds(row * 0, sizes.columns)  # in 64 bits too of the type that the row's number has


def _rows_mask(sizes: Sizes, tile: Int[Array, ""]) -> Bool[Array, " R"]:
    return tile * sizes.rows + lax.broadcasted_iota(jnp.int32, (sizes.rows,), 0) < sizes.N


def _columns_mask(sizes: Sizes) -> Bool[Array, " Cp"]:
    return lax.broadcasted_iota(jnp.int32, (sizes.columns,), 0) < sizes.C


def _mask(sizes: Sizes, tile: Int[Array, ""]) -> Bool[Array, "R Cp"]:
    return _rows_mask(sizes, tile)[:, None] & _columns_mask(sizes)[None, :]


def _wide(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    return x.astype(accumulation_dtype(x.dtype))
