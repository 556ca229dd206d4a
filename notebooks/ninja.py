"""Notebook 23: `check("layernorm.x", mine)` calls the reader's function with the inputs that its parameters name.

`hint("layernorm.x", 1)` says which way, 2 the step that is easily missed, 3 nearly the formula. The cases, each layer's
inputs and the project's gradients of them, are in `ninja_gpt2.py` and `ninja_llama.py`.
"""

import functools
import inspect

import diagnosis
import hints
import jax
import jax.numpy as jnp
import ninja_gpt2
import ninja_llama
import numpy as np
from ninja_gpt2 import Case

MAKERS = ninja_gpt2.MAKERS | ninja_llama.MAKERS


@functools.cache
def case(layer: str) -> Case:
    """Returns the case of a layer, in float64: the same numbers each time."""
    if layer not in MAKERS:
        raise KeyError(f"no layer {layer!r}; there are {', '.join(MAKERS)}")
    rng = np.random.default_rng(23)
    with jax.enable_x64(True):
        return MAKERS[layer](lambda *shape: jnp.asarray(rng.normal(size=shape)))


def names() -> list[str]:
    """Returns all tensors that have a gradient, as `check` takes them."""
    return [f"{layer}.{tensor}" for layer in MAKERS for tensor in case(layer).gradients]


def judge(name: str, mine: object) -> str:
    """Returns what `check` prints of one tensor."""
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
