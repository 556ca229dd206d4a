"""cuDNN's attention and the blocks' beside the exact one, on whatever device JAX finds. Not a test by itself:
test_cudnn_attention.py runs it in a process of its own where there is an NVIDIA GPU, and elsewhere calls its functions
with a reference in the place of cuDNN's kernels.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.kernels import cudnn_attention
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.layers import attention
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Model
from tests import whole

NAMES = ("out", "logsumexp", "dq", "dk", "dv")
SHAPES = [(2, 256, 3, 64), (1, 100, 2, 128), (3, 37, 1, 8)]  # B, T, H, D
MODEL = Model(layers=2, heads=2, width=128, context=96, vocabulary_size=200)
# In bfloat16, of 8 bits: relative to the norm, the weights, the output, δ and ∂s are rounded on the way, each by 2⁻⁹ at
# most, and the exact gradient is of inputs that were rounded before. 2⁻⁶ is several times their sum.
LIMIT = 2.0**-6


def attend(layer, q, k, v, dout):
    """What NAMES says, from one layer."""

    def run(q, k, v, dout):
        out, residuals = layer.forward(q, k, v, block=64)
        return out, residuals.logsumexp, *layer.backward(residuals, dout, block=64)

    return [np.asarray(array, np.float64) for array in jax.jit(run)(q, k, v, dout)]


def distance(actual, exact):
    """The norm of the difference, relative to the exact one's."""
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


def layer_errors(shape, dtype):
    """For each of NAMES: (cuDNN's distance from blocks in float32, the blocks' own in `dtype`)."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]
    exact = attend(attention, *(array.astype(jnp.float32) for array in arrays))
    fused, blocks = attend(cudnn_attention, *arrays), attend(attention, *arrays)
    return {name: (distance(a, c), distance(b, c)) for name, a, b, c in zip(NAMES, fused, blocks, exact, strict=True)}


def model_errors(compute):
    """For the loss and each tensor's gradient of a GPT-2: the distance of cuDNN's from the blocks'."""
    params = jax.tree.map(lambda array: array.astype(compute.dtype), gpt2.init(MODEL, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocabulary_size, (2, MODEL.context))
    tokens = jnp.asarray(tokens, jnp.int32)

    def run(attention):
        chosen = dataclasses.replace(compute, attention=attention)
        step = jax.jit(lambda params: whole.loss_and_grads(params, tokens, jnp.roll(tokens, -1, 1), MODEL, chosen))
        return step(params)

    fused, blocks = (jax.tree.map(lambda array: np.asarray(array, np.float64), run(x)) for x in ("cudnn", "blocks"))
    return {
        jax.tree_util.keystr(path): distance(a, b)
        for (path, a), b in zip(jax.tree.leaves_with_path(fused), jax.tree.leaves(blocks), strict=True)
    }


def main() -> int:
    """0 where all agree, 1 where not, 2 where cuDNN's kernel can't run."""
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        choose_attention(MODEL, Compute(attention="cudnn", dtype="bfloat16"), MODEL.context)
    except UserError as error:
        print(error)
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, cuDNN {cudnn_attention.version()}")
    failed = 0
    for shape in SHAPES:
        for name, (fused, blocks) in layer_errors(shape, jnp.bfloat16).items():
            failed += not fused < LIMIT
            print(f"{shape!s:18} {name:10} cuDNN {fused:.1e}  blocks {blocks:.1e}  limit {LIMIT:.1e}")
    for recompute in ("none", "block"):
        errors = model_errors(Compute(dtype="bfloat16", recompute=recompute, layers="unrolled"))
        worst = max(errors, key=lambda name: errors[name])
        failed += not errors[worst] < 2 * LIMIT  # both are rounded
        print(f"gpt2, recompute {recompute}: at most {errors[worst]:.1e}, in {worst}; limit {2 * LIMIT:.1e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
