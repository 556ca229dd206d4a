"""GPT-2 as usually written in JAX, differentiated by `jax.value_and_grad`."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxgpt.layers import layernorm, linear
from jaxgpt.models import gpt2
from jaxgpt.options.config import Model


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
    """Mean cross-entropy. The parameters are float32; activations, and the weights in products with them, are
    `dtype`."""
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
