"""Measured error of products of 8 bits: how far a batch's gradient is from that by products in the compute dtype.

    error of a tensor = ‖a - b‖ / ‖b‖           a by products of 8 bits, b without, both by the same parameters

Of the norms that follow in the block, and of the tables, the gradients come through these products too, so all tensors
are compared. Both gradients are of one micro-batch, without dropout, and are in memory together: the memory plan counts
the second. The programs are apart from the train step's, and are compiled when they are first used.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxgpt.data.loader import Batch
from jaxgpt.models import fp8
from jaxgpt.models.blocks import Params, are_stacked
from jaxgpt.options.config import Config
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training import fp8 as scales
from jaxgpt.training import step
from jaxgpt.training.state import TrainState, layout_of, specs

WHOLE = PartitionSpec()


class Gauge:
    """Measures a run's products of 8 bits on batches of its train step, with the state of the moment."""

    def __init__(self, config: Config):
        self.config, self.layout = config, layout_of(config)

    def calibrated(self, state: TrainState, frozen: Any, batch: Batch) -> TrainState:
        """Returns the state with the magnitudes that this batch has, where its history is empty."""
        history = state.magnitudes
        if history is None or bool(jnp.any(history > 0)):
            return state
        _, seen = self._gradients(state.params, frozen, _first(batch), None)
        return state._replace(magnitudes=self._filled(history, seen))

    def errors(self, state: TrainState, frozen: Any, batch: Batch) -> dict[str, float]:
        """Returns the errors of all gradients together, of each kind of product over all layers, and the largest of one
        tensor, by their names in metrics.jsonl.
        """
        first, largest = _first(batch), scales.expected(state.magnitudes)
        a, _ = self._gradients(state.params, frozen, first, largest)
        b, _ = self._exact(state.params, frozen, first, None)
        return {name: float(value) for name, value in jax.device_get(self._compared(a, b)).items()}

    @functools.cached_property
    def _gradients(self) -> Any:
        return _program(self.config, self.layout)

    @functools.cached_property
    def _exact(self) -> Any:
        compute = dataclasses.replace(self.config.compute, products="dtype")
        return _program(dataclasses.replace(self.config, compute=compute), self.layout)

    @functools.cached_property
    def _filled(self) -> Any:
        spec = self.layout.shardings(WHOLE)
        return jax.jit(lambda history, seen: scales.update(history, seen, jnp.bool_(True)), out_shardings=spec)

    @functools.cached_property
    def _compared(self) -> Any:
        layout = self.layout
        grads = layout.specs()
        compare = functools.partial(errors, layout=layout)
        return layout.jit(compare, in_specs=(grads, grads), out_specs=WHOLE)


def _first(batch: Batch) -> Batch:
    """Returns the first micro-batch."""
    return jax.tree.map(lambda array: array[:1], batch)


def _program(config: Config, layout: Layout) -> Any:
    """Jits (parameters, frozen, batch, largest) to the gradient and the magnitudes that were seen."""

    def gradients(params: Params, frozen: Any, batch: Batch, largest: Any) -> tuple[Params, Any]:
        _, _, grads = step.batch_loss_and_grads(params, frozen, batch, config, layout, None, largest)
        return fp8.detach(grads)

    params = specs(layout).params
    options = step.compiler_options(config.compute, layout.devices)
    return layout.jit(
        gradients,
        in_specs=(params, WHOLE, step.BATCH_SPEC, WHOLE),
        out_specs=(params, WHOLE),
        compiler_options=options,
    )


def errors(a: Params, b: Params, *, layout: Layout) -> dict[str, Float[Array, ""]]:
    """Returns the errors of this device's shards of gradients, by their names."""

    def squares(one: Params) -> Params:
        return jax.tree.map(lambda array: layout.total_of_shards(jnp.sum(jnp.square(array))), one)

    def by_layer(one: Params) -> dict[str, Float[Array, " L"]]:
        blocks: Any = one.blocks
        stacks = [getattr(blocks, name).weight for name in names] if are_stacked(blocks) else None
        if stacks is None:
            stacks = [jnp.stack([getattr(block, name).weight for block in blocks]) for name in names]
        sums = [jnp.sum(jnp.square(stack), axis=range(1, stack.ndim)) for stack in stacks]
        return dict(zip(names, map(layout.total_of_shards, sums), strict=True))

    names = fp8.products(a.blocks)
    apart = jax.tree.map(jnp.subtract, a, b)
    whole = [jnp.sum(jnp.stack(jax.tree.leaves(squares(one)))) for one in (apart, b)]
    tensors, sizes = by_layer(apart), by_layer(b)
    each = {name: (jnp.sum(tensors[name]), jnp.sum(sizes[name])) for name in names}
    largest = jnp.max(jnp.stack([tensors[name] / _not_zero(sizes[name]) for name in names]))
    found = {"fp8_error": jnp.sqrt(whole[0] / _not_zero(whole[1])), "fp8_error_largest": jnp.sqrt(largest)}
    return found | {f"fp8_error_{name}": jnp.sqrt(error / _not_zero(size)) for name, (error, size) in each.items()}


def _not_zero(size: Float[Array, "*L"]) -> Float[Array, "*L"]:
    return jnp.where(size > 0, size, 1)
