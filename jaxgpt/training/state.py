"""The train state: its fields, its first value, its layout on the devices, and what the model computes with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from jaxgpt import optimizers
from jaxgpt.models import family, lora, with_scalar
from jaxgpt.models.blocks import Adapters, Context, Params, arrange, as_matrices
from jaxgpt.optimizers import adamw
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.parallel import mesh
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training import fp8, host_memory, spikes


class TrainState(NamedTuple):
    params: Params  # of compute.parameters' dtype: float32 masters, or bfloat16 and no masters
    moments: adamw.Moments
    step: Int[Array, ""]
    key: Key[Array, ""]
    nonfinite: Int[Array, ""]  # steps in a row whose loss or gradient was not finite, up to the last
    skipped: Int[Array, ""]  # steps so far that changed no parameter: not finite, or a spike
    losses: spikes.Window
    norms: spikes.Window
    magnitudes: fp8.History | None = None  # of what has 8 bits; None, and no part of the state, without delayed scaling


class Base(NamedTuple):
    """The frozen base of adapters."""

    params: Params  # as `lora.freeze` has them, on the devices
    fingerprint: str  # of the weights that it was made from


def init_state(config: Config) -> TrainState:
    """Returns the state before the first step; a pure function of `training.seed`."""
    return state_of(init_params(config), config)


def init_params(config: Config) -> Params:
    """Returns the random parameters of `init_state`, in the layout and the dtype that are kept."""
    key, _ = jax.random.split(jax.random.key(config.training.seed))
    return layout_of(config).shard(_whole_params(config, key))


def _whole_params(config: Config, key: Key[Array, ""]) -> Params:
    if config.lora.rank:
        params = lora.init(config.model, config.lora, key)
    else:
        params = family(config.model).init(config.model, key)
    params = arrange(with_head(params, config), config.compute)
    return jax.tree.map(lambda array: array.astype(config.compute.parameters), params)


def with_head(params: Params, config: Config) -> Params:
    """Returns a family's whole parameters, or adapters, with a new scalar head, where the objective has one."""
    if not config.objective.scalar_head:
        return params
    key, _ = jax.random.split(jax.random.key(config.training.seed))
    return with_scalar.attach(params, with_scalar.init_scalar(config.model, jax.random.fold_in(key, 1)))


def decays(params: Params, config: Config) -> Params:
    """Marks with True the trained tensors that weight decay applies to."""
    module = lora if config.lora.rank else family(config.model)
    return with_scalar.decays(module, params) if config.objective.scalar_head else module.decays(params)


def frozen_shapes(config: Config) -> Any:
    """Abstract shapes of what is not trained: the base of adapters, else None."""
    return _frozen_shapes(_without_recompute(config)) if config.lora.rank else None


@functools.lru_cache
def _frozen_shapes(config: Config) -> Params:
    base = jax.eval_shape(lambda: family(config.model).init(config.model, jax.random.key(0)))
    return jax.eval_shape(lambda params: lora.freeze(params, config.lora, config.compute), base)


def state_of(params: Params, config: Config) -> TrainState:
    """Returns the state before the first step with these parameters; the rest depends on their shapes alone."""
    _, key = jax.random.split(jax.random.key(config.training.seed))
    step, nonfinite, skipped = (jnp.int32(0) for _ in range(3))  # each in memory of its own, since all is donated
    moments = optimizers.init(params, layout_without_devices(config, 1).matrices)
    windows = spikes.init(), spikes.init()
    return TrainState(params, moments, step, key, nonfinite, skipped, *windows, fp8.init(params, config.compute))


def on_trees(change: Callable[[Params], Params], state: TrainState) -> TrainState:
    """Applies `change` to a state's parameters and to both of its moments."""
    params, *moments = map(change, (state.params, *state.moments))
    return state._replace(params=params, moments=adamw.Moments(*moments))


# On the devices


@functools.lru_cache
def layout_of(config: Config) -> Layout:
    """Returns the layout of parameters and moments on the devices. UserError for devices that aren't there."""
    return _layout(mesh.make(config.parallel), config)


def layout_without_devices(config: Config, devices: int) -> Layout:
    """Returns the layout on so many devices that need not be there: for shapes, and no computation."""
    return _layout(mesh.without_devices(devices), config)


def _layout(devices: Mesh, config: Config) -> Layout:
    shapes = jax.eval_shape(lambda: _whole_params(config, jax.random.key(0)))
    muon = config.optimizer.name == "muon"
    matrices = as_matrices(shapes, family(config.model).columns(config.model)) if muon else None
    return Layout(devices, config.parallel.zero, shapes, config.parallel.reproducible, matrices)


def specs(layout: Layout) -> TrainState:
    """Returns the PartitionSpecs of the train state, whose history is whole on each device where there is one."""
    moments = adamw.Moments(layout.specs(), layout.second_specs())
    return TrainState(layout.specs(), moments, *(7 * [PartitionSpec()]))  # type: ignore[arg-type]


def shardings(layout: Layout, config: Config) -> TrainState | None:
    """Returns NamedShardings of the train state for `jax.jit`, the moments' in the memory that the options name.

    None where all is on one device, in its own memory.
    """
    if config.parallel.moments == "device":
        return layout.shardings(specs(layout))
    where = jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), specs(layout))
    return where._replace(moments=host_memory.on_host(where.moments))


# Its shapes, without computing it, and computing it in little memory


def state_shapes(config: Config) -> TrainState:
    """Abstract shapes of the initial train state."""
    return _state_shapes(_without_recompute(config))


@functools.lru_cache
def _state_shapes(config: Config) -> TrainState:
    return jax.eval_shape(lambda: init_state(config))


def initial_state(config: Config, given: Params | None = None) -> TrainState:
    """Computes `init_state` in two programs: what drawing the random weights needs is freed before the rest.

    In one program, a run with small batches would need more memory for its first state than for its steps, for which
    the memory plan is made.

    Args:
        config: The run's configuration.
        given: Parameters to begin with, as `init_params` has them; None draws random ones.
    """
    made = jax.block_until_ready(random_params(config) if given is None else given)
    _, rest = _first_programs(_without_recompute(config))
    return TrainState(made, *rest())


def random_params(config: Config) -> Params:
    """Random initial parameters, dispatched asynchronously."""
    params, _ = _first_programs(_without_recompute(config))
    return params()


def _without_recompute(config: Config) -> Config:
    """Sets recompute to "none": at any level the first state is the same, and so are the programs that make it."""
    return changed(config, compute={"recompute": "none"})


@functools.lru_cache
def _first_programs(config: Config) -> tuple[Callable[[], Params], Callable[[], tuple[Any, ...]]]:
    """Jits the two programs of `initial_state`: the random parameters, and the state's other fields."""
    layout = layout_of(config)
    where = shardings(layout, config)
    params, rest = (where.params, where[1:]) if where else (None, None)
    return (
        jax.jit(lambda: init_params(config), out_shardings=params),
        jax.jit(lambda: _moved(state_of(state_shapes(config).params, config), config)[1:], out_shardings=rest),
    )


def _moved(state: TrainState, config: Config) -> TrainState:
    """Returns the state with its moments in the memory that the options name."""
    on_host = config.parallel.moments == "host"
    return state._replace(moments=host_memory.given_back(state.moments)) if on_host else state


# What the model computes with


def working(params: Params, frozen: Any, config: Config, layout: Layout) -> tuple[Params, Context]:
    """Returns a family's parameters in the compute dtype, with the objective's scalar head, and the context.

    Args:
        params: Parameters of a train state, or this device's shards of them.
        frozen: The base, whole on every device, where `params` are its adapters; else None.
        config: The run's configuration.
        layout: Where its parameters are.
    """
    model, compute = config.model, config.compute
    if not config.lora.rank:
        context = Context(
            model, compute, frozen, layout.gather(compute.dtype), layout.scatter, objective=config.objective
        )
        return layout.working(params, compute.dtype), context
    # Adapters are small: they are all-gathered together at each stage.
    adapters = layout.whole(params, compute.dtype)
    gather = lora.gather(frozen, compute.dtype)

    def scatter(grads):
        return layout.scatter(lora.gradients(grads, model, config.lora))

    attached = with_scalar.on_model(
        lambda adapters: lora.attach(adapters, frozen, model, config.lora, compute.dtype), adapters
    )
    return attached, Context(model, compute, frozen, gather, scatter, objective=config.objective)


def trained(grads: Params, config: Config) -> Params:
    """Returns the gradients of what is trained, from a family's gradients of the `working` parameters."""
    return with_scalar.on_model(lambda grads: Adapters(grads.blocks), grads) if config.lora.rank else grads
