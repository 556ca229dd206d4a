"""cuDNN's attention, the one in Pallas and the blocks' beside the exact one, on whatever device JAX finds. No test by
itself: test_cudnn_attention.py runs it in a process of its own where there is an NVIDIA GPU, and elsewhere calls its
functions with a reference in the place of cuDNN's kernels.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.kernels import cudnn_attention, pallas_attention
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
# In float32 at the highest precision, of 24 bits, whose sums have some 256 terms.
FLOAT32_LIMIT = 2.0**-16


def attend(layer, q, k, v, dout):
    """Returns one layer's outputs and gradients, in the order of NAMES."""

    def run(q, k, v, dout):
        out, residuals = layer.forward(q, k, v, block=64)
        return out, residuals.logsumexp, *layer.backward(residuals, dout, block=64)

    return [np.asarray(array, np.float64) for array in jax.jit(run)(q, k, v, dout)]


def distance(actual, exact):
    """The norm of the difference, relative to the exact one's."""
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


def layer_errors(shape, dtype, layer=cudnn_attention):
    """Returns by name: (the layer's distance from blocks in float32, the blocks' own in `dtype`)."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]
    exact = attend(attention, *(array.astype(jnp.float32) for array in arrays))
    fused, blocks = attend(layer, *arrays), attend(attention, *arrays)
    return {name: (distance(a, c), distance(b, c)) for name, a, b, c in zip(NAMES, fused, blocks, exact, strict=True)}


def model_errors(compute, kernel="cudnn"):
    """Returns the distance of the kernel's loss, and of each of a GPT-2's gradients, from the blocks'."""
    params = jax.tree.map(lambda array: array.astype(compute.dtype), gpt2.init(MODEL, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocabulary_size, (2, MODEL.context))
    tokens = jnp.asarray(tokens, jnp.int32)

    def run(attention):
        chosen = dataclasses.replace(compute, attention=attention)
        step = jax.jit(lambda params: whole.loss_and_grads(params, tokens, jnp.roll(tokens, -1, 1), MODEL, chosen))
        return step(params)

    fused, blocks = (jax.tree.map(lambda array: np.asarray(array, np.float64), run(x)) for x in (kernel, "blocks"))
    return {
        jax.tree_util.keystr(path): distance(a, b)
        for (path, a), b in zip(jax.tree.leaves_with_path(fused), jax.tree.leaves(blocks), strict=True)
    }


def compare(kernel, layer, dtype, limit):
    """Prints how far a kernel is from what is exact, and returns how often that is too far; None where it can't run."""
    try:
        choose_attention(MODEL, Compute(attention=kernel, dtype=dtype), MODEL.context)
    except UserError as error:
        print(error)
        return None
    failed = 0
    for shape in SHAPES:
        for name, (fused, blocks) in layer_errors(shape, dtype, layer).items():
            failed += not fused < limit
            print(f"{shape!s:18} {name:10} {kernel} {fused:.1e}  blocks {blocks:.1e}  limit {limit:.1e}")
    for recompute in ("none", "block"):
        errors = model_errors(Compute(dtype=dtype, recompute=recompute, layers="unrolled"), kernel)
        worst = max(errors, key=lambda name: errors[name])
        # Both are rounded, and in float32 a model's weights and norms add to what attention rounds.
        allowed = 2 * limit if dtype == "bfloat16" else 8 * limit
        failed += not errors[worst] < allowed
        print(f"gpt2 in {dtype}, recompute {recompute}: at most {errors[worst]:.1e}, in {worst}; limit {allowed:.1e}")
    return failed


def main() -> int:
    """0 where all agree, 1 where not, 2 where no kernel can run."""
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, cuDNN {cudnn_attention.version()}")
    found = [
        compare("pallas", pallas_attention, "float32", FLOAT32_LIMIT),
        compare("pallas", pallas_attention, "bfloat16", LIMIT),
        compare("cudnn", cudnn_attention, "bfloat16", LIMIT),
    ]
    failures = [failed for failed in found if failed is not None]
    return 2 if not failures else int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
