"""Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) of SwiGLU layers, as Mixtral has it (arXiv:2401.04088).

A router gives each token n its experts e = c_n1 ... c_nk and their weights g_n1 ... g_nk (`router.py`):

    [gate|up] = x w_in[e]        a = silu(gate) up        y_n = Σ_j g_nj a_nj w_out[e]

The N k pairs of a token and an expert are sorted by expert, M = N k rows, so that each expert has its rows together and
multiplies them at once (`grouped.py`). No token is dropped, whatever an expert's load. The weight is multiplied in
before w_out, which is linear. Backward, for the rows r of an expert, r = (n, j):

    ∂b_r = ∂y_n w_out[e]ᵀ        b = g a, so  ∂g_r = Σ_F a_r ∂b_r        ∂a_r = g_r ∂b_r        ∂[gate|up] by swiglu
    ∂w_out[e] = Σ_r b_rᵀ ∂y_n        ∂w_in[e] = Σ_r x_nᵀ ∂[gate|up]_r
    ∂x_n = Σ_j ∂[gate|up]_nj w_in[e]ᵀ + what comes through the router from ∂g

An expert's output is never computed again: ∂g is a product of what else is there. An expert without rows has gradients
of exactly 0.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.layers import grouped, router, swiglu
from jaxgpt.layers.numerics import not_before


class Params(NamedTuple):
    router: router.Params  # C to E
    w_in: Float[Array, "E C 2*F"]  # gate, up
    w_out: Float[Array, "E F C"]


class Residuals(NamedTuple):
    router: router.Residuals
    hidden: Float[Array, "M 2*F"]  # gate and up of the rows, sorted by expert
    activated: Float[Array, "M F"] | None  # a; None where it is computed again


class Rows(NamedTuple):
    """The pairs of a token and an expert, sorted by expert."""

    pair: Int[Array, " M"]  # n k + j of each row
    token: Int[Array, " M"]  # n of each row
    place: Int[Array, "N k"]  # each pair's row
    sizes: Int[Array, " E"]  # rows of each expert


def sort(chosen: Int[Array, "N k"], experts: int) -> Rows:
    """Sorts the pairs by expert, and those of an expert by token."""
    by_pair = chosen.reshape(-1)
    pair = jnp.argsort(by_pair)
    place = jnp.zeros_like(pair).at[pair].set(jnp.arange(pair.size), unique_indices=True)
    sizes = jnp.sum(by_pair[:, None] == jnp.arange(experts), axis=0, dtype=chosen.dtype)
    return Rows(pair, pair // chosen.shape[1], place.reshape(chosen.shape), sizes)


@jax.named_scope("moe.forward")
def forward(
    params: Params, x: Float[Array, "N C"], *, choices: int, softmax: Literal["after", "before"]
) -> tuple[Float[Array, "N C"], router.Statistics, Residuals]:
    """Returns the output, in the dtype of x, and the router's statistics, of which the model makes its losses."""
    chosen, statistics, router_residuals = router.forward(params.router, x, choices=choices)
    rows = sort(chosen, params.w_in.shape[0])
    hidden = grouped.multiply(x[rows.token], params.w_in, rows.sizes)
    activated, _ = swiglu.forward(*jnp.split(hidden, 2, axis=-1))
    weights = router.weights(router_residuals, softmax=softmax).reshape(-1)[rows.pair, None]
    outputs = grouped.multiply((weights * activated).astype(x.dtype), params.w_out, rows.sizes)
    y = jnp.sum(outputs[rows.place].astype(weights.dtype), axis=1)
    return y.astype(x.dtype), statistics, Residuals(router_residuals, hidden, activated)


@jax.named_scope("moe.backward")
def backward(
    params: Params,
    residuals: Residuals,
    dy: Float[Array, "N C"],
    dstatistics: router.Statistics,
    *,
    softmax: Literal["after", "before"],
) -> tuple[Params, Float[Array, "N C"]]:
    """Returns the gradients of the parameters in the accumulation dtype, and dx in the dtype of dy."""
    x = residuals.router.x
    assert x is not None
    rows = sort(residuals.router.chosen, params.w_in.shape[0])
    weights = router.weights(residuals.router, softmax=softmax).reshape(-1)[rows.pair, None]
    dy_rows = dy[rows.token]
    dweighted = grouped.multiply(dy_rows, params.w_out, rows.sizes, transposed=True).astype(weights.dtype)
    hidden = swiglu.Residuals(*jnp.split(not_before(dweighted, residuals.hidden), 2, axis=-1))
    activated = residuals.activated
    if activated is None:
        activated = swiglu.output(hidden)
    dw_out = grouped.gradient((weights * activated).astype(x.dtype), dy_rows, rows.sizes)
    dweights = jnp.sum(activated * dweighted, axis=-1)
    dactivated = (weights * dweighted).astype(dy.dtype)
    dhidden = jnp.concatenate(swiglu.backward(hidden, dactivated), axis=-1)
    x_rows = not_before(dhidden, x)[rows.token]
    dw_in = grouped.gradient(x_rows, dhidden, rows.sizes)
    dx_rows = grouped.multiply(dhidden, params.w_in, rows.sizes, transposed=True)
    dx = jnp.sum(dx_rows[rows.place].astype(weights.dtype), axis=1)
    drouter, dx_through_router = router.backward(
        params.router, residuals.router, dweights[rows.place], dstatistics, softmax=softmax
    )
    return Params(drouter, dw_in, dw_out), (dx + dx_through_router).astype(dy.dtype)
