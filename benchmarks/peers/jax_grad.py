"""The automatic way: GPT-2 as one writes it in JAX when `jax.value_and_grad` does the rest.

Layers scanned, or written out where the parameters are apart; JAX's own attention over the whole T×T square; all logits
at once. The parameters are this project's, as are the few lines of AdamW and clipping, so that what is compared is the
gradients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from benchmarks.peers import common
from benchmarks.peers.spec import WARM_UP, Spec
from jaxgpt.data.loader import Batch
from jaxgpt.layers import layernorm, linear
from jaxgpt.models import gpt2
from jaxgpt.optimizers import adamw, clipping, schedules
from jaxgpt.options.config import Model


class State(NamedTuple):
    params: gpt2.Params
    moments: adamw.Moments
    step: Int[Array, ""]


class Metrics(NamedTuple):
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


def norm(params: layernorm.Params, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    """Layer normalisation, in float32."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.var(wide, axis=-1, keepdims=True)
    return ((wide - mean) * lax.rsqrt(variance + 1e-5) * params.scale + params.bias).astype(x.dtype)


def dense(params: linear.Params, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
    assert params.bias is not None
    return x @ params.weight + params.bias


def block(params: gpt2.Block, x: Float[Array, "B T C"], heads: int) -> Float[Array, "B T C"]:
    batch, length, width = x.shape
    qkv = dense(params.qkv, norm(params.attention_norm, x)).reshape(batch, length, 3, heads, width // heads)
    # cuDNN's kernel takes no float32; elsewhere JAX has but the one form.
    fused = jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16
    mixed = jax.nn.dot_product_attention(
        qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True, implementation="cudnn" if fused else "xla"
    )
    x = x + dense(params.attention_out, mixed.reshape(x.shape))
    hidden = jax.nn.gelu(dense(params.mlp_in, norm(params.mlp_norm, x)), approximate=True)
    return x + dense(params.mlp_out, hidden)


def loss(
    params: gpt2.Params, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], model: Model, dtype: str
) -> Float[Array, ""]:
    """Mean cross-entropy. The parameters are float32; the activations, and the weights they meet, of `dtype`."""
    params = jax.tree.map(lambda array: array.astype(dtype), params)
    assert params.embedding.position is not None
    x = params.embedding.token[tokens] + params.embedding.position[: tokens.shape[1]]
    if isinstance(params.blocks, gpt2.Block):  # stacked
        x, _ = lax.scan(lambda x, layer: (block(layer, x, model.heads), None), x, params.blocks)
    else:
        for layer in params.blocks:
            x = block(layer, x, model.heads)
    logits = (norm(params.final_norm, x) @ params.embedding.token.T).astype(jnp.float32)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < model.vocabulary_size, logits, -jnp.inf)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - at_target)


def make(spec: Spec, params: gpt2.Params) -> common.Program:
    def train_step(state: State, frozen: None, batch: Batch) -> tuple[State, Metrics]:
        params, moments, step = state
        value, grads = jax.value_and_grad(loss)(params, batch.tokens[0], batch.targets[0], spec.model, spec.dtype)
        grad_norm = clipping.global_norm(grads)
        factor = clipping.factor(grad_norm, spec.optimizer.clip_norm)
        grads = jax.tree.map(lambda grad: grad * factor, grads)
        rate = schedules.learning_rate(step, WARM_UP + spec.steps, spec.optimizer)
        decays = gpt2.decays(grads)
        params, moments = adamw.update(params, moments, grads, decays, step, rate, spec.optimizer)
        return State(params, moments, step + 1), Metrics(value, grad_norm)

    state = State(params, adamw.init(params), jnp.int32(0))
    return common.Program(jax.jit(train_step, donate_argnums=0), state)


if __name__ == "__main__":
    common.run("jax.grad", make)
