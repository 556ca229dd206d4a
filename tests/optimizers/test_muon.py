"""Muon's steps beside optax's and beside NumPy's singular values."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.optimizers import adamw, matrices, muon, newton_schulz
from jaxgpt.optimizers.matrices import Matrices
from jaxgpt.options.config import Optimizer
from tests.optimizers.test_newton_schulz import by_singular_values

# Fused and wide, tall, stacked layers, experts of stacked layers; and what AdamW updates.
KINDS = {
    "fused": Matrices(0, (4, 15), (6, 6, 3)),
    "tall": Matrices(0, (15, 4), (4,)),
    "layers": Matrices(3, (4, 6), (6,)),
    "experts": Matrices(2, (3, 4, 10), (5, 5)),
    "table": None,
    "bias": None,
}
SHAPES = {
    "fused": (4, 15),
    "tall": (15, 4),
    "layers": (3, 4, 6),
    "experts": (2, 3, 4, 10),
    "table": (7, 4),
    "bias": (5,),
}
DECAYS = dict.fromkeys(KINDS, True) | {"bias": False}
OPTIONS = Optimizer(
    name="muon", muon_learning_rate=0.3, learning_rate=0.2, momentum=0.9, beta2=0.97, weight_decay=0.2, epsilon=1e-8
)
RATES = np.array([0.1, 0.2, 0.05, 0.1, 0.0, 0.1])


def tree(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


@functools.partial(jax.jit, static_argnames=("options", "nothing_decays"))
def update(params, moments, grads, step, learning_rate, options=OPTIONS, advance=True, key=None, nothing_decays=False):
    decays = dict.fromkeys(DECAYS, False) if nothing_decays else DECAYS
    setup = muon.Setup(KINDS, "float32", lambda shards: shards, lambda own, count: own)
    return muon.update(params, moments, grads, decays, step, learning_rate, options, setup, advance=advance, key=key)


def steps(dtype, options=OPTIONS):
    """Yields the parameters and moments after each of six steps, and the gradients that they were with."""
    params = tree(0, dtype)
    moments = muon.init(params, KINDS)
    for step, rate in enumerate(RATES):
        grads = tree(step + 1, dtype)
        params, moments = update(params, moments, grads, jnp.int32(step), jnp.asarray(rate, dtype), options)
        yield params, moments, grads


def apart(params):
    """Every matrix a tensor of its own: optax knows stacks of matrices, and none side by side."""
    ends = [6, 12]
    fused = dict(zip("qkv", jnp.split(params["fused"], ends, axis=1), strict=True))
    gate, up = jnp.split(params["experts"], 2, axis=-1)
    return {**params, "fused": fused, "experts": {"gate": gate, "up": up}}


def oracle(dtype):
    """`optax.contrib.muon`, with Nesterov's momentum of Jordan's form before it: optax's own corrects for its start."""
    (a, b, c), *others = newton_schulz.COEFFICIENTS
    safe = newton_schulz.SAFETY
    last_two = optax.contrib.MuonDimensionNumbers(-2, -1)
    numbers = jax.tree.map(lambda array: last_two if array.ndim > 1 else None, apart(tree(0, dtype)))
    numbers["table"] = None
    is_matrix = jax.tree.map(lambda of: of is not None, numbers, is_leaf=lambda of: of is None or of is last_two)
    schedule = functools.partial(jnp.take, jnp.asarray(RATES, dtype))
    return optax.chain(
        optax.masked(
            optax.chain(optax.trace(OPTIONS.momentum, nesterov=True), optax.scale(1 - OPTIONS.momentum)), is_matrix
        ),
        optax.contrib.muon(
            lambda count: 1.5 * schedule(count),
            ns_coeffs=((a / safe, b / safe**3, c / safe**5), *others),
            beta=0.0,
            nesterov=False,
            eps=OPTIONS.epsilon,
            weight_decay=OPTIONS.weight_decay,
            adam_b1=OPTIONS.beta1,
            adam_b2=OPTIONS.beta2,
            adam_weight_decay=0.0,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=numbers,
            consistent_rms=0.2,
        ),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_equals_optax(x64, dtype, tolerance):
    """Six steps with other learning rates, of Muon 1.5 times AdamW's."""
    optimizer = oracle(dtype)

    @jax.jit
    def oracle_update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected = apart(tree(0, dtype))
    state = optimizer.init(expected)
    table = tree(0, dtype)["table"]  # optax decays all of AdamW's tensors or none
    for rate, (params, _, grads) in zip(RATES, steps(dtype), strict=True):
        expected, state = oracle_update(expected, state, apart(grads))
        expected["table"] = expected["table"] - rate * OPTIONS.weight_decay * table
        table = expected["table"]
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), apart(params), expected
        )


def numpy_steps(nesterov=True, scale=True, beta=OPTIONS.momentum, split=True):
    """Returns the same steps in float64 by an SVD, for `tall` and for the columns of `fused`."""
    params = {name: np.asarray(array, np.float64) for name, array in tree(0).items()}
    momentum = {name: np.zeros_like(array) for name, array in params.items()}
    for step, rate in enumerate(RATES):
        grads = {name: np.asarray(array, np.float64) for name, array in tree(step + 1).items()}
        for name, columns in (("tall", [slice(None)]), ("fused", [slice(0, 6), slice(6, 12), slice(12, 15)])):
            momentum[name] = beta * momentum[name] + (1 - beta) * grads[name]
            ahead = beta * momentum[name] + (1 - beta) * grads[name] if nesterov else momentum[name]
            for part in columns if split else [slice(None)]:
                size = 0.2 * math.sqrt(max(ahead[:, part].shape)) if scale else 1.0
                change = size * by_singular_values(ahead[:, part]) + 0.2 * params[name][:, part]
                params[name][:, part] -= 1.5 * rate * change
    return params


def distance_to_numpy(**changes):
    expected = numpy_steps(**changes)
    *_, (params, _, _) = steps("float32")
    return max(float(np.abs(np.asarray(params[name]) - expected[name]).max()) for name in ("tall", "fused"))


def test_equals_numpy():
    """Plain momentum, no scale, another decay, or queries, keys and values as one matrix would be noticed."""
    assert distance_to_numpy() < 1e-4
    for change in ({"nesterov": False}, {"scale": False}, {"beta": 0.89}, {"split": False}):
        assert distance_to_numpy(**change) > 1e-3


PLANTED = {
    "coefficients in another order": lambda: (newton_schulz, "COEFFICIENTS", newton_schulz.COEFFICIENTS[::-1]),
    "an iteration fewer": lambda: (newton_schulz, "COEFFICIENTS", newton_schulz.COEFFICIENTS[:-1]),
    "another root mean square": lambda: (matrices, "RMS", 0.21),
    "matrices that aren't turned back": lambda: (Matrices, "join", _not_turned),
}


def _not_turned(kind, parts, length):
    return jnp.concatenate(
        [part.reshape(-1, kind.shape[-2], part.size // kind.shape[-2]) for part in parts], -1
    ).reshape(-1, length)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_noticed(monkeypatch, bug):
    expected = numpy_steps()  # before the bug, of whose constants it makes use
    monkeypatch.setattr(*PLANTED[bug]())
    update.clear_cache()  # type: ignore[attr-defined]
    *_, (params, _, _) = steps("float32")
    update.clear_cache()  # type: ignore[attr-defined]
    assert max(np.abs(np.asarray(params[name]) - expected[name]).max() for name in ("tall", "fused")) > 1e-3


def test_matrices_have_one_moment_and_the_rest_is_adamws():
    params = tree(0)
    moments = muon.init(params, KINDS)
    assert jax.tree.structure(moments.first) == jax.tree.structure(params)
    assert {name for name, moment in moments.second.items() if moment is not None} == {"table", "bias"}
    plain = adamw.init(params)
    for step, (rate, (found, of, grads)) in enumerate(zip(RATES, steps("float32"), strict=True)):
        params, plain = adamw.update(
            params, plain, grads, DECAYS, jnp.int32(step), jnp.float32(rate), OPTIONS
        )  # of the matrices too, which are not compared
        for name in ("table", "bias"):
            np.testing.assert_allclose(found[name], params[name], rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(of.second[name], plain.second[name], rtol=1e-6)


def test_an_update_is_as_long_as_adamws():
    """The root mean square of an orthogonal matrix's update is 0.2 of the rate, whatever its form."""
    options = Optimizer(name="muon", weight_decay=0.0)
    params = tree(0)
    new, _ = update(params, muon.init(params, KINDS), tree(1), jnp.int32(0), jnp.float32(0.5), options)
    for name in ("tall", "layers"):
        change = np.asarray(new[name] - params[name])
        assert math.sqrt((change**2).mean()) == pytest.approx(0.2 * 0.5, rel=0.15)


def test_only_what_is_marked_decays():
    """A zero gradient leaves the decay alone: θ (1 - ηλ), with Muon's rate for the matrices."""
    params = tree(0)
    grads = jax.tree.map(jnp.zeros_like, params)
    new, _ = update(params, muon.init(params, KINDS), grads, jnp.int32(3), jnp.float32(0.1))
    for name, array in params.items():
        rate = 0.15 if KINDS[name] else 0.1
        np.testing.assert_allclose(new[name], array * (1 - rate * 0.2 * DECAYS[name]), rtol=1e-5)
    new, _ = update(params, muon.init(params, KINDS), grads, jnp.int32(3), jnp.float32(0.1), nothing_decays=True)
    jax.tree.map(np.testing.assert_array_equal, new, params)


@pytest.mark.parametrize("gradient", [np.nan, np.inf, 1.0])
def test_without_advance_nothing_changes(gradient):
    """The gradient may even be NaN: parameters and momentum keep their bits."""
    params = tree(0)
    second = {name: None if KINDS[name] else jnp.abs(array) for name, array in tree(2).items()}
    moments = adamw.Moments(tree(1), second)
    grads = jax.tree.map(lambda grad: grad + np.float32(gradient), tree(3))
    found = update(params, moments, grads, jnp.int32(3), jnp.float32(0.1), OPTIONS, False)
    jax.tree.map(np.testing.assert_array_equal, found, (params, moments))


def test_bfloat16_parameters_are_rounded_at_random():
    """Their mean goes where float32's go, and each is one of the two neighbours; the momentum is float32."""
    params = {name: array.astype(jnp.bfloat16) for name, array in tree(0).items()}
    wide = {name: array.astype(jnp.float32) for name, array in params.items()}
    moments, grads, rate = muon.init(params, KINDS), tree(1), jnp.float32(1e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
    exact, _ = update(wide, moments, grads, jnp.int32(0), rate)
    drawn = [
        np.asarray(update(params, moments, grads, jnp.int32(0), rate, key=jax.random.key(seed))[0]["tall"], np.float32)
        for seed in range(200)
    ]
    start = np.asarray(wide["tall"])
    moved, expected = np.mean(drawn, axis=0) - start, np.asarray(exact["tall"]) - start
    assert np.abs(moved).sum() > 0
    # Means of 200 draws, each off by at most a last bit, 2⁻⁷ of the number.
    assert np.abs(moved - expected).max() < 4 * np.abs(start).max() * 2**-7 / math.sqrt(200)
    assert len({one.tobytes() for one in drawn}) > 150


def test_a_tensor_is_cut_in_its_matrices_and_put_together_again():
    for name, kind in KINDS.items():
        if kind is None:
            continue
        rows = jnp.arange(math.prod(SHAPES[name]), dtype=jnp.float32).reshape(kind.rows, -1)
        filled = jnp.pad(rows, ((0, 0), (0, 3)))
        parts = kind.split(filled)
        assert all(part.shape[1] <= part.shape[2] for part in parts)
        assert sum(len(part) for part in parts) == kind.rows * len(kind.each)
        np.testing.assert_array_equal(kind.join(parts, filled.shape[1]), filled)
    first = KINDS["experts"].split(jnp.arange(240.0).reshape(2, 120))[1][4]  # the second layer's second expert's up
    np.testing.assert_array_equal(first, np.arange(240).reshape(2, 3, 4, 10)[1, 1, :, 5:])


def test_operations_of_all_matrices():
    """The count by hand for the two kinds of several matrices: five times 4 M² N + 2 M³."""
    tall = 5 * (4 * 16 * 15 + 2 * 64)
    experts = 2 * 3 * 2 * 5 * (4 * 16 * 5 + 2 * 64)
    assert matrices.operations({"tall": KINDS["tall"], "experts": KINDS["experts"], "bias": None}) == tall + experts
