"""Cases of notebook 23: inputs of each layer's backward, the project's gradients of them, and mistakes one makes.

`check("layernorm.x", mine)` calls the reader's function with the inputs of the case that it names as its parameters.
`hint("layernorm.x", 1)` says which way, 2 the step that is easily missed, 3 nearly the formula.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diagnosis
import hints
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.layers import (
    attention,
    cross_entropy,
    embedding,
    entropy,
    gelu,
    layernorm,
    linear,
    lora,
    residual,
    rmsnorm,
    rotary,
    router,
    scalar_head,
    soft_cap,
    swiglu,
    unembedding,
)

Wrong = Callable[[Mapping[str, Any]], Any]  # a mistake's result, of a case's inputs and gradients


class Case(NamedTuple):
    """One layer with its inputs; `sizes` are the numbers that a gradient is easily off by."""

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


def _rmsnorm(draw) -> Case:
    N, C = 6, 8
    params, x, dy = rmsnorm.Params(1 + draw(C)), 1 + 2 * draw(N, C), draw(N, C)
    _, kept = rmsnorm.forward(params, x)
    grads, dx = rmsnorm.backward(params, kept, dy)

    def formula(v, *, mean=False, outward=True, sigma=True, scale=True, axis=-1):
        g, hat = v["dy"] * v["scale"] if scale else v["dy"], v["x"] * v["rstd"]
        found = g - (g.mean(axis, keepdims=True) if mean else 0)
        found = found - (hat * (g * hat).mean(axis, keepdims=True) if outward else 0)
        return found * v["rstd"] if sigma else found

    by_x: dict[str, Wrong] = {
        "a term too much: mean(g) is LayerNorm's; here no mean was taken away": lambda v: formula(v, mean=True),
        "a missing term: x̂ mean(g x̂), by which x moves σ": lambda v: formula(v, outward=False),
        "a missing factor: 1/σ": lambda v: formula(v, sigma=False),
        "a missing factor: γ, g = γ ∂y": lambda v: formula(v, scale=False),
        "a wrong axis: the mean is over a token's own columns": lambda v: formula(v, axis=0),
    }
    by_scale: dict[str, Wrong] = {"x where x̂ belongs": lambda v: (v["dy"] * v["x"]).sum(0)}
    inputs = {"x": x, "scale": params.scale, "rstd": kept.rstd, "dy": dy}
    return Case(inputs, {"x": dx, "scale": grads.scale}, {"N": N, "C": C}, {"x": by_x, "scale": by_scale})


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


def _rotary(draw) -> Case:
    T, D = 5, 8
    dy, places = draw(T, D), jnp.arange(T)
    angles = places[:, None] * jnp.asarray(rotary.PLAIN.values(D))
    dx = rotary.backward(dy[None, :, None], places[None])[0, :, 0]
    forward = rotary.forward(dy[None, :, None], places[None])[0, :, 0]
    mistakes: dict[str, Wrong] = {
        "turned on, where it should be turned back (a sign of the sines)": lambda v: forward,
        "not turned at all": lambda v: v["dy"],
    }
    return Case({"dy": dy, "angles": angles}, {"x": dx}, {}, {"x": mistakes})


def _swiglu(draw) -> Case:
    gate, up, dy = 2 * draw(4, 6), draw(4, 6), draw(4, 6)
    dgate, dup = swiglu.backward(swiglu.forward(gate, up)[1], dy)

    def s(v):
        return jax.nn.sigmoid(v["gate"])

    by_gate: dict[str, Wrong] = {
        "a missing term: the sigmoid moves too (product rule)": lambda v: v["dy"] * v["up"] * s(v),
        "a missing factor: u": lambda v: dgate / v["up"],
    }
    by_up: dict[str, Wrong] = {"the sigmoid where silu belongs: a missing factor g": lambda v: v["dy"] * s(v)}
    inputs = {"gate": gate, "up": up, "dy": dy}
    return Case(inputs, {"gate": dgate, "up": dup}, {}, {"gate": by_gate, "up": by_up})


def _soft_cap(draw) -> Case:
    cap, dy = 3.0, draw(4, 6)
    y = soft_cap.forward(4 * draw(4, 6), cap=cap)
    mistakes: dict[str, Wrong] = {
        "a missing division by c inside of the square": lambda v: v["dy"] * (1 - v["y"] ** 2),
        "a missing square": lambda v: v["dy"] * (1 - v["y"] / cap),
    }
    dx = soft_cap.backward(y, dy, cap=cap)
    return Case({"y": y, "cap": cap, "dy": dy}, {"x": dx}, {"c": cap}, {"x": mistakes})


def _scalar_head(draw) -> Case:
    N, C = 5, 4
    params, x, dy = scalar_head.Params(draw(C), draw()), draw(N, C), draw(N)
    grads, dx = scalar_head.backward(params, scalar_head.forward(params, x)[1], dy)
    return Case({"x": x, "w": params.weight, "dy": dy}, {"x": dx, "w": grads.weight, "b": grads.bias}, {"N": N, "C": C})


def _lora(draw) -> Case:
    N, C, F, R, s = 6, 5, 4, 2, 0.5
    adapter, w, x, dy = lora.Adapter(draw(C, R), draw(R, F)), draw(C, F), draw(N, C), draw(N, F)
    params = lora.Params(w, None, adapter, s)
    grads, dx = lora.backward(params, lora.forward(params, x)[1], dy)
    assert grads is not None  # there is an adapter
    by_x: dict[str, Wrong] = {"a missing term: what comes through the adapter": lambda v: v["dy"] @ v["w"].T}
    inputs = {"x": x, "w": w, "a": adapter.a, "b": adapter.b, "s": s, "dy": dy}
    return Case(inputs, {"x": dx, "a": grads.a, "b": grads.b}, {"s": s, "N": N, "R": R}, {"x": by_x})


def _entropy(draw) -> Case:
    N, V = 4, 6
    logits, dentropy = 2 * draw(N, V), draw(N)
    _, kept = cross_entropy.forward(logits, jnp.zeros(N, int), vocabulary_size=V)
    H, kept = entropy.forward(kept, vocabulary_size=V)
    p = jax.nn.softmax(logits, axis=-1)
    mistakes: dict[str, Wrong] = {
        "a missing term: p_j H, from the softmax's other logits": lambda v: -v["dentropy"][:, None] * p * jnp.log(p),
        "a missing factor: p": lambda v: -v["dentropy"][:, None] * (jnp.log(p) + H[:, None]),
    }
    found = entropy.backward(kept, dentropy, vocabulary_size=V)
    return Case({"logits": logits, "dentropy": dentropy}, {"logits": found}, {"N": N, "V": V}, {"logits": mistakes})


def _router(draw) -> Case:
    N, C, E, k = 6, 4, 5, 2
    params, x, dg = router.Params(draw(C, E)), draw(N, C), draw(N, k)
    chosen, _, kept = router.forward(params, x, choices=k)
    g = router.weights(kept, softmax="after")
    nothing = router.Statistics(jnp.zeros(E), jnp.zeros(E), jnp.zeros(()))
    grads, dx = router.backward(params, kept, dg, nothing, softmax="after")

    def scores(v):
        """∂s without the softmax's second term."""
        return jnp.zeros((N, E)).at[jnp.arange(N)[:, None], v["chosen"]].add(v["g"] * v["dg"])

    missing = "a missing term: a weight's rivals, g (∂g - Σ g ∂g)"
    by_x: dict[str, Wrong] = {missing: lambda v: scores(v) @ v["w"].T}
    by_w: dict[str, Wrong] = {missing: lambda v: v["x"].T @ scores(v)}
    inputs = {"x": x, "w": params.weight, "chosen": chosen, "g": g, "dg": dg}
    return Case(inputs, {"x": dx, "w": grads.weight}, {"N": N, "E": E}, {"x": by_x, "w": by_w})


MAKERS = {
    "linear": _linear,
    "embedding": _embedding,
    "layernorm": _layernorm,
    "gelu": _gelu,
    "attention": _attention,
    "residual": _residual,
    "cross_entropy": _cross_entropy,
    "unembedding": _unembedding,
    "rmsnorm": _rmsnorm,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "soft_cap": _soft_cap,
    "lora": _lora,
    "scalar_head": _scalar_head,
    "entropy": _entropy,
    "router": _router,
}


@functools.cache
def case(layer: str) -> Case:
    """The case of a layer, in float64: the same numbers each time."""
    if layer not in MAKERS:
        raise KeyError(f"no layer {layer!r}; there are {', '.join(MAKERS)}")
    rng = np.random.default_rng(23)
    with jax.enable_x64(True):
        return MAKERS[layer](lambda *shape: jnp.asarray(rng.normal(size=shape)))


def names() -> list[str]:
    """All tensors that have a gradient, as `check` takes them."""
    return [f"{layer}.{tensor}" for layer in MAKERS for tensor in case(layer).gradients]


def judge(name: str, mine: object) -> str:
    """What `check` prints of one tensor."""
    layer, _, tensor = name.partition(".")
    of = case(layer)
    if tensor not in of.gradients:
        return f"{layer} has no tensor {tensor!r}; it has {', '.join(of.gradients)}"
    with jax.enable_x64(True):
        try:
            if callable(mine):
                mine = mine(**{word: of.inputs[word] for word in inspect.signature(mine).parameters})
        except KeyError as missing:
            return f"there is no input {missing}; {layer} has {', '.join(of.inputs)}"
        if mine is ... or mine is None:
            return "not written yet"
        mistakes = {what: lambda wrong=wrong: wrong(of.inputs) for what, wrong in of.mistakes.get(tensor, {}).items()}
        return diagnosis.diagnose(mine, of.gradients[tensor], of.sizes, mistakes, tolerance=1e-9)


def check(name: str, mine: object) -> None:
    """Prints whether `mine`, a gradient or a function of the case's inputs, is right, or what it looks like."""
    print(f"{name:<22} {judge(name, mine)}")


def hint(name: str, step: int) -> None:
    """Prints the first, second or third hint to a tensor."""
    print(f"{name}, hint {step}: {hints.HINTS[name][step - 1]}")
