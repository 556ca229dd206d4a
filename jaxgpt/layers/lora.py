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

A CPU in float32 merges the adapter into the weight for each product with it, since a b takes only R / N of what x w
takes: with m = w + s a b it is y = x m + β and ∂x = ∂y mᵀ, and no array of x's or y's size is read or written once
more. In bfloat16 m would round a small adapter away, and a GPU adds to what it has just written for little: these have
both products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgpt.layers import linear
from jaxgpt.layers.linear import Residuals
from jaxgpt.layers.numerics import accumulation_dtype, not_before, product, product_over_tokens


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
    """Multiplies and adds in the accumulation dtype; the output has the dtype of x."""
    if params.adapter is None:
        return linear.forward(linear.Params(params.weight, params.bias), x)
    on_cpu = _by_merged if _merges(x) else _by_joined
    return lax.platform_dependent(params, x, cpu=on_cpu, default=_by_two_products), Residuals(x)


def _merges(x: Float[Array, "..."]) -> bool:
    """Returns whether a weight keeps what an adapter adds to it in the dtype of x."""
    return x.dtype == accumulation_dtype(x.dtype)


def _adapter(params: Params) -> tuple[Float[Array, "in R"], Float[Array, "R out"], Float[Array, ""] | float]:
    """Returns a, b and s."""
    assert params.adapter is not None
    assert params.scaling is not None
    a, b = params.adapter
    return a, b, params.scaling


def _h(params: Params, x: Float[Array, "*batch in"]) -> Float[Array, "*batch R"]:
    """Returns s h."""
    a, _, s = _adapter(params)
    return (product("...c,cr->...r", x, a) * s).astype(x.dtype)


def _merged(params: Params) -> Float[Array, "in out"]:
    """Returns m."""
    a, b, s = _adapter(params)
    return params.weight + s * product("cr,rf->cf", a, b)


def _by_merged(params: Params, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    return linear.forward(linear.Params(_merged(params), params.bias), x)[0]


def _by_joined(params: Params, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """One product, [x sh] by w above b. Of two, XLA would keep both for the backward rather than their sum."""
    _, b, _ = _adapter(params)
    both = linear.Params(jnp.concatenate([params.weight, b]), params.bias)
    return linear.forward(both, jnp.concatenate([x, _h(params, x)], axis=-1))[0]


def _by_two_products(params: Params, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    _, b, _ = _adapter(params)
    y, _ = linear.forward(linear.Params(params.weight, params.bias), x)
    return y + product("...r,rf->...f", _h(params, x), b, dtype=x.dtype)


@jax.named_scope("lora.backward")
def backward(
    params: Params, residuals: Residuals, dy: Float[Array, "*batch out"]
) -> tuple[Adapter | None, Float[Array, "*batch in"]]:
    """Gradients of the adapter in the accumulation dtype, dx in the dtype of dy. The weight and the bias get none."""
    if params.adapter is None:
        return None, through_weight(params, dy)
    x, rows = residuals.x.reshape(-1, residuals.x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dadapter, dh = through_adapter(params, x, rows)
    on_cpu = dx_by_merged if _merges(dy) else dx_by_two_products
    dx = lax.platform_dependent(params, rows, dh, cpu=on_cpu, default=dx_by_two_products)
    return dadapter, dx.reshape(residuals.x.shape)


def through_weight(params: Params, dy: Float[Array, "*batch out"]) -> Float[Array, "*batch in"]:
    return product("...f,cf->...c", dy, params.weight, dtype=dy.dtype)


def through_adapter(
    params: Params, x: Float[Array, "N in"], dy: Float[Array, "N out"]
) -> tuple[Adapter, Float[Array, "N R"]]:
    """Returns the gradients of the adapter and of h."""
    _, b, s = _adapter(params)
    dh = (product("nf,rf->nr", dy, b) * s).astype(dy.dtype)
    db = product_over_tokens("nr,nf->rf", _h(params, x), dy)
    da = product_over_tokens("nc,nr->cr", x, dh)
    return Adapter(da, db), dh


def dx_by_merged(params: Params, dy: Float[Array, "N out"], dh: Float[Array, "N R"]) -> Float[Array, "N in"]:
    """The weight is merged once more, so that it isn't kept since the forward."""
    merged = _merged(params._replace(adapter=not_before(dy, params.adapter)))
    return through_weight(Params(merged), dy)


def dx_by_two_products(params: Params, dy: Float[Array, "N out"], dh: Float[Array, "N R"]) -> Float[Array, "N in"]:
    """The sum of what comes through the weight and what comes through the adapter."""
    a, _, _ = _adapter(params)
    return through_weight(params, dy) + product("nr,cr->nc", dh, a, dtype=dy.dtype)
