"""Causal attention by cuDNN's fused kernels (Dao 2023, FlashAttention-2, arXiv:2307.08691).

The same function as `layers/attention.py`, but the scores never leave the chip:

    out, logsumexp = fused_forward(q, k, v)           ∂q, ∂k, ∂v = fused_backward(q, k, v, logsumexp, out, ∂out)

JAX has both as primitives behind `jax.nn.dot_product_attention`. They are bound here directly: forward with its
residuals, and backward by hand rather than through autodiff. (The public function would also round the logsumexp to the
activations' dtype.) They are of JAX's internals, so what differs between its versions is kept in this file.

What they take is in `choose.py`. The backward may add up ∂q in no fixed order, so that its last bits differ from run
to run: only with XLA's flag --xla_gpu_deterministic_ops=true is a kernel with a fixed order asked for.

Not yet run on a GPU: so far the program that is handed to XLA has been checked, not cuDNN's numbers. On a machine with
an NVIDIA GPU this compares it with `layers/attention.py`, forward and backward:

    python -m pytest tests/kernels/test_cudnn_attention.py
"""

import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jaxtyping import Array, Float, Float32


class Residuals(NamedTuple):
    """Residuals in the layout of forward's inputs: the kernels read (B, T, H, D) in place, so nothing is transposed."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    out: Float[Array, "B T H D"]
    logsumexp: Float32[Array, "B H T"]


@jax.named_scope("attention.forward")
def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    block: int,
    starts: None = None,
    window: int = 0,
    masks: None = None,
) -> tuple[Float[Array, "B T H D"], Residuals]:
    """Returns attention's output and its residuals.

    `block` is the option of `layers/attention.py`; cuDNN picks the sizes of its own tiles, so it changes nothing here.
    Documents (`starts`) and dropout (`masks`) aren't offered. The kernels take fewer key heads than query heads as they
    are, and a window.
    """
    out, logsumexp = cudnn._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *_absent(q), is_training=True, **_parameters(q, window)
    )
    return out, Residuals(q, k, v, out, logsumexp)


@jax.named_scope("attention.backward")
def backward(
    residuals: Residuals,
    dout: Float[Array, "B T H D"],
    *,
    block: int,
    starts: None = None,
    window: int = 0,
    masks: None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Returns (dq, dk, dv), in the dtype of dout. All options are forward's."""
    q, k, v, out, logsumexp = residuals
    gradients = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *_absent(q), logsumexp, out, dout.astype(q.dtype), **_parameters(q, window)
    )
    dq, dk, dv = (gradient.astype(dout.dtype) for gradient in gradients)
    return dq, dk, dv


def output(residuals: Residuals) -> Float[Array, "B T H D"]:
    """Forward's output, which its residuals hold."""
    return residuals.out


def with_inputs(residuals: Residuals, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]) -> Residuals:
    """Returns the residuals with queries and keys that were not kept, but computed again."""
    return residuals._replace(q=q, k=k)


def version() -> int | None:
    """Returns cuDNN's version as it counts it itself, 91002 for 9.10.2; None where there is no cuDNN."""
    try:
        return cudnn.check_cudnn_version()
    except RuntimeError:  # JAX's CUDA package is not installed
        return None


def _absent(q: Float[Array, "B T H D"]) -> list[Float[Array, "0"]]:
    """Returns empty arrays for what the primitives can take and attention here has none of.

    In their order: a bias, the lengths of queries and keys, offsets of packed sequences (two), page tables (two).
    """
    return [jnp.zeros(0, q.dtype)] * 7


def _parameters(q: Float[Array, "B T H D"], window: int) -> dict[str, Any]:
    """The primitives' parameters: causal, scores divided by √D, no bias, no dropout (the seed is then idle)."""
    parameters = {
        "scale": 1 / math.sqrt(q.shape[-1]),
        "mask_type": cudnn.MaskType.CAUSAL,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "variadic_args": (False, False),  # whether there are a bias and its gradient
        "dropout_rate": 0.0,
        "seed": 0,
        "sliding_window_length": window or None,
    }
    if "score_mod" in inspect.signature(cudnn._dot_product_attention_fwd_impl).parameters:  # not yet in JAX 0.10
        parameters["score_mod"] = None
    return parameters
