"""Cases of notebook 23 beyond GPT-2's layers: Llama's, those of fine-tuning, experts, and products of 8 bits."""

import jax
import jax.numpy as jnp
from ninja_gpt2 import Case, Wrong

from jaxgpt.layers import (
    cross_entropy,
    entropy,
    fp8,
    grouped,
    lora,
    moe,
    rmsnorm,
    rotary,
    router,
    scalar_head,
    soft_cap,
    swiglu,
)


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


def _lora(draw) -> Case:
    N, C, F, R, s = 6, 5, 4, 2, 0.5
    adapter, w, x, dy = lora.Adapter(draw(C, R), draw(R, F)), draw(C, F), draw(N, C), draw(N, F)
    params = lora.Params(w, None, adapter, s)
    grads, dx = lora.backward(params, lora.forward(params, x)[1], dy)
    assert grads is not None  # there is an adapter
    by_x: dict[str, Wrong] = {"a missing term: what comes through the adapter": lambda v: v["dy"] @ v["w"].T}
    inputs = {"x": x, "w": w, "a": adapter.a, "b": adapter.b, "s": s, "dy": dy}
    return Case(inputs, {"x": dx, "a": grads.a, "b": grads.b}, {"s": s, "N": N, "R": R}, {"x": by_x})


def _scalar_head(draw) -> Case:
    N, C = 5, 4
    params, x, dy = scalar_head.Params(draw(C), draw()), draw(N, C), draw(N)
    grads, dx = scalar_head.backward(params, scalar_head.forward(params, x)[1], dy)
    return Case({"x": x, "w": params.weight, "dy": dy}, {"x": dx, "w": grads.weight, "b": grads.bias}, {"N": N, "C": C})


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


def _moe(draw) -> Case:
    N, C, E, F, k = 6, 4, 3, 5, 2
    params = moe.Params(router.Params(draw(C, E)), draw(E, C, 2 * F), draw(E, F, C))
    x, dy = draw(N, C), draw(N, C)
    nothing = router.Statistics(jnp.zeros(E), jnp.zeros(E), jnp.zeros(()))
    _, _, kept = moe.forward(params, x, choices=k, softmax="after")
    grads, dx = moe.backward(params, kept, dy, nothing, softmax="after")
    assert kept.activated is not None  # forward keeps it
    chosen, g = kept.router.chosen, router.weights(kept.router, softmax="after")
    rows = moe.sort(chosen, E)
    gate, up = jnp.split(kept.hidden[rows.place], 2, axis=-1)

    # y = Σ g o is linear in g. What the layer's dx has from the router is exercise router.x's.
    outputs = grouped.multiply(kept.activated, params.w_out, rows.sizes)[rows.place]
    dg = jnp.sum(outputs * dy[:, None], axis=-1)
    _, by_router = router.backward(params.router, kept.router, dg, nothing, softmax="after")

    def dhidden(v, *, weight=True, first=False):
        da = jnp.einsum("nc,njfc->njf", v["dy"], v["w_out"][v["chosen"]]) * (v["g"][..., None] if weight else 1)
        parts = swiglu.backward(swiglu.Residuals(v["gate"], v["up"]), da.at[:, 1:].set(0) if first else da)
        return jnp.concatenate(parts, axis=-1)

    def by_rows(v, hidden):
        return jnp.zeros_like(params.w_in).at[v["chosen"]].add(jnp.einsum("nc,njf->njcf", v["x"], hidden))

    def back(v, hidden):
        return jnp.einsum("njf,njcf->nc", hidden, v["w_in"][v["chosen"]])

    a = swiglu.output(swiglu.Residuals(gate, up))
    unweighted = "a missing factor: g, with which the expert's output counts"
    mistakes: dict[str, dict[str, Wrong]] = {
        "g": {"a factor too much: g itself, in which y is linear": lambda v: v["g"] * dg},
        "w_out": {
            unweighted: lambda v: jnp.zeros_like(v["w_out"]).at[v["chosen"]].add(jnp.einsum("njf,nc->njfc", a, v["dy"]))
        },
        "w_in": {unweighted: lambda v: by_rows(v, dhidden(v, weight=False))},
        "x": {
            unweighted: lambda v: back(v, dhidden(v, weight=False)),
            "a missing term: each of a token's experts gives one": lambda v: back(v, dhidden(v, first=True)),
        },
    }
    inputs = {"x": x, "chosen": chosen, "g": g, "w_in": params.w_in, "w_out": params.w_out}
    gradients = {"g": dg, "w_out": grads.w_out, "w_in": grads.w_in, "x": dx - by_router}
    return Case(inputs | {"gate": gate, "up": up, "dy": dy}, gradients, {"k": k, "E": E, "F": F}, mistakes)


def _fp8(draw) -> Case:
    N, C, F = 5, 4, 3
    params, x, dy = fp8.Params(draw(C, F), draw(F)), draw(N, C), draw(N, F)
    _, kept = fp8.forward(params, x)
    grads, dx = fp8.backward(params, kept, dy)
    x_hat, w_hat = kept.numbers(x.dtype), fp8.quantise(params.weight, fp8.E4M3).numbers(x.dtype)
    dy_hat = fp8.quantise(dy, fp8.E5M2).numbers(x.dtype)
    rounded = "∂y where it belongs rounded: both factors of a product have 8 bits"
    by_x: dict[str, Wrong] = {
        "w where ŵ belongs: y is made of ŵ": lambda v: v["dy_hat"] @ v["w"].T,
        rounded: lambda v: v["dy"] @ v["w_hat"].T,
    }
    by_w: dict[str, Wrong] = {
        "x where x̂ belongs: y is made of x̂": lambda v: v["x"].T @ v["dy_hat"],
        rounded: lambda v: v["x_hat"].T @ v["dy"],
    }
    by_b: dict[str, Wrong] = {"∂y rounded, where it needn't be: β is in no product": lambda v: v["dy_hat"].sum(0)}
    inputs = {"x": x, "w": params.weight, "x_hat": x_hat, "w_hat": w_hat, "dy": dy, "dy_hat": dy_hat}
    gradients = {"x": dx, "w": grads.weight, "b": grads.bias}
    return Case(inputs, gradients, {"N": N, "C": C, "F": F}, {"x": by_x, "w": by_w, "b": by_b})


MAKERS = {
    "rmsnorm": _rmsnorm,
    "rotary": _rotary,
    "swiglu": _swiglu,
    "soft_cap": _soft_cap,
    "lora": _lora,
    "scalar_head": _scalar_head,
    "entropy": _entropy,
    "router": _router,
    "moe": _moe,
    "fp8": _fp8,
}
