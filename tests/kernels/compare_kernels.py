"""cuDNN's attention, the one in Pallas and the blocks' beside the exact one, and the norms and the softmax in Pallas
beside the layers', on whatever device JAX finds. No test by itself: test_cudnn_attention.py runs it in a process of its
own where there is an NVIDIA GPU, and elsewhere calls its functions with a reference in the place of cuDNN's kernels.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.kernels import cudnn_attention, pallas_attention, pallas_norm, pallas_softmax
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.layers import attention, cross_entropy, layernorm, rmsnorm
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


def norm_errors(shape, dtype):
    """Returns the distance of the norms in Pallas from the layers in float32, by layer and name."""

    def run(layer, params, x, dy, past):
        kernels = layer is pallas_norm
        y, residuals = layer.forward(params, x, epsilon=1e-5)
        grads, dx = layer.backward(params, residuals, dy, *([past] if kernels else []))
        return y, *grads, dx if kernels else dx + past

    rng, errors = np.random.default_rng(0), {}
    for layer in (layernorm, rmsnorm):
        params = layer.Params(*(jnp.asarray(rng.standard_normal(shape[1]), jnp.float32) for _ in layer.Params._fields))
        arrays = [jnp.asarray(1 + rng.standard_normal(shape), dtype) for _ in range(3)]
        exact = run(layer, params, *(array.astype(jnp.float32) for array in arrays))
        found = jax.jit(lambda *arrays: run(pallas_norm, *arrays))(params, *arrays)
        for name, a, b in zip(("y", *layer.Params._fields, "dx"), found, exact, strict=True):
            errors[f"{layer.__name__.rpartition('.')[2]}.{name}"] = distance(
                *(np.asarray(x, np.float64) for x in (a, b))
            )
    return errors


def softmax_errors(shape, dtype):
    """Returns the distances of the losses and of the logits' gradient in Pallas from the layer's in float32."""
    rng = np.random.default_rng(0)
    logits, size = jnp.asarray(4 * rng.standard_normal(shape), jnp.float32), shape[1] - 7
    targets = jnp.asarray(rng.integers(0, size, shape[0]), jnp.int32)
    losses, residuals = cross_entropy.forward(logits, targets, vocabulary_size=size)
    exact = losses, cross_entropy.backward(residuals, jnp.ones_like(losses), vocabulary_size=size)
    found = jax.jit(lambda *arrays: pallas_softmax.forward(*arrays, vocabulary_size=size, dtype=dtype))(logits, targets)
    pairs = zip(("softmax.losses", "softmax.dlogits"), found, exact, strict=True)
    return {name: distance(*(np.asarray(x, np.float64) for x in pair)) for name, *pair in pairs}


def model_errors(compute, kernel="cudnn", option="attention", other="blocks"):
    """Returns the distance of the kernel's loss, and of each of a GPT-2's gradients, from the other's."""
    params = jax.tree.map(lambda array: array.astype(compute.dtype), gpt2.init(MODEL, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocabulary_size, (2, MODEL.context))
    tokens = jnp.asarray(tokens, jnp.int32)

    def run(name):
        chosen = dataclasses.replace(compute, **{option: name})
        step = jax.jit(lambda params: whole.loss_and_grads(params, tokens, jnp.roll(tokens, -1, 1), MODEL, chosen))
        return step(params)

    fused, blocks = (jax.tree.map(lambda array: np.asarray(array, np.float64), run(x)) for x in (kernel, other))
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
    return failed + compare_models(Compute(dtype=dtype, layers="unrolled"), limit, kernel)


def compare_kernels(dtype, limit):
    """Likewise for the norms and the softmax in Pallas."""
    compute = Compute(attention="blocks", kernels="pallas", dtype=dtype, layers="unrolled")
    try:
        choose_attention(MODEL, compute, MODEL.context)
    except UserError as error:
        print(error)
        return None
    failed = 0
    for shape in ((1, 8), (300, 768), (70, 5000)):
        for name, error in {**norm_errors(shape, dtype), **softmax_errors(shape, dtype)}.items():
            failed += not error < limit
            print(f"{shape!s:18} {name:16} {error:.1e}  limit {limit:.1e}")
    return failed + compare_models(compute, limit, "pallas", "kernels", "xla")


def compare_models(compute, limit, *names):
    """Prints how far a GPT-2's gradients are apart, and returns how often that is too far."""
    failed, dtype = 0, compute.dtype
    for recompute in ("none", "block"):
        errors = model_errors(dataclasses.replace(compute, recompute=recompute), *names)
        worst = max(errors, key=lambda name: errors[name])
        # Both are rounded, and in float32 a model's weights and norms add to what a kernel rounds.
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
        compare_kernels("float32", FLOAT32_LIMIT),
        compare_kernels("bfloat16", LIMIT),
    ]
    failures = [failed for failed in found if failed is not None]
    return 2 if not failures else int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
