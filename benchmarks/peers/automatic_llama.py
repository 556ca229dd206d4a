"""Llama as usually written in JAX, differentiated by `jax.value_and_grad`."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.layers import rmsnorm
from jaxgpt.models import llama
from jaxgpt.options.config import Model


def norm(params: rmsnorm.Params, x: Float[Array, "*batch C"], epsilon: float) -> Float[Array, "*batch C"]:
    """Root mean square normalisation, in float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale * params.scale).astype(x.dtype)


def turned(x: Float[Array, "B T H D"], base: float) -> Float[Array, "B T H D"]:
    """Rotary positions, with pairs half a head apart."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def block(params: llama.Block, x: Float[Array, "B T C"], model: Model) -> Float[Array, "B T C"]:
    batch, length, _ = x.shape
    H, K, D = model.heads, model.key_value_heads, model.width_per_head
    qkv = norm(params.attention_norm, x, model.norm_epsilon) @ params.qkv.weight
    q, k, v = jnp.split(qkv.reshape(batch, length, H + 2 * K, D), (H, H + K), axis=2)
    # cuDNN's kernel takes no float32; elsewhere JAX has but the one form.
    fused = jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16
    mixed = jax.nn.dot_product_attention(
        turned(q, model.rope_base),
        turned(k, model.rope_base),
        v,
        is_causal=True,
        local_window_size=(model.window - 1, 0) if model.window else None,
        implementation="cudnn" if fused else "xla",
    )
    x = x + mixed.reshape(batch, length, H * D) @ params.attention_out.weight
    gate, up = jnp.split(norm(params.mlp_norm, x, model.norm_epsilon) @ params.mlp_in.weight, 2, axis=-1)
    return x + (jax.nn.silu(gate) * up) @ params.mlp_out.weight


def loss(
    params: llama.Params, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], model: Model, dtype: str
) -> Float[Array, ""]:
    """Mean cross-entropy. The parameters are float32; activations, and the weights in products with them, are
    `dtype`."""
    params = jax.tree.map(lambda array: array.astype(dtype), params)
    x = params.embedding.token[tokens]
    if isinstance(params.blocks, llama.Block):  # stacked
        x, _ = lax.scan(lambda x, layer: (block(layer, x, model), None), x, params.blocks)
    else:
        for layer in params.blocks:
            x = block(layer, x, model)
    head = params.embedding.token if params.head is None else params.head.weight
    logits = (norm(params.final_norm, x, model.norm_epsilon) @ head.T).astype(jnp.float32)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < model.vocabulary_size, logits, -jnp.inf)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - at_target)
