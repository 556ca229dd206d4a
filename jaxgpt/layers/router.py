"""Router of a mixture of experts: chooses k of E experts for each token, and their weights.

    s = x W        p = softmax(s)        c = the k experts with the largest s, the lower number first among equal ones

    softmax "after" the choice     g_j = exp(s_cj) / Σ_i exp(s_ci) = p_cj / Σ_i p_ci        Mixtral, arXiv:2401.04088
    softmax "before" it            g_j = p_cj                                               Switch, arXiv:2101.03961

The choice is a step function: it has no gradient, and backward takes the one that forward made. Two terms of the loss
keep a router useful. Both are made of sums over the N tokens, the statistics of a layer:

    load_e = [number of tokens that chose e] / N        probability_e = Σ_n p_ne / N        z = Σ_n lse(s_n)² / N

    balance = E Σ_e f_e P_e        f, P = the means of load and probability over the layers         (`balance`)

Balance is least where all experts have the same load; z keeps the scores small, where softmax is exact (ST-MoE,
arXiv:2202.08906, equation 5). lse = log Σ_e exp(s_e). load is a count, without a gradient, so

    ∂balance/∂probability_e = E f_e / L        in each of L layers

Backward, from ∂g, ∂P (by this layer's probability) and ∂z, with Σ_e p_e = 1 and ∂p_e/∂s_i = p_e ([e = i] - p_i),
∂lse/∂s_i = p_i:

    ∂p_e = ∂P_e / N, and with softmax "before"  + Σ_j [e = c_j] ∂g_j
    ∂s_i = p_i (∂p_i - Σ_e p_e ∂p_e)  +  2 lse p_i ∂z / N
           and with softmax "after"  + Σ_j [i = c_j] g_j (∂g_j - Σ_m g_m ∂g_m)
    ∂x = ∂s Wᵀ        ∂W = Σ_n xᵀ ∂s

All is computed in the accumulation dtype, products too, whatever the activations are: of scores that are nearly equal a
rounding chooses another expert. (transformers multiplies in the activations' dtype and takes the softmax in float32.)
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.layers import linear
from jaxgpt.layers.numerics import accumulation_dtype, product

Params = linear.Params
EXACT = lax.Precision.HIGHEST  # a GPU's products of float32 are not


class Statistics(NamedTuple):
    """Means over the tokens of a layer."""

    load: Float[Array, "*L E"]  # experts that a token goes to; k together
    probability: Float[Array, "*L E"]
    z: Float[Array, "*L"]


class Residuals(NamedTuple):
    x: Float[Array, "N C"] | None  # None where the model computes it again
    scores: Float[Array, "N E"]
    chosen: Int[Array, "N k"]


@jax.named_scope("router.forward")
def forward(params: Params, x: Float[Array, "N C"], *, choices: int) -> tuple[Int[Array, "N k"], Statistics, Residuals]:
    """Returns the chosen experts of each token, the one with the largest score first, and the layer's statistics."""
    wide = accumulation_dtype(x.dtype)
    scores = product("nc,ce->ne", x.astype(wide), params.weight.astype(wide), precision=EXACT)
    _, chosen = lax.top_k(scores, choices)
    statistics = Statistics(
        load=jnp.sum(jnp.mean(_one_hot(chosen, scores), axis=0), axis=0),
        probability=jnp.mean(jax.nn.softmax(scores, axis=-1), axis=0),
        z=jnp.mean(jnp.square(jax.nn.logsumexp(scores, axis=-1))),
    )
    return chosen, statistics, Residuals(x, scores, chosen)


def weights(residuals: Residuals, *, softmax: Literal["after", "before"]) -> Float[Array, "N k"]:
    """Returns g, the chosen experts' weights, from forward's residuals."""
    scores = residuals.scores
    if softmax == "after":
        return jax.nn.softmax(jnp.take_along_axis(scores, residuals.chosen, axis=-1), axis=-1)
    return jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), residuals.chosen, axis=-1)


@jax.named_scope("router.backward")
def backward(
    params: Params,
    residuals: Residuals,
    dweights: Float[Array, "N k"],
    dstatistics: Statistics,
    *,
    softmax: Literal["after", "before"],
) -> tuple[Params, Float[Array, "N C"]]:
    """Returns the gradient of the weight in the accumulation dtype, and dx in the dtype of x.

    Args:
        params: Forward's.
        residuals: Forward's.
        dweights: The gradient by the chosen experts' weights.
        dstatistics: The gradient by the statistics; nothing depends on its load.
        softmax: As `weights` has it.
    """
    x, scores, chosen = residuals
    assert x is not None
    N, dtype = x.shape[0], scores.dtype
    p, lse = jax.nn.softmax(scores, axis=-1), jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    dp = jnp.broadcast_to(dstatistics.probability / N, p.shape)
    dscores = 2 * lse * p * (dstatistics.z / N)
    if softmax == "after":
        g = weights(residuals, softmax=softmax)
        dchosen = g * (dweights - jnp.sum(g * dweights, axis=-1, keepdims=True))
        dscores = dscores + jnp.sum(_one_hot(chosen, scores) * dchosen[..., None], axis=1)
    else:
        dp = dp + jnp.sum(_one_hot(chosen, scores) * dweights[..., None], axis=1)
    dscores = dscores + p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))
    dx = product("ne,ce->nc", dscores, params.weight.astype(dtype), precision=EXACT)
    dweight = product("nc,ne->ce", x.astype(dtype), dscores, precision=EXACT)
    return Params(dweight), dx.astype(x.dtype)


def balance(statistics: Statistics) -> tuple[Float[Array, ""], Float[Array, " E"]]:
    """Returns the balance of L layers' statistics, and its gradient by each layer's probability, the same for all."""
    layers, experts = statistics.load.shape
    load = jnp.mean(statistics.load, axis=0)
    return experts * jnp.sum(load * jnp.mean(statistics.probability, axis=0)), experts * load / layers


def _one_hot(chosen: Int[Array, "N k"], scores: Float[Array, "N E"]) -> Float[Array, "N k E"]:
    return jax.nn.one_hot(chosen, scores.shape[-1], dtype=scores.dtype)
