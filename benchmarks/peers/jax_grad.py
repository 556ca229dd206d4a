"""Automatic differentiation: a model as usually written in JAX under `jax.value_and_grad`.

Layers scanned, or written out where the parameters are apart; JAX's own attention over the whole T×T square; all logits
at once. The parameters are this project's, as are the few lines of AdamW and clipping, so that what is compared is the
gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.peers import automatic_gpt2, automatic_llama, common
from benchmarks.peers.spec import WARM_UP, Spec
from jaxgpt.data.loader import Batch
from jaxgpt.models import family
from jaxgpt.optimizers import adamw, clipping, schedules

FAMILIES = {"gpt2": automatic_gpt2, "llama": automatic_llama}


class State(NamedTuple):
    params: Any  # as the family has them
    moments: adamw.Moments
    step: Int[Array, ""]


class Metrics(NamedTuple):
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


def make(spec: Spec, params: Any) -> common.Program:
    loss = FAMILIES[spec.model.family].loss

    def train_step(state: State, frozen: None, batch: Batch) -> tuple[State, Metrics]:
        params, moments, step = state
        value, grads = jax.value_and_grad(loss)(params, batch.tokens[0], batch.targets[0], spec.model, spec.dtype)
        grad_norm = clipping.global_norm(grads)
        factor = clipping.factor(grad_norm, spec.optimizer.clip_norm)
        grads = jax.tree.map(lambda grad: grad * factor, grads)
        rate = schedules.learning_rate(step, WARM_UP + spec.steps, spec.optimizer)
        decays = family(spec.model).decays(grads)
        params, moments = adamw.update(params, moments, grads, decays, step, rate, spec.optimizer)
        return State(params, moments, step + 1), Metrics(value, grad_norm)

    state = State(params, adamw.init(params), jnp.int32(0))
    return common.Program(jax.jit(train_step, donate_argnums=0), state)


if __name__ == "__main__":
    common.run("jax.grad", make)
