"""Cases of the gradient check: one for each layer. Those of whole models are in `objective_cases.py`.

No autodiff is in here: a case only puts a forward, its hand-written backward and inputs together.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxgpt.layers import (
    attention,
    cross_entropy,
    dropout,
    embedding,
    fp8,
    gelu,
    layernorm,
    linear,
    lora,
    moe,
    residual,
    rmsnorm,
    rotary,
    router,
    soft_cap,
    swiglu,
    unembedding,
)
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof.gradcheck import Case, Tree
from jaxgpt.proof.inputs import document_starts, integers, masks_of, normals, random_targets
from jaxgpt.proof.objective_cases import adapted_model_case, model_case

UNROUNDED = fp8.Formats(None, None)
LARGEST = (3.0, 0.7, 11.0)  # expected magnitudes of x, w and ∂y, that give three scales


def cases(model: Model, compute: Compute, batch: int, length: int, key: Key[Array, ""]) -> Iterator[Case]:
    """Yields cases of every layer at the shapes it has in this model, and of the whole model."""
    keys = (jax.random.fold_in(key, number) for number in itertools.count())
    B, T, C, H, D = batch, length, model.width, model.heads, model.width_per_head
    V, Vp = model.vocabulary_size, model.padded_vocabulary_size
    yield embedding_case(next(keys), B, T, C, Vp, model.context)
    yield linear_case(next(keys), B, T, C, 4 * C)
    yield layernorm_case(next(keys), B, T, C)
    yield gelu_case(next(keys), B, T, 4 * C)
    yield attention_case(next(keys), B, T, H, D, compute.attention_block)
    yield residual_case(next(keys), B, T, C)
    yield cross_entropy_case(next(keys), B * T, V, Vp)
    yield unembedding_case(next(keys), B, T, C, V, Vp, compute.classifier_chunk)
    yield rmsnorm_case(next(keys), B, T, C)
    yield rotary_case(next(keys), B, T, H, 2 * D)
    yield soft_cap_case(next(keys), B * T, V)
    yield swiglu_case(next(keys), B, T, 4 * C)
    yield router_case(next(keys), B * T, C, 5, 2)
    yield moe_case(next(keys), B * T, C, 2 * C, 5, 2)
    yield model_case(next(keys), B, T, model, compute)
    yield embedding_case(next(keys), B, T, C, Vp, model.context, documents=True)
    yield attention_case(next(keys), B, T, H, D, compute.attention_block, documents=True)
    yield attention_case(next(keys), B, T, H, D, compute.attention_block, group=2, window=1 + T // 2)
    yield router_case(next(keys), B * T, C, 5, 2, softmax="before")
    yield lora_case(next(keys), B, T, C, 4 * C, 2)
    yield adapted_model_case(next(keys), B, T, model, compute)
    yield dropout_case(next(keys), B, T, C)
    yield attention_case(next(keys), B, T, H, D, compute.attention_block, group=2, rate=0.3)
    yield model_case(next(keys), B, T, model, compute, rate=0.3)
    yield fp8_case(next(keys), B, T, C, 4 * C)


def embedding_case(
    key: Key[Array, ""], B: int, T: int, C: int, Vp: int, context: int, *, documents: bool = False
) -> Case:
    params = embedding.Params(*normals(key, (Vp, C), (context, C)))
    tokens = integers(key, (B, T), Vp)
    starts = document_starts(key, B, T) if documents else None

    def forward(params):
        return embedding.forward(params, tokens, starts=starts)

    return Case(
        "embedding_of_documents" if documents else "embedding",
        params,
        lambda params: forward(params)[0],
        lambda params, dy: embedding.backward(params, forward(params)[1], dy),
    )


def dropout_case(key: Key[Array, ""], B: int, T: int, C: int, *, rate: float = 0.3) -> Case:
    (x,) = normals(key, (B, T, C))
    masks = masks_of(key, B, rate)
    return Case(
        "dropout",
        {"x": x},
        lambda inputs: dropout.forward(inputs["x"], masks),
        lambda inputs, dy: {"x": dropout.backward(masks, dy)},
    )


def linear_case(key: Key[Array, ""], B: int, T: int, inputs: int, outputs: int) -> Case:
    weight, bias, x = normals(key, (inputs, outputs), (outputs,), (B, T, inputs))
    return _layer_case("linear", linear, linear.Params(weight, bias), x)


def lora_case(
    key: Key[Array, ""], B: int, T: int, inputs: int, outputs: int, R: int, *, two_products: bool = False
) -> Case:
    """Returns the case of an adapter of a frozen layer, whose weight and bias have no gradient.

    A rank of 0 is no adapter. A CPU merges the adapter in float64; with `two_products` ∂x is as on GPUs.
    """
    weight, bias, a, b, x = normals(key, (inputs, outputs), (outputs,), (inputs, R), (R, outputs), (B, T, inputs))

    def params(inputs):
        of_base = (jnp.asarray(array, inputs["x"].dtype) for array in (weight, bias))
        return lora.Params(*of_base, adapter=inputs["adapter"], scaling=0.5 if R else None)

    def forward(inputs):
        return lora.forward(params(inputs), inputs["x"])

    def backward(inputs, dy):
        dadapter, dx = lora.backward(params(inputs), forward(inputs)[1], dy)
        if two_products:
            x, rows = (array.reshape(-1, array.shape[-1]) for array in (inputs["x"], dy))
            _, dh = lora.through_adapter(params(inputs), x, rows)
            dx = lora.dx_by_two_products(params(inputs), rows, dh).reshape(dx.shape)
        return {"adapter": dadapter, "x": dx}

    kind = "_of_two_products" if two_products else "" if R else "_of_frozen"
    adapter = lora.Adapter(a, b) if R else None
    return Case(f"lora{kind}", {"adapter": adapter, "x": x}, lambda inputs: forward(inputs)[0], backward)


def fp8_case(key: Key[Array, ""], B: int, T: int, inputs: int, outputs: int, *, again: bool = False) -> Case:
    """Returns the case of products of 8 bits, from residuals that forward keeps, or with `again` from x itself.

    Rounding is a staircase, of which no derivative is to be had. So here nothing is rounded, and everything else is as
    in training: each factor is divided by its scale and multiplied by it again.
    """
    weight, bias, x = normals(key, (inputs, outputs), (outputs,), (B, T, inputs))

    def forward(inputs):
        weight, bias = inputs["params"]
        params = fp8.Params(weight, bias, jnp.asarray(LARGEST, inputs["x"].dtype))
        return params, *fp8.forward(params, inputs["x"], formats=UNROUNDED)

    def backward(inputs, dy):
        params, _, kept = forward(inputs)
        residuals = linear.Residuals(inputs["x"]) if again else kept
        grads, dx = fp8.backward(params, residuals, dy, formats=UNROUNDED)
        return {"params": linear.Params(grads.weight, grads.bias), "x": dx}

    name = "fp8_of_x" if again else "fp8"
    return Case(name, {"params": linear.Params(weight, bias), "x": x}, lambda inputs: forward(inputs)[1], backward)


def layernorm_case(key: Key[Array, ""], B: int, T: int, C: int) -> Case:
    scale, bias, x = normals(key, (C,), (C,), (B, T, C))
    return _layer_case("layernorm", layernorm, layernorm.Params(1 + scale, bias), 3 + 2 * x)


def rmsnorm_case(key: Key[Array, ""], B: int, T: int, C: int) -> Case:
    scale, x = normals(key, (C,), (B, T, C))
    return _layer_case("rmsnorm", rmsnorm, rmsnorm.Params(1 + scale), 3 + 2 * x)


def rotary_case(
    key: Key[Array, ""], B: int, T: int, H: int, D: int, frequencies: rotary.Frequencies = rotary.PLAIN
) -> Case:
    (x,) = normals(key, (B, T, H, D))
    places = jnp.arange(T)[None]
    return Case(
        "rotary",
        {"x": x},
        lambda inputs: rotary.forward(inputs["x"], places, frequencies=frequencies),
        lambda inputs, dy: {"x": rotary.backward(dy, places, frequencies=frequencies)},
    )


def soft_cap_case(key: Key[Array, ""], N: int, V: int) -> Case:
    """Returns the case of numbers within and beyond the cap."""
    (x,) = normals(key, (N, V))
    return Case(
        "soft_cap",
        {"x": 2 * x},
        lambda inputs: soft_cap.forward(inputs["x"], cap=1.5),
        lambda inputs, dy: {"x": soft_cap.backward(soft_cap.forward(inputs["x"], cap=1.5), dy, cap=1.5)},
    )


def swiglu_case(key: Key[Array, ""], B: int, T: int, F: int) -> Case:
    gate, up = normals(key, *[(B, T, F)] * 2)
    return _arrays_case("swiglu", swiglu, {"gate": 2 * gate, "up": up})


def router_case(key: Key[Array, ""], N: int, C: int, E: int, choices: int, *, softmax: Any = "after") -> Case:
    """Returns the case of the weights of the chosen experts and the statistics that have a gradient."""
    weight, x = normals(key, (C, E), (N, C))

    def forward(params, x):
        _, statistics, residuals = router.forward(params, x, choices=choices)
        return (router.weights(residuals, softmax=softmax), statistics), residuals

    def backward(params, residuals, dy):
        return router.backward(params, residuals, *dy, softmax=softmax)

    name = "router" if softmax == "after" else "router_of_switch"
    return _routed_case(name, forward, backward, router.Params(weight), x)


def moe_case(
    key: Key[Array, ""], N: int, C: int, F: int, E: int, choices: int, *, scores: Any = None, softmax: Any = "after"
) -> Case:
    """Returns the case of a mixture of experts, whose router's scores for tokens of ones may be given."""
    weight, w_in, w_out, x = normals(key, (C, E), (E, C, 2 * F), (E, F, C), (N, C))
    if scores is not None:  # the tokens differ where the router doesn't look
        weight[:], x[:, 0] = 0, 1
        weight[0] = scores

    def forward(params, x):
        y, statistics, residuals = moe.forward(params, x, choices=choices, softmax=softmax)
        return (y, statistics), residuals

    def backward(params, residuals, dy):
        return moe.backward(params, residuals, *dy, softmax=softmax)

    return _routed_case("moe", forward, backward, moe.Params(router.Params(weight), w_in, w_out), x)


def _routed_case(name: str, forward: Any, backward: Any, params: Tree, x: Array) -> Case:
    """Returns the case of a layer whose output is an array with rows of tokens, and a router's statistics.

    The output is one array of all numbers that have a gradient; of `load` nothing has.
    """

    def flat(inputs):
        y, statistics = forward(inputs["params"], inputs["x"])[0]
        return jnp.concatenate([y.ravel(), statistics.probability, statistics.z[None]])

    def pulled_back(inputs, dflat):
        (y, statistics), residuals = forward(inputs["params"], inputs["x"])
        dy, dprobability, dz = jnp.split(dflat, [y.size, y.size + statistics.load.size])
        wide = residuals.scores.dtype if isinstance(residuals, router.Residuals) else residuals.router.scores.dtype
        dstatistics = router.Statistics(statistics.load, dprobability.astype(wide), dz[0].astype(wide))
        dparams, dx = backward(inputs["params"], residuals, (dy.reshape(y.shape), dstatistics))
        return {"params": dparams, "x": dx}

    return Case(name, {"params": params, "x": x}, flat, pulled_back)


def _layer_case(name: str, layer: Any, params: Tree, x: Array) -> Case:
    """Returns the case of a layer of the plain form forward(params, x), backward(params, residuals, dy)."""

    def forward(inputs):
        return layer.forward(inputs["params"], inputs["x"])

    def backward(inputs, dy):
        dparams, dx = layer.backward(inputs["params"], forward(inputs)[1], dy)
        return {"params": dparams, "x": dx}

    return Case(name, {"params": params, "x": x}, lambda inputs: forward(inputs)[0], backward)


def _arrays_case(name: str, layer: Any, arrays: dict[str, Any], *more: Array, **options: Any) -> Case:
    """Returns the case of a layer of the form forward(*arrays, *more), backward(residuals, dy), both with options."""
    names = tuple(arrays)  # JAX sorts the keys of a dict

    def forward(inputs):
        return layer.forward(*(inputs[name] for name in names), *more, **options)

    def backward(inputs, dy):
        gradients = layer.backward(forward(inputs)[1], dy, **options)
        return dict(zip(names, gradients if isinstance(gradients, tuple) else (gradients,), strict=True))

    return Case(name, arrays, lambda inputs: forward(inputs)[0], backward)


def gelu_case(key: Key[Array, ""], B: int, T: int, F: int) -> Case:
    (x,) = normals(key, (B, T, F))
    return _arrays_case("gelu", gelu, {"x": 2 * x})


def attention_case(
    key: Key[Array, ""],
    B: int,
    T: int,
    K: int,
    D: int,
    block: int,
    *,
    documents: bool = False,
    group: int = 1,
    window: int = 0,
    rate: float = 0.0,
) -> Case:
    """Returns the case of K key and value heads, each with a group of query heads, and of dropout of this rate."""
    q, k, v = normals(key, (B, T, K * group, D), *[(B, T, K, D)] * 2)
    starts = document_starts(key, B, T) if documents else None
    name = "attention" + "_of_documents" * documents + "_of_groups" * (group > 1) + "_in_a_window" * bool(window)
    name += "_with_dropout" * bool(rate)
    options = {"block": block, "starts": starts, "window": window, "masks": masks_of(key, B, rate)}
    return _arrays_case(name, attention, {"q": q, "k": k, "v": v}, **options)


def residual_case(key: Key[Array, ""], B: int, T: int, C: int) -> Case:
    x, branch = normals(key, *[(B, T, C)] * 2)
    return Case(
        "residual",
        {"x": x, "branch": branch},
        lambda inputs: residual.forward(inputs["x"], inputs["branch"]),
        lambda inputs, dy: dict(zip(("x", "branch"), residual.backward(dy), strict=True)),
    )


def cross_entropy_case(key: Key[Array, ""], N: int, V: int, Vp: int) -> Case:
    (logits,) = normals(key, (N, Vp))
    return _arrays_case(
        "cross_entropy", cross_entropy, {"logits": logits}, random_targets(key, (N,), V), vocabulary_size=V
    )


def unembedding_case(
    key: Key[Array, ""],
    B: int,
    T: int,
    C: int,
    V: int,
    Vp: int,
    chunk: int,
    *,
    cap: float = 0.0,
    softmax: unembedding.Softmax | None = None,
) -> Case:
    """Returns the unembedding's case; with `softmax` its gradients are by this kernel."""
    weight, x = normals(key, (Vp, C), (B, T, C))
    targets = random_targets(key, (B, T), V)
    weights = jnp.asarray(*normals(key, (B, T)))

    def objective(logp, weights):
        """Non-linear objective, another for each token, so that ∂loss/∂ℓ differs between them."""
        parts = weights.astype(logp.dtype) * jnp.exp(logp)
        return jnp.sum(parts), parts

    def forward(inputs, softmax=None):
        options = {"vocabulary_size": V, "chunk": chunk, "cap": cap, "softmax": softmax}
        return unembedding.forward(inputs["params"], inputs["x"], targets, objective, weights, **options)

    def backward(inputs, dy):
        dparams, dx = unembedding.backward(forward(inputs, softmax)[1], dy)
        return {"params": dparams, "x": dx}

    inputs = {"params": unembedding.Params(weight / C**0.5), "x": x}
    name = "unembedding_of_kernel" if softmax else "unembedding"
    return Case(name, inputs, lambda inputs: forward(inputs)[0], backward)
