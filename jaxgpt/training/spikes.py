"""Steps that go wrong: spikes of the loss and of the gradient's norm, and advice where one is NaN or infinite.

A spike is found by its z-score within the last steps (after llm.c's detector):

    z = (x - μ) / σ        μ, σ = mean and standard deviation of the last W values, of which x is the newest

z is NaN until W values came before x, and 0 where all values are equal. Since x is itself among the W values, z is at
most √(W-1).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.options.config import SPIKE_WINDOW, Config


class Window(NamedTuple):
    """The last W values, in a ring: value number i, counted from 0, is in place i mod W."""

    values: Float[Array, "W"]
    count: Int[Array, ""]  # values ever seen


def init(size: int = SPIKE_WINDOW) -> Window:
    """Returns an empty window of W = `size` values."""
    return Window(jnp.zeros(size, jnp.float32), jnp.int32(0))


def update(window: Window, value: Float[Array, ""], take: Bool[Array, ""]) -> tuple[Window, Float[Array, ""]]:
    """Returns the window with the value and the value's z-score; without `take` the window as it was, and NaN."""
    size = window.values.shape[0]
    values = window.values.at[window.count % size].set(value)
    above = value - values  # so that equal values give exactly 0
    mean = jnp.mean(above)
    deviation = jnp.sqrt(jnp.mean(jnp.square(above - mean)))
    z = mean / jnp.where(deviation > 0, deviation, 1)
    new = Window(jnp.where(take, values, window.values), window.count + take)
    return new, jnp.where(take & (window.count >= size), z, jnp.nan)


def is_spike(z: Float[Array, ""], threshold: float) -> Bool[Array, ""]:
    """Returns whether z is above the threshold; never where that is 0, nor where z is NaN."""
    return z > threshold if threshold else jnp.zeros_like(z, bool)


def advice_after_nonfinite(config: Config, step: int) -> str:
    """Returns options that may help where the loss or a gradient is NaN or infinite at this step, as a phrase.

    No option that is off is to be made smaller, and none is advised that is set so already. A warm-up that ended long
    ago had no part in it.
    """
    optimizer, compute = config.optimizer, config.compute
    tries = [f"a lower --optimizer.learning-rate (it is {optimizer.learning_rate:g})"]
    if not optimizer.warmup_steps:
        tries.append("--optimizer.warmup-steps, of which there are none")
    elif step <= 2 * optimizer.warmup_steps:
        tries.append(f"a longer --optimizer.warmup-steps (it is {optimizer.warmup_steps})")
    if optimizer.clip_norm:
        tries.append(f"a smaller --optimizer.clip-norm (it is {optimizer.clip_norm:g})")
    else:
        tries.append("--optimizer.clip-norm 1, since gradients are not clipped")
    if compute.dtype != "float32":
        tries.append("--compute.dtype float32")
    if compute.parameters != "float32":
        tries.append("--compute.parameters float32")
    return f"{', '.join(tries[:-1])} or {tries[-1]}"
