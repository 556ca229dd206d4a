"""One optimizer step, as one jitted function of arrays.

    state, metrics = train_step(state, frozen, batch)

`state.params` are the parameters that are trained, and `frozen` those that are not, None where all are trained.
Gradients, moments and checkpoints have only what is trained. The state is donated: its buffers become the new state's.

A loop over the micro-batches of a batch sums their gradients in float32. Each is weighted by 1/(number of targets in
the whole batch), so that the sum is the gradient of the whole batch's mean however it is cut. A step whose
loss or gradient is not finite, or is a spike (`spikes.py`), changes neither parameters nor moments. After
`stop_after_nonfinite` steps in a row that were not finite no step changes anything, so that steps that were already
dispatched when the loop reads of it leave the last good state alone.

Dropout's masks depend on the state's key, the step's number, and each sequence's place among all of the step's: they
are the same on any number of devices and micro-batches, and after the run was resumed.

On several devices the step is one `shard_map`: each device runs this on its part of every micro-batch's sequences, and
the collectives are in `layout`'s functions (`parallel/sharding.py`). All else is the same on each of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgpt import optimizers
from jaxgpt.data.loader import Batch
from jaxgpt.layers.dropout import Masks
from jaxgpt.models import family, fp8
from jaxgpt.models.blocks import Params
from jaxgpt.objectives import objective
from jaxgpt.optimizers import clipping, muon, schedules
from jaxgpt.options.config import Compute, Config
from jaxgpt.parallel import mesh, sharding
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training import fp8 as scales
from jaxgpt.training import host_memory, spikes
from jaxgpt.training.state import (
    TrainState,
    decays,
    frozen_shapes,
    layout_of,
    shardings,
    specs,
    state_shapes,
    trained,
    working,
)

BUCKET = 32 << 20  # bytes of gradients that are reduced together; a layer of GPT-2 124M has 28 MB
DROPOUT = 1 << 31  # folded into the state's key for masks; rounding folds in steps, which are below it
WHOLE = PartitionSpec()
BATCH_SPEC = PartitionSpec(None, mesh.AXIS)  # of (A, B, T): the sequences are divided among the devices


class Metrics(NamedTuple):
    loss: Float[Array, ""]  # mean over the batch's targets, in nats
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    loss_z: Float[Array, ""]  # z-scores among the last steps, NaN until there are enough
    grad_norm_z: Float[Array, ""]
    nonfinite: Int[Array, ""]  # as in the new state: 0 where loss and gradient were finite
    skipped: Int[Array, ""]  # as in the new state
    taken: Bool[Array, ""]  # whether the step changed the parameters
    family: dict[str, Float[Array, ""]]  # the model family's own, by name


def compiler_options(compute: Compute, devices: int) -> dict[str, bool | int] | None:
    """Returns XLA's options for the train step, which on a GPU are not its defaults.

    Where XLA may keep more bits than it is asked for, it drops the rounding of activations to bfloat16 wherever it
    can, and writes and keeps them in float32. `deterministic` has it add in a fixed order: some kernels add in order of
    arrival. Collectives are combined only up to BUCKET bytes, so that a reduction is issued while the backward runs on;
    of a reduce-scatter XLA counts what a device gets, of an all-reduce what it gives.
    """
    if jax.default_backend() != "gpu":
        return None
    return {
        "xla_allow_excess_precision": False,
        "xla_gpu_deterministic_ops": compute.deterministic,
        "xla_gpu_all_reduce_combine_threshold_bytes": BUCKET,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": BUCKET // devices,
    }


def batch_loss_and_grads(
    params: Params,
    frozen: Any,
    batch: Batch,
    config: Config,
    layout: Layout,
    key: Key[Array, ""] | None = None,
    largest: fp8.Largest | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Params]:
    """Returns the batch's mean loss, in nats, the family's metrics, and this device's shard of the float32 gradient.

    `key` is that of the step's dropout; without it there is none. `largest` are the magnitudes by which products of 8
    bits are scaled, None for each tensor's own; those that were seen are beside the gradient (`fp8.detach`).
    """
    model, minimised = family(config.model), objective(config)
    scale = 1 / jnp.maximum(layout.total(minimised.count(batch)), 1)
    whole, context = working(params, frozen, config, layout)
    if config.compute.products == "fp8":
        whole, context = fp8.attach(whole, largest, context)

    def one(part: tuple[Batch, Int[Array, " B"] | None]):
        batch, rows = part
        masks = None if rows is None or key is None else Masks(key, rows, config.model.dropout)
        in_training = context._replace(masks=masks)
        loss, metrics, grads = minimised.loss_and_grads(model, whole, batch, in_training, scale=scale)
        grads, seen = fp8.detach(grads)
        return (loss, metrics, layout.scatter_ends(trained(grads, config))), seen

    def accumulate(total, micro_batch):
        (sums, seen), (more, seen_now) = total, one(micro_batch)
        return (jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.maximum, seen, seen_now)), None

    def over_micro_batches(parts: tuple[Batch, Int[Array, "A B"] | None]):
        if parts[0].tokens.shape[0] == 1:
            return one(jax.tree.map(lambda array: array[0], parts))
        shapes = jax.eval_shape(one, jax.tree.map(lambda array: array[0], parts))
        total, _ = lax.scan(accumulate, jax.tree.map(jnp.zeros_like, shapes), parts)
        return total

    parts = batch, layout.places_of_rows(*batch.tokens.shape[:2]) if key is not None else None
    if layout.reproducible:
        return sharding.summed(lambda parts: over_micro_batches(parts)[0], parts, layout.devices)
    (loss, metrics, grads), seen = over_micro_batches(parts)
    grads = fp8.beside(layout.reduce(grads), layout.largest(seen))
    return layout.total(loss), jax.tree.map(layout.total, metrics), grads


def make_train_step(config: Config) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Jits the train step of this configuration. It compiles once per shape of the batch, of which a run has one."""
    layout, on_host = layout_of(config), config.parallel.moments == "host"

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        key = key_of_masks(state) if config.model.dropout else None
        largest = scales.expected(state.magnitudes)
        loss, metrics, grads = batch_loss_and_grads(state.params, frozen, batch, config, layout, key, largest)
        grads, seen = fp8.detach(grads)
        norm = clipping.global_norm(grads, layout.total_of_shards)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        factor = clipping.factor(norm, config.optimizer.clip_norm)
        grads = jax.tree.map(lambda grad: grad * factor, grads)

        rate = schedules.learning_rate(state.step, config.training.steps, config.optimizer)
        limit = config.training.stop_after_nonfinite
        stopped = state.nonfinite >= limit
        losses, loss_z = spikes.update(state.losses, loss, finite & ~stopped)
        norms, norm_z = spikes.update(state.norms, norm, finite & ~stopped)
        spike = spikes.is_spike(loss_z, config.training.loss_spike_z)
        spike |= spikes.is_spike(norm_z, config.training.grad_norm_spike_z)
        taken = finite & ~spike & ~stopped
        setup = muon.Setup(layout.matrices, config.compute.dtype, layout.to_owners, layout.to_shards)
        moments = host_memory.fetched(state.moments, norm) if on_host else state.moments
        params, moments = optimizers.update(
            state.params,
            moments,
            grads,
            decays(grads, config),
            state.step,
            rate,
            config.optimizer,
            advance=taken,
            key=layout.own_key(state.key),
            setup=setup,
        )
        moments = host_memory.given_back(moments) if on_host else moments
        nonfinite = jnp.where(stopped, state.nonfinite, jnp.where(finite, 0, state.nonfinite + 1))
        # A skipped step still counts: the next one has other data and its own place in the schedule.
        step = jnp.where(nonfinite >= limit, state.step, state.step + 1)
        skipped = state.skipped + (step > state.step) * ~taken
        history = state.magnitudes
        if history is not None and largest is not None and seen is not None:
            metrics = metrics | {"fp8_clamped": scales.clamped(largest, seen)}
            history = scales.update(history, seen, taken)
        new = TrainState(params, moments, step, state.key, nonfinite, skipped, losses, norms, history)
        return new, Metrics(loss, norm, rate, loss_z, norm_z, nonfinite, skipped, taken, metrics)

    state = specs(layout)
    return layout.jit(
        train_step,
        in_specs=(state, WHOLE, BATCH_SPEC),
        out_specs=(state, WHOLE),
        donate_argnums=0,
        compiler_options=compiler_options(config.compute, layout.devices),
        **(_in_host_memory(config, layout) if on_host else {}),
    )


def make_gradients(config: Config) -> Callable[[TrainState, Any, Batch], tuple[Float[Array, ""], Params]]:
    """Jits the loss and the gradients, not clipped yet, that the train step of this configuration takes.

    They come out as the step has them: of the same code, on the same devices, sharded in the same way. The state has
    None for its moments, which may be in other memory and have no part in this.
    """
    layout = layout_of(config)

    def gradients(state: TrainState, frozen: Any, batch: Batch) -> tuple[Float[Array, ""], Params]:
        key = key_of_masks(state) if config.model.dropout else None
        largest = scales.expected(state.magnitudes)
        loss, _, grads = batch_loss_and_grads(state.params, frozen, batch, config, layout, key, largest)
        return loss, fp8.detach(grads)[0]

    state = specs(layout)._replace(moments=None)
    return layout.jit(
        gradients,
        in_specs=(state, PartitionSpec(), BATCH_SPEC),
        out_specs=(PartitionSpec(), state.params),
        compiler_options=compiler_options(config.compute, layout.devices),
    )


def _in_host_memory(config: Config, layout: Layout) -> dict[str, Any]:
    """Returns the options of `jax.jit` for a state whose moments are in the host's memory."""
    state, whole, batch = shardings(layout, config), *(NamedSharding(layout.mesh, x) for x in (WHOLE, BATCH_SPEC))
    return {"in_shardings": (state, whole, batch), "out_shardings": (state, whole)}


def key_of_masks(state: TrainState) -> Key[Array, ""]:
    """Returns the key of this step's dropout."""
    return jax.random.fold_in(jax.random.fold_in(state.key, DROPOUT), state.step)


# Compiled before there is a state


def shapes(config: Config) -> tuple[TrainState, Any, Batch]:
    """Abstract shapes of a train step's arguments: the state, what is frozen (None for nothing), and the batch."""
    return state_shapes(config), frozen_shapes(config), objective(config).shapes(config)


def compile_step(config: Config) -> jax.stages.Compiled:
    """Compiles the train step of this configuration, which must have its sizes filled in and no "auto" in `compute`."""
    return make_train_step(config).lower(*shapes(config)).compile()
