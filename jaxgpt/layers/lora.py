"""Linear layer that is not trained itself, with a low-rank adapter that is (LoRA, Hu et al. 2021, arXiv:2106.09685).

    h = x a           y = x w + β + s h b           s = α / R

w (in, out) and the bias β are frozen. a (in, R) and b (R, out) are trained, and R is small: of a 2048 by 8192 matrix an
adapter of rank 16 trains 1% as many numbers. Written out, y_nj = Σ_i x_ni w_ij + β_j + s Σ_r h_nr b_rj. Each gradient
is the sum over the places that its variable is in:

    ∂h_nr = s Σ_j ∂y_nj b_rj                    ∂h = s ∂y bᵀ
    ∂b_rj = s Σ_n h_nr ∂y_nj                    ∂b = s Σ_N hᵀ ∂y
    ∂a_ir = Σ_n x_ni ∂h_nr                      ∂a = Σ_N xᵀ ∂h
    ∂x_ni = Σ_j ∂y_nj w_ij + Σ_r ∂h_nr a_ir     ∂x = ∂y wᵀ + ∂h aᵀ

Training w would take ∂w = Σ_N xᵀ ∂y, a product as large as x w. It holds that ∂a = s ∂w bᵀ and ∂b = s aᵀ ∂w, but taken
from the other side, as xᵀ (∂y bᵀ) and (x a)ᵀ ∂y, every product has R as one of its sizes, and ∂w is never formed. Only
∂y wᵀ is as large as before; without an adapter (None) it is all that is left.

h is cheap, so backward computes it again from x. With b = 0 the model begins as the base; in the first step ∂a is 0
then, and b moves first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers import linear
from jaxgpt.layers.linear import Residuals
from jaxgpt.layers.numerics import product, product_over_tokens


class Adapter(NamedTuple):
    a: Float[Array, "in R"]
    b: Float[Array, "R out"]


class Params(NamedTuple):
    weight: Float[Array, "in out"]
    bias: Float[Array, "out"] | None = None
    adapter: Adapter | None = None
    scaling: Float[Array, ""] | float | None = None  # s; None without an adapter


@jax.named_scope("lora.forward")
def forward(params: Params, x: Float[Array, "*batch in"]) -> tuple[Float[Array, "*batch out"], Residuals]:
    """Multiplies and adds in the accumulation dtype; the output has the dtype of x.

    A CPU has one product, [x sh] by w above b. Of two, XLA would keep both for the backward rather than their sum.
    """
    if params.adapter is None:
        return linear.forward(linear.Params(params.weight, params.bias), x)
    assert params.scaling is not None
    h = (product("...c,cr->...r", x, params.adapter.a) * params.scaling).astype(x.dtype)

    def one_product(x: Array, h: Array, weight: Array, b: Array) -> Array:
        both = linear.Params(jnp.concatenate([weight, b]), params.bias)
        return linear.forward(both, jnp.concatenate([x, h], axis=-1))[0]

    def two_products(x: Array, h: Array, weight: Array, b: Array) -> Array:
        y, _ = linear.forward(linear.Params(weight, params.bias), x)
        return y + product("...r,rf->...f", h, b, dtype=x.dtype)

    arrays = (x, h, params.weight, params.adapter.b)
    return lax.platform_dependent(*arrays, cpu=one_product, default=two_products), Residuals(x)


@jax.named_scope("lora.backward")
def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch out"]
) -> tuple[Adapter | None, Float[Array, "*batch in"]]:
    """Gradients of the adapter in the accumulation dtype, dx in the dtype of dy. The weight and the bias get none."""
    dx = product("...f,cf->...c", dy, params.weight, dtype=dy.dtype)
    return (None, dx) if params.adapter is None else _through_adapter(params, residuals, dy, dx)


def _through_adapter(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch out"], dx: Float[Array, "*batch in"]
) -> tuple[Adapter, Float[Array, "*batch in"]]:
    """The adapter's gradient, and `dx`, what comes through the weight, with what comes through the adapter."""
    assert params.adapter is not None
    assert params.scaling is not None
    a, b = params.adapter
    x, rows = residuals.x.reshape(-1, a.shape[0]), dy.reshape(-1, b.shape[1])
    h = (product("nc,cr->nr", x, a) * params.scaling).astype(x.dtype)
    dh = (product("nf,rf->nr", rows, b) * params.scaling).astype(dy.dtype)
    db = product_over_tokens("nr,nf->rf", h, rows)
    da = product_over_tokens("nc,nr->cr", x, dh)
    return Adapter(da, db), dx + product("nr,cr->nc", dh, a, dtype=dy.dtype).reshape(dx.shape)
