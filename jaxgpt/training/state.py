"""The train state: what it is, the one before the first step, and how it lies on the devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Key

from jaxgpt.models import family
from jaxgpt.models.blocks import Params, arrange
from jaxgpt.optimizers import adamw
from jaxgpt.options.config import Compute, Config
from jaxgpt.parallel import mesh
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training import spikes


class TrainState(NamedTuple):
    params: Params  # of compute.parameters' dtype: float32 masters, or bfloat16 and no masters
    moments: adamw.Moments
    step: Int[Array, ""]
    key: Key[Array, ""]
    nonfinite: Int[Array, ""]  # steps in a row whose loss or gradient was not finite, up to the last
    skipped: Int[Array, ""]  # steps so far that changed no parameter: not finite, or a spike
    losses: spikes.Window
    norms: spikes.Window


def init_state(config: Config) -> TrainState:
    """The state before the first step; a pure function of `training.seed`."""
    return state_of(init_params(config), config)


def init_params(config: Config) -> Params:
    """`init_state`'s."""
    key, _ = jax.random.split(jax.random.key(config.training.seed))
    params = arrange(family(config.model).init(config.model, key), config.compute)
    return jax.tree.map(lambda array: array.astype(config.compute.parameters), layout_of(config).pieces(params))


def state_of(params: Params, config: Config) -> TrainState:
    """The state before the first step with these parameters, of which only the shapes are read."""
    _, key = jax.random.split(jax.random.key(config.training.seed))
    step, nonfinite, skipped = (jnp.int32(0) for _ in range(3))  # each in memory of its own, since all is donated
    return TrainState(params, adamw.init(params), step, key, nonfinite, skipped, spikes.init(), spikes.init())


def on_trees(change: Callable[[Params], Params], state: TrainState) -> TrainState:
    """The state with its parameters and both of its moments changed."""
    params, *moments = map(change, (state.params, *state.moments))
    return state._replace(params=params, moments=adamw.Moments(*moments))


def cast(params: Params, compute: Compute) -> Params:
    """The copy of the parameters that the activations meet."""
    return jax.tree.map(lambda array: array.astype(compute.dtype), params)


# On the devices


@functools.lru_cache
def layout_of(config: Config) -> Layout:
    """How the parameters and moments lie on the devices. UserError for devices that aren't there."""
    shapes = jax.eval_shape(lambda: arrange(family(config.model).init(config.model, jax.random.key(0)), config.compute))
    return Layout(mesh.make(config.parallel), config.parallel.zero, shapes, config.parallel.reproducible)


def specs(layout: Layout) -> TrainState:
    """Which axis of each part of the state is divided among the devices."""
    params, whole = layout.specs(), PartitionSpec()
    return TrainState(params, adamw.Moments(params, params), whole, whole, whole, whole, whole, whole)  # type: ignore[arg-type]


# Without computing it, and computing it in little memory


def state_shapes(config: Config) -> TrainState:
    """Those of `init_state`."""
    return _state_shapes(_without_recompute(config))


@functools.lru_cache
def _state_shapes(config: Config) -> TrainState:
    return jax.eval_shape(lambda: init_state(config))


def initial_state(config: Config, given: Params | None = None) -> TrainState:
    """`init_state`, in two programs: what the random weights need while they are drawn is gone when the moments come.

    In one, a run with small batches would need more for its first state than for its steps, which the plan is of. With
    `given` parameters none are drawn.
    """
    made = jax.block_until_ready(random_params(config) if given is None else given)
    _, rest = _first_programs(_without_recompute(config))
    return TrainState(made, *rest())


def random_params(config: Config) -> Params:
    """Those of `init_state`. JAX doesn't wait until they are drawn."""
    params, _ = _first_programs(_without_recompute(config))
    return params()


def _without_recompute(config: Config) -> Config:
    """Whatever level is chosen, the first state is the same, and so are the programs that make it."""
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, recompute="none"))


@functools.lru_cache
def _first_programs(config: Config) -> tuple[Callable[[], Params], Callable[[], tuple[Any, ...]]]:
    layout = layout_of(config)
    where = layout.shardings(specs(layout))
    params, rest = (where.params, where[1:]) if where else (None, None)
    return (
        jax.jit(lambda: init_params(config), out_shardings=params),
        jax.jit(lambda: state_of(state_shapes(config).params, config)[1:], out_shardings=rest),
    )
