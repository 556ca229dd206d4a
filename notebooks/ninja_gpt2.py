"""Cases of notebook 23 for GPT-2's layers: inputs of a backward, its gradients, and common mistakes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.layers import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear, residual, unembedding

Wrong = Callable[[Mapping[str, Any]], Any]  # a mistake's result, of a case's inputs and gradients


class Case(NamedTuple):
    """One layer with its inputs; `sizes` are factors by which a gradient is easily off."""

    inputs: dict[str, Any]
    gradients: dict[str, Any]
    sizes: dict[str, float]
    mistakes: Mapping[str, dict[str, Wrong]] = MappingProxyType({})


def _linear(draw) -> Case:
    N, C, F = 5, 4, 3
    x, w, b, dy = draw(N, C), draw(C, F), draw(F), draw(N, F)
    params = linear.Params(w, b)
    grads, dx = linear.backward(params, linear.forward(params, x)[1], dy)
    return Case({"x": x, "w": w, "dy": dy}, {"x": dx, "w": grads.weight, "b": grads.bias}, {"N": N, "C": C, "F": F})


def _embedding(draw) -> Case:
    B, T, V, C = 2, 5, 7, 3
    tokens = jnp.asarray([[1, 4, 1, 0, 6], [4, 1, 1, 2, 0]])
    params = embedding.Params(draw(V, C), draw(T + 2, C))
    dy = draw(B, T, C)
    grads = embedding.backward(params, embedding.forward(params, tokens)[1], dy)
    mistakes = {
        "token": {
            "each row has one of its readers only: add up, don't overwrite": lambda v: np.stack(
                [
                    np.asarray(v["dy"])[np.asarray(v["tokens"]) == row][-1:].sum(0)
                    for row in range(v["token_table"].shape[0])
                ]
            )
        }
    }
    inputs = {"tokens": tokens, "token_table": params.token, "position_table": params.position, "dy": dy}
    return Case(inputs, {"token": grads.token, "position": grads.position}, {"B": B, "T": T}, mistakes)


def _layernorm(draw) -> Case:
    N, C = 6, 8
    params, x, dy = layernorm.Params(1 + draw(C), draw(C)), 1 + 2 * draw(N, C), draw(N, C)
    _, kept = layernorm.forward(params, x)
    grads, dx = layernorm.backward(params, kept, dy)
    hat = (x - kept.mean) * kept.rstd

    def formula(v, *, mean=True, outward=True, sigma=True, scale=True, axis=-1):
        g = v["dy"] * v["scale"] if scale else v["dy"]
        found = g - (g.mean(axis, keepdims=True) if mean else 0)
        found = found - (hat * (g * hat).mean(axis, keepdims=True) if outward else 0)
        return found * v["rstd"] if sigma else found

    by_x: dict[str, Wrong] = {
        "a missing term: mean(g), by which x moves μ": lambda v: formula(v, mean=False),
        "a missing term: x̂ mean(g x̂), by which x moves σ": lambda v: formula(v, outward=False),
        "two missing terms: x moves μ and σ too": lambda v: formula(v, mean=False, outward=False),
        "a missing factor: 1/σ": lambda v: formula(v, sigma=False),
        "a missing factor: γ, g = γ ∂y": lambda v: formula(v, scale=False),
        "a wrong axis: the means are over a token's own columns": lambda v: formula(v, axis=0),
    }
    by_scale: dict[str, Wrong] = {"x where x̂ belongs": lambda v: (v["dy"] * v["x"]).sum(0)}
    inputs = {"x": x, "scale": params.scale, "mean": kept.mean, "rstd": kept.rstd, "dy": dy}
    gradients = {"x": dx, "scale": grads.scale, "bias": grads.bias}
    return Case(inputs, gradients, {"N": N, "C": C}, {"x": by_x, "scale": by_scale})


def _gelu(draw) -> Case:
    x, dy = 2 * draw(4, 6), draw(4, 6)
    a, b = np.sqrt(2 / np.pi), 0.044715

    def gate(v):
        return (1 + jnp.tanh(a * (v["x"] + b * v["x"] ** 3))) / 2

    mistakes: dict[str, Wrong] = {
        "a missing term: x moves the gate too (product rule)": lambda v: v["dy"] * gate(v),
        "a missing factor inside: du/dx has 3·0.044715 x²": lambda v: (
            v["dy"] * (gate(v) + 2 * v["x"] * gate(v) * (1 - gate(v)) * a)
        ),
        "a missing factor: ∂y": lambda v: gelu.backward(gelu.Residuals(v["x"]), jnp.ones_like(v["dy"])),
    }
    dx = gelu.backward(gelu.forward(x)[1], dy)
    return Case({"x": x, "dy": dy}, {"x": dx}, {}, {"x": mistakes})


def _attention(draw) -> Case:
    T, D = 6, 4
    q, k, v_, dout = (draw(T, D) for _ in range(4))
    _, kept = attention.forward(*(part[None, :, None] for part in (q, k, v_)), block=T)
    found = attention.backward(kept, dout[None, :, None], block=T)
    scores = q @ k.T / np.sqrt(D)
    p = jnp.where(jnp.tril(jnp.ones((T, T), bool)), jnp.exp(scores - kept.logsumexp[0, 0][:, None]), 0)

    def ds(v, delta=True):
        dp = v["dout"] @ v["v"].T
        return v["p"] * (dp - (jnp.sum(v["p"] * dp, axis=1, keepdims=True) if delta else 0))

    by_q: dict[str, Wrong] = {
        "a missing term: δ, the softmax's own": lambda v: ds(v, delta=False) @ v["k"] / np.sqrt(D),
        "a wrong axis: δ is a sum over a query's keys": lambda v: (
            (lambda dp: v["p"] * (dp - jnp.sum(v["p"] * dp, axis=0, keepdims=True)))(v["dout"] @ v["v"].T)
            @ v["k"]
            / np.sqrt(D)
        ),
        "∂p where ∂s belongs: the softmax has a backward too": lambda v: (v["dout"] @ v["v"].T) @ v["k"] / np.sqrt(D),
    }
    by_k: dict[str, Wrong] = {
        "a missing term: δ, the softmax's own": lambda v: ds(v, delta=False).T @ v["q"] / np.sqrt(D),
        "transposed: ∂s where ∂sᵀ belongs": lambda v: ds(v) @ v["q"] / np.sqrt(D),
    }
    by_v: dict[str, Wrong] = {"transposed: p where pᵀ belongs": lambda v: v["p"] @ v["dout"]}
    inputs = {"q": q, "k": k, "v": v_, "p": p, "dout": dout}
    gradients = {name: part[0, :, 0] for name, part in zip("qkv", found, strict=True)}
    return Case(inputs, gradients, {"D": D, "T": T}, {"q": by_q, "k": by_k, "v": by_v})


def _residual(draw) -> Case:
    dy = draw(4, 3)
    dx, dbranch = residual.backward(dy)
    return Case({"dy": dy}, {"x": dx, "branch": dbranch}, {"2": 2})


def _cross_entropy(draw) -> Case:
    N, V = 6, 9
    logits, targets, dlosses = 2 * draw(N, V), jnp.asarray([3, 0, 8, 8, 1, 5]), jnp.abs(draw(N))
    _, kept = cross_entropy.forward(logits, targets, vocabulary_size=V)
    mistakes: dict[str, Wrong] = {
        "a missing term: the onehot of the target": lambda v: (
            v["dlosses"][:, None] * jax.nn.softmax(v["logits"], axis=-1)
        ),
        "a missing factor: ∂loss of each token": lambda v: (
            jax.nn.softmax(v["logits"], axis=-1) - jax.nn.one_hot(v["targets"], V)
        ),
        "a wrong axis: the softmax is over a token's logits": lambda v: (
            v["dlosses"][:, None] * (jax.nn.softmax(v["logits"], axis=0) - jax.nn.one_hot(v["targets"], V))
        ),
    }
    found = cross_entropy.backward(kept, dlosses, vocabulary_size=V)
    inputs = {"logits": logits, "targets": targets, "dlosses": dlosses}
    return Case(inputs, {"logits": found}, {"N": N, "V": V}, {"logits": mistakes})


def _unembedding(draw) -> Case:
    N, C, V = 6, 4, 9
    x, w, targets = draw(N, C), draw(V, C), jnp.asarray([3, 0, 8, 8, 1, 5])

    def mean(logp):
        return -jnp.sum(logp) / N, jnp.full(logp.shape, -1 / N)

    _, kept = unembedding.forward(unembedding.Params(w), x, targets, mean, vocabulary_size=V, chunk=N)
    grads, dx = unembedding.backward(kept)
    return Case({"x": x, "w": w, "targets": targets}, {"x": dx, "w": grads.weight}, {"N": N, "C": C, "V": V})


def _dropout(draw) -> Case:
    p, dy = 0.25, draw(6, 8)
    masks = dropout.Masks(jax.random.key(0), jnp.arange(6), p)
    mask = dropout.forward(jnp.ones_like(dy), masks) > 0
    mistakes: dict[str, Wrong] = {
        "the mask is missing: y has nothing of what was dropped": lambda v: v["dy"] / (1 - p),
        "a missing factor: 1/(1 - p), which what stays is multiplied by": lambda v: v["dy"] * v["mask"],
    }
    return Case({"mask": mask, "p": p, "dy": dy}, {"x": dropout.backward(masks, dy)}, {"p": p}, {"x": mistakes})


MAKERS = {
    "linear": _linear,
    "embedding": _embedding,
    "layernorm": _layernorm,
    "gelu": _gelu,
    "attention": _attention,
    "residual": _residual,
    "cross_entropy": _cross_entropy,
    "unembedding": _unembedding,
    "dropout": _dropout,
}
