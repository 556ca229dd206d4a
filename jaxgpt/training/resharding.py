"""Resharding of the train state: between its layout on several devices and that of a checkpoint.

A checkpoint has whole tensors with layers stacked, whatever the ZeRO stage and the number of devices, so that a run may
resume with others. In between each tensor is sharded over the devices along its first axis that divides, so that none
of them needs room for all of it. On one device the state is already what is saved (`checkpoints.saved_form`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxgpt.models import lora, with_scalar
from jaxgpt.models.blocks import Params, arrange, cast, matrices, stacked
from jaxgpt.options.config import Config
from jaxgpt.parallel.sharding import first_axis_that_divides
from jaxgpt.training.state import TrainState, initial_state, layout_of, on_trees, shardings, specs, state_shapes


class Resharding:
    """Moves the train state between its sharded and its checkpoint layout. Programs are compiled at their first use."""

    def __init__(self, config: Config):
        self.layout = layout_of(config)
        layout, mesh = self.layout, self.layout.mesh
        self._config = config
        self._shapes = state_shapes(config)
        self._own = shardings(layout, config)
        if layout.devices == 1:
            return

        def joined(state: TrainState) -> TrainState:
            return on_trees(lambda pieces: stacked(layout.unshard(pieces)), state)

        def split(state: TrainState) -> TrainState:
            return on_trees(lambda whole: layout.shard(arrange(whole, config.compute)), state)

        shapes = jax.eval_shape(joined, self._shapes)
        everywhere = NamedSharding(mesh, PartitionSpec())
        between = jax.tree.map(lambda _: everywhere, shapes)
        between = on_trees(
            lambda tree: jax.tree.map(lambda shape: first_axis_that_divides(shape, mesh), tree),
            between._replace(params=shapes.params, moments=shapes.moments),
        )
        self._saved = jax.tree.map(lambda shape, sharding: shape.update(sharding=sharding), shapes, between)
        self._join = jax.jit(joined, out_shardings=between)
        self._split = jax.jit(split, out_shardings=self._own)

        def whole(params: Params, dtype: DTypeLike) -> Params:
            return layout.unshard(cast(params, dtype, matrices(layout.shapes)))

        self._whole = jax.jit(whole, static_argnums=1, out_shardings=everywhere)

    def words(self) -> list[str]:
        """Returns the lines to print of it at the start of a run."""
        if self.layout.devices == 1:
            return []
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return [f"parallel  {self.layout.devices} devices{processes}, ZeRO stage {self.layout.zero}"]

    def first_state(self, params: Params | None = None) -> TrainState:
        """Returns the state before the first step, of whole, stacked parameters in NumPy's memory or random ones."""
        return initial_state(self._config, None if params is None else self.placed(params))

    def placed(self, whole: Params) -> Params:
        """Casts, shards and places whole parameters on the devices."""
        dtype, layout = self._config.compute.parameters, self.layout
        if layout.devices == 1:  # a copy: the step gives its memory to the next state
            arranged = arrange(whole, self._config.compute)
            return jax.tree.map(lambda array: jnp.array(array, dtype), arranged)

        def split(whole: Params) -> Params:
            pieces = layout.shard(arrange(whole, self._config.compute))
            return jax.tree.map(lambda array: array.astype(dtype), pieces)

        between = jax.tree.map(lambda shape: shape.sharding, self._saved.params)
        placed = jax.jit(split, out_shardings=layout.shardings(specs(layout).params))
        return placed(jax.device_put(whole, between))

    def to_save(self, state: TrainState) -> TrainState:
        """Returns the state in its checkpoint layout, all of it on the devices."""
        if self._config.parallel.moments == "host":  # programs that put tensors together take them from there
            on_device = jax.tree.map(lambda where: where.with_memory_kind("device"), self._own)
            state = jax.device_put(state, on_device)
        return state if self.layout.devices == 1 else self._join(state)

    def saved_shapes(self) -> TrainState:
        """Shapes of the checkpoint layout, with the shardings in which it is to be read."""
        return self._shapes if self.layout.devices == 1 else self._saved

    def from_saved(self, state: TrainState) -> TrainState:
        """Returns the state to resume with, from what was read into `saved_shapes`."""
        if self.layout.devices == 1:
            return state if self._own is None else jax.device_put(state, self._own)
        return self._split(state)

    def placed_base(self, base: Params) -> Params:
        """Returns the frozen base of adapters on the devices, whole on each, from whole, stacked parameters."""
        frozen = lora.freeze(base, self._config.lora, self._config.compute)
        if self.layout.devices == 1:
            return frozen
        everywhere = NamedSharding(self.layout.mesh, PartitionSpec())
        return jax.tree.map(lambda array: jax.device_put(np.asarray(array), everywhere), frozen)

    def whole_params_on_each(
        self, state: TrainState, frozen: Any = None, most: int | None = None, dtype: str = ""
    ) -> list[Params]:
        """All-gathers the parameters to draw text from, on each of this process's devices, or on the first `most`.

        Of shards they have the dtype that is named, so that no more is gathered than is drawn with; else their own.

        Adapters are merged into their base, in the compute dtype. All processes have to call it together, and each may
        then compute with the result by itself.
        """
        config = self._config
        dtype = dtype or config.compute.parameters
        whole = self._whole(state.params, dtype) if self.layout.sharded else state.params

        def merge(adapters: Params, base: Params) -> Params:
            return lora.merge(adapters, base, config.model, config.lora, config.compute.dtype)

        def on(place: int) -> Params:
            params, base = jax.tree.map(lambda array: array.addressable_data(place), (whole, frozen))
            return params if base is None else with_scalar.on_model(functools.partial(merge, base=base), params)

        return [on(place) for place in range(len(self.layout.own_devices))[:most]]
