"""Scales of 8-bit products from step to step: the largest magnitude that each factor had in the last W steps.

Delayed scaling (Micikevicius et al. 2022, arXiv:2209.05433; as NVIDIA's Transformer Engine has it): a step scales each
tensor by the largest of these, so that a tensor is rounded while it is read for the first time, and its own magnitude
is for the steps to come. A tensor that outgrows all of them by more than its scale has room for is clamped in that
step, and counted. A step that is skipped leaves the history as it is, as all of the state; and magnitudes that aren't
finite never get into it. Over micro-batches and devices a magnitude is the largest of all, so that all have one scale.

Before the first step the history is empty, and `fp8_error.calibrate` fills it from the first batch.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgpt.layers import fp8
from jaxgpt.models.blocks import Params, are_stacked
from jaxgpt.models.fp8 import Largest, products
from jaxgpt.options.config import Compute

History = Float[Array, "W L P 3"]  # the newest first; 0 before there were so many steps


def init(params: Params, compute: Compute) -> History | None:
    """Returns the empty history of these parameters' products; None where nothing is scaled by one."""
    if compute.products != "fp8" or compute.fp8_scaling != "delayed":
        return None
    blocks: Any = params.blocks
    first = getattr(blocks if are_stacked(blocks) else blocks[0], (names := products(blocks))[0]).weight
    layers = first.shape[0] if are_stacked(blocks) else len(blocks)
    return jnp.zeros((compute.fp8_history, layers, len(names), 3), jnp.float32)


def expected(history: History | None) -> Largest | None:
    """Returns the magnitudes by which the next step scales."""
    return None if history is None else jnp.max(history, axis=0)


def update(history: History, seen: Largest, taken: Bool[Array, ""]) -> History:
    """Returns the history after a step that saw these magnitudes; without `taken` as it was."""
    newest = jnp.where(jnp.isfinite(seen), seen, history[0]).astype(history.dtype)
    return jnp.where(taken, jnp.concatenate([newest[None], history[:-1]]), history)


def clamped(largest: Largest, seen: Largest) -> Int[Array, ""]:
    """Returns the number of tensors that had numbers beyond what their scales, for `largest`, have room for."""
    limits = jnp.stack([_limit(largest[..., place], form) for place, form in enumerate(_FORMS)], axis=-1)
    return jnp.sum(seen > limits)


def _limit(largest: Float[Array, "L P"], form: Any) -> Float[Array, "L P"]:
    return fp8.scale_of(largest, form) * float(jnp.finfo(form).max)


_FORMS = (fp8.E4M3, fp8.E4M3, fp8.E5M2)  # of x, w and ∂y
