"""The notebooks' exercises, and `check`, which tells a reader whether an answer is right.

The reader writes an answer in the place of `...`: a number, several, a word, or a function. A function is called with
arrays drawn here and compared with the reference. The authors' answers are in `answers/`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diagnosis
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.layers import attention, layernorm, linear, rmsnorm, swiglu
from jaxgpt.models import grouped_attention
from jaxgpt.objectives import comparisons

NOT_YET = "no answer yet"


class Numbers(NamedTuple):
    """A number, or several in their order; right within a relative `tolerance` of each, or `absolute`."""

    values: Any
    tolerance: float = 0.01
    absolute: float = 0.0


class Same(NamedTuple):
    """An answer that is right if it is equal: a word, a set of words, True or False, or several of these."""

    value: Any


class Function(NamedTuple):
    """A function that returns what `reference` does, an array or several, for these inputs."""

    reference: Callable[..., Any]
    inputs: tuple[Any, ...]


def _draw(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    return tuple(rng.normal(size=shape) for shape in shapes)


def _epsilons_part(g, x_hat, sigma, epsilon):
    x = sigma * x_hat
    plain = layernorm.Params(jnp.ones(x.shape), jnp.zeros(x.shape))
    normalised, kept = layernorm.forward(plain, jnp.asarray(x), epsilon=epsilon)
    return jnp.sum(layernorm.backward(plain, kept, jnp.asarray(g))[1] * normalised)


def _small_row() -> tuple[Any, ...]:
    """g, x̂, σ and ε of a row whose variance is not much more than ε."""
    x, g = _draw((12,), (12,))
    x, epsilon = 0.003 * (x - x.mean()), 1e-5
    sigma = np.sqrt(np.mean(x**2) + epsilon)
    return g, x / sigma, sigma, epsilon


def _rms_norm(x, g, epsilon):
    plain = rmsnorm.Params(jnp.ones(x.shape))
    return rmsnorm.backward(plain, rmsnorm.forward(plain, jnp.asarray(x), epsilon=epsilon)[1], jnp.asarray(g))[1]


def _both_halves(l1, out1, l2, out2):
    total = np.logaddexp(l1, l2)
    return np.exp(l1 - total) * out1 + np.exp(l2 - total) * out2


def _smoothed(z, t, alpha):
    return jax.grad(lambda z: -jnp.sum(((1 - alpha) * jnp.eye(len(z))[t] + alpha / len(z)) * jax.nn.log_softmax(z)))(
        jnp.asarray(z)
    )


def _alone(q, k, v, dout):
    """Attention with a window of 1: output and gradients."""
    arrays = [jnp.asarray(array)[None, :, None] for array in (q, k, v)]
    out, kept = attention.forward(*arrays, block=len(q), window=1)
    gradients = attention.backward(kept, jnp.asarray(dout)[None, :, None], block=len(q), window=1)
    return tuple(array[0, :, 0] for array in (out, *gradients))


def _equal_scores(dp):
    """∂s of a query whose scores are all 0, by values that make ∂p what it is."""
    p = jnp.full(len(dp), 1 / len(dp))
    return jax.vjp(jax.nn.softmax, jnp.log(p))[1](jnp.asarray(dp))[0]


def _preference(z, target, h, beta):
    weight = beta * -comparisons.sigmoid_loss(jnp.asarray(h))[1]
    return weight * (jax.nn.softmax(jnp.asarray(z)) - jnp.eye(len(z))[target])


def _alike(r, K):
    return comparisons.ranking_loss(jnp.zeros((1, K)), jnp.arange(K)[None])[1][0, r]


EXERCISES: dict[str, Numbers | Same | Function] = {
    "0.1": Numbers(7),
    "0.2": Function(lambda x, scale, dy: (dy * scale, (dy * x).sum(0)), _draw((5, 3), (3,), (5, 3))),
    "0.3": Numbers(2),
    "1.1": Numbers(48 * 1600**2 / (12 * 768**2), 0.05),
    "1.2": Numbers(1535, 1e-3),
    "1.3": Numbers(6 * 124_439_808 * 10e9 / 4e14 / 3600, 0.02),
    "1.4": Function(lambda L, C: L * (12 * C * C + 13 * C), (4, 128)),
    "2.1": Numbers(1),
    "2.2": Numbers(1),
    "2.3": Function(
        lambda onehot, dy: linear.backward(linear.Params(jnp.zeros((4, 3))), linear.Residuals(onehot), dy)[0].weight,
        (np.eye(4)[[2, 0, 2, 1, 2]], _draw((5, 3))[0]),
    ),
    "2.4": Numbers([19, 20, 21, 22, 23], 0),
    "3.1": Function(_epsilons_part, _small_row()),
    "3.2": Numbers(1e-5**-0.5),
    "3.3": Function(_rms_norm, (*_draw((8,), (8,)), 1e-5)),
    "3.4": Numbers([10, 1, 1]),
    "4.1": Numbers(1),
    "4.2": Numbers([-0.7525, -0.17], 0, 1e-3),
    "4.3": Function(
        lambda x: swiglu.backward(swiglu.Residuals(jnp.asarray(x), jnp.ones(9)), jnp.ones(9))[0], _draw((9,))
    ),
    "4.4": Numbers(12 * 16 * 1024 * 3072 * 2),
    "5.1": Function(_equal_scores, _draw((6,))),
    "5.2": Numbers([0, 0], 0, 1e-9),
    "5.3": Function(_both_halves, (0.3, _draw((4,), (4,))[0], 1.1, _draw((4,), (4,))[1])),
    "5.4": Numbers([12], 0),
    "6.1": Numbers(0, 0, 1e-9),
    "6.2": Numbers([10.82, 5.55], 0.002),
    "6.3": Function(_smoothed, (_draw((9,))[0], 2, 0.1)),
    "6.4": Numbers(1000),
    "7.1": Same({"attention_out", "mlp_out"}),
    "7.2": Numbers([1, 0.1], 0.02),
    "7.3": Numbers((23 * 2 * 768**3 + 2 * 768**2) / (24 * 2 * 768**2)),
    "7.4": Same((True, False, True)),
    "8.1": Numbers([9, 19]),
    "8.2": Numbers(1),
    "8.3": Same((True, False)),
    "8.4": Numbers([15_092, 1 - 0.5**0.5], 0.02),
    "9.1": Numbers(256, 0),
    "9.2": Function(lambda d, s: d * (s - d), (0.3, 1.2)),
    "9.3": Numbers(1),
    "9.4": Numbers(256, 0),
    "10.1": Numbers(1026, 1e-3),
    "10.2": Numbers([12, 2]),
    "10.3": Function(lambda L, i, r: np.sqrt(L * i / r), (12, 1.0, 16.0)),
    "10.4": Numbers([16, 4], 0),
    "11.1": Numbers([3, 4]),
    "11.2": Function(lambda pieces: np.linalg.norm(np.concatenate(pieces)), (_draw((3,), (3,), (3,)),)),
    "11.3": Numbers([0, 6], 0),
    "11.4": Numbers([18, 7.5, 4, 2.25]),
    "12.1": Numbers(-8, 0, 1.0),
    "12.2": Numbers(1),
    "12.3": Same(("layernorm", "gelu", "linear", "attention")[int(np.random.default_rng(12).integers(4))]),
    "12.4": Same(False),
    "13.1": Function(lambda w, dw: (w * dw).sum(axis=1), _draw((6, 4), (6, 4))),
    "13.2": Function(lambda n, m: n + m, (np.arange(5), np.array([3, 1, 4, 1, 5]))),
    "13.3": Same((True, False)),
    "13.4": Numbers([15, 25], 0),
    "14.1": Numbers(5),
    "14.2": Function(_alone, _draw((7, 4), (7, 4), (7, 4), (7, 4))),
    "14.3": Numbers(25_165_824),
    "14.4": Function(grouped_attention.keys_seen, (50, 8)),
    "15.1": Function(lambda g, u: swiglu.forward(g, u)[0] + swiglu.forward(-g, -u)[0], _draw((8,), (8,))),
    "15.2": Numbers([-1.278, -0.278, 1.0998], 0, 2e-3),
    "15.3": Numbers(0, 0, 1e-9),
    "15.4": Numbers([1 / (1 + 31_999 * np.exp(-6)), np.log(1 + 31_999 * np.exp(-6))]),
    "16.1": Same((True, False)),
    "16.2": Same({"z"}),
    "16.3": Numbers([2, 8]),
    "16.4": Function(lambda a, dy: a.T @ dy, _draw((9, 4), (9, 3))),
    "16.5": Numbers([0, 1], 0),
    "17.1": Numbers(512),
    "17.2": Function(lambda da, db, t: (da / t, t * db), (*_draw((5, 2), (2, 4)), 4.0)),
    "17.3": Same((True, False)),
    "17.4": Numbers([8.5, 4.5, 8 + 8 / 64 + 32 / (64 * 256), 4 + 8 / 64 + 32 / (64 * 256)], 1e-3),
    "18.1": Numbers([1, 0], 0),
    "18.2": Numbers([57 / 262, 13 / 262]),
    "18.3": Same("t is 4.<|im_end|>\n"),
    "18.4": Same(False),
    "19.1": Function(_alike, (1, 4)),
    "19.2": Function(lambda h: 2 * comparisons.sigmoid_loss(jnp.asarray(h), smoothing=0.5)[1], _draw((7,))),
    "19.3": Function(lambda s1, s2, c: 4 * c * (s1 + s2), (1.3, -0.4, 0.1)),
    "19.4": Same((True, False)),
    "20.1": Function(lambda pi, r, g: (pi @ (r * g**2)) / (pi @ g**2), (np.full(6, 1 / 6), *_draw((6,), (6,)))),
    "20.2": Numbers([0, 0], 0, 1e-9),
    "20.3": Numbers([-0.5, 1.5]),
    "20.4": Numbers([np.log(8), np.log(3)]),
    "21.1": Function(lambda G: G / (G - 1), (8,)),
    "21.2": Numbers([5, 1]),
    "21.3": Numbers([1 - 0.98**8 - 0.02**8, np.log(0.5) / np.log(0.98)]),
    "21.4": Numbers([0.1, -0.4, 0.25, -0.25]),
    "22.1": Numbers([np.exp(3 / 0.7), 3]),
    "22.2": Function(lambda beta: (np.log(2), beta / 2, 1 / (4 * beta**2), 1 / beta), (0.7,)),
    "22.3": Same(True),
    "22.4": Function(_preference, (_draw((8,))[0], 3, 0.4, 0.7)),
}


def judge(number: str, answer: object) -> str:
    """Returns what `check` prints of one answer; "right" if it is."""
    expected = EXERCISES[number]
    with jax.enable_x64(True):
        if isinstance(expected, Function):
            return _judge_function(expected, answer)
        if answer is ... or (isinstance(answer, tuple | list) and any(part is ... for part in answer)):
            return NOT_YET
        if isinstance(expected, Same):
            return "right" if answer == expected.value else f"not {answer!r}"
        return _judge_numbers(expected, answer)


def _judge_function(expected: Function, answer: object) -> str:
    if not callable(answer):
        return NOT_YET if answer is ... else f"a function is wanted, and this is {type(answer).__name__}"
    wanted = len(inspect.signature(answer).parameters)
    if wanted != len(expected.inputs):
        return f"the function takes {wanted} arguments, and is called with {len(expected.inputs)}"
    inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, expected.inputs)
    mine, truth = answer(*inputs), expected.reference(*inputs)
    if mine is ... or mine is None or (isinstance(mine, tuple) and any(part is ... for part in mine)):
        return NOT_YET
    if not isinstance(truth, tuple):
        return diagnosis.diagnose(mine, truth, tolerance=1e-5)
    if not isinstance(mine, tuple) or len(mine) != len(truth):
        return f"{len(truth)} results are wanted, as a tuple"
    found = [diagnosis.diagnose(a, b, tolerance=1e-5) for a, b in zip(mine, truth, strict=True)]
    wrong = [f"result {number}: {said}" for number, said in enumerate(found, 1) if said != diagnosis.RIGHT]
    return "; ".join(wrong) or diagnosis.RIGHT


def _judge_numbers(expected: Numbers, answer: Any) -> str:
    try:
        mine, truth = np.asarray(answer, float), np.asarray(expected.values, float)
    except (TypeError, ValueError):
        return f"not a number: {answer!r}"
    if mine.shape != truth.shape:
        return f"{truth.size} numbers are wanted, in their order" if truth.ndim else "one number is wanted"
    wrong = np.abs(mine - truth) > expected.tolerance * np.abs(truth) + expected.absolute
    if not np.any(wrong):
        return "right"
    if truth.ndim:
        return f"not yet: number {', '.join(str(place + 1) for place in np.flatnonzero(wrong))} of {truth.size}"
    if truth and np.isclose(mine, -truth, rtol=0.01):
        return "not yet: the sign is turned"
    return f"not yet: {mine / truth:.3g} times what is right" if truth else "not yet"


def check(number: str, answer: object) -> None:
    """Prints whether an answer to exercise `number`, "notebook.exercise", is right."""
    print(f"exercise {number}: {judge(number, answer)}")
