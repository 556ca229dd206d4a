"""The oracle of a compiled step: `jax.grad` of the objective's forward, in float64 on a CPU, at the step's own inputs.

The step's parameters are cast as it casts them, a bfloat16's to bfloat16, and only then widened: what differs is the
arithmetic and the backward, and nothing else. Attention runs in blocks here and layers are scanned, whatever the step
does, since neither changes what is computed.

A step's loss is a sum over the parts that its devices compute with, one micro-batch after another. A family's own loss
(a router's balance) is one of such a part, so the oracle sums over the same parts.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.layers import quantised
from jaxgpt.layers.dropout import Masks
from jaxgpt.models import family, lora, with_scalar
from jaxgpt.models.blocks import Context, are_stacked, cast, matrices
from jaxgpt.objectives import objective
from jaxgpt.options.config import Compute, Config
from jaxgpt.parallel import mesh

Tree = Any  # a pytree of NumPy arrays


class Truth(NamedTuple):
    """The loss and its gradients by every trained tensor, in float64, with layers stacked."""

    loss: float
    grads: Tree


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Computes on the CPU in 64 bits for the length of a block. UserError where JAX may not use the CPU."""
    with jax.enable_x64(True), jax.default_device(_cpu()), jax.default_matmul_precision("highest"):
        yield


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "jax.grad runs in float64 on the CPU, and $JAX_PLATFORMS doesn't name it: add cpu, as in "
            "JAX_PLATFORMS=cuda,cpu"
        ) from None


def make_oracle(config: Config) -> Callable[..., Truth]:
    """Returns the function (params, frozen, batch, key of the masks) to the `Truth` of a whole step's batch.

    Its arguments are NumPy's: whole parameters with layers stacked, as `rounded` has them, the base of adapters as
    `rounded_base` has it or None, the batch of all micro-batches and devices, and the masks' key in words, or None.
    """
    program = jax.jit(jax.value_and_grad(_make_loss(config)))
    minimised, pieces = objective(config), _pieces(config)

    def oracle(params: Tree, frozen: Tree, batch: Any, key: Any = None) -> Truth:
        loss, grads = 0.0, jax.tree.map(np.zeros_like, params)
        with in_float64():
            scale = 1 / np.maximum(np.float64(minimised.count(jax.tree.map(_wide, batch))), 1)
            on_device = jax.tree.map(jnp.asarray, (params, frozen))
            for at, rows, places in pieces:
                piece = jax.tree.map(lambda array, at=at, rows=rows: _wide(array[at, rows]), batch)
                value, found = program(*on_device, piece, scale, places, key)
                loss += float(value)
                for total, part in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
                    total += np.asarray(part)
        return Truth(loss, grads)

    return oracle


def _make_loss(config: Config) -> Callable[..., Any]:
    model, training = config.model, config.training
    tokens = training.batch_size * training.sequence_length
    compute = Compute(  # whatever else `compute` says is how, and not what, a step computes
        classifier_chunk=min(config.compute.classifier_chunk, tokens),
        attention_block=config.compute.attention_block,
        attention="blocks",
        recompute="none",
        layers="scanned",
    )
    context, minimised, module = Context(model, compute, objective=config.objective), objective(config), family(model)

    def loss(params: Tree, frozen: Tree, batch: Any, scale: Any, places: Any, key: Any) -> Any:
        if config.lora.rank:
            params = attached(params, frozen, config)
        masks = None if key is None else Masks(jax.random.wrap_key_data(key), places, model.dropout)
        return minimised.loss(module, params, batch, context._replace(masks=masks), scale=scale)

    return loss


def attached(params: Tree, frozen: Tree, config: Config) -> Tree:
    """Returns a family's parameters, with the objective's scalar head, from whole adapters and their base."""
    return with_scalar.on_model(
        lambda adapters: lora.attach(adapters, frozen, config.model, config.lora, jnp.float64), params
    )


def _pieces(config: Config) -> list[tuple[int, slice, np.ndarray]]:
    """Returns the parts that the step's loss is a sum over: the micro-batch, its rows, and their places for masks."""
    training, parallel = config.training, config.parallel
    count = mesh.SHARDS if parallel.reproducible else mesh.make(parallel).size
    each = training.batch_size // count
    return [
        (
            at,
            slice(part * each, (part + 1) * each),
            np.arange(each, dtype=np.int32) + at * training.batch_size + part * each,
        )
        for at in range(training.micro_batches)
        for part in range(count)
    ]


def _wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64) if np.issubdtype(array.dtype, np.floating) else np.asarray(array)


def rounded(params: Tree, config: Config) -> Tree:
    """Returns whole, stacked parameters as the model computes with them, and then in float64."""
    with jax.default_device(_cpu()):  # a large model's would take an accelerator's memory
        params = jax.tree.map(lambda array: jnp.asarray(array, config.compute.parameters), params)
        params = cast(params, config.compute.dtype, matrices(params))
    return jax.tree.map(_to_float64, params)


def rounded_base(base: Tree, config: Config) -> Tree:
    """Returns the base of adapters, from whole, stacked weights, as the model computes with it, and then in float64."""
    dtype, frozen = config.compute.dtype, lora.freeze(base, config.lora, Compute(dtype=config.compute.dtype))
    ends, gather = cast(frozen._replace(blocks=()), dtype), lora.gather(frozen, dtype)
    if are_stacked(frozen.blocks):
        layers = [jax.tree.map(lambda stack, at=at: stack[at], frozen.blocks) for at in range(config.model.layers)]
    else:
        layers = list(frozen.blocks)
    blocks = [jax.tree.map(_to_float64, gather(layer), is_leaf=quantised.is_quantised) for layer in layers]
    whole = jax.tree.map(_to_float64, ends)
    return whole._replace(blocks=jax.tree.map(lambda *leaves: np.stack(leaves), *blocks))


def _to_float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
