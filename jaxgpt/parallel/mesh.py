"""The devices that train together: one row of them, along the axis "data"."""

import jax
from jax.sharding import AxisType, Mesh

from jaxgpt.config import Config, Parallel
from jaxgpt.errors import UserError

AXIS = "data"


def available() -> int:
    """How many devices `parallel.devices` = 0 takes."""
    return len(jax.devices())


def make(parallel: Parallel) -> Mesh:
    """UserError where more devices are asked for than there are."""
    there = jax.devices()
    count = parallel.devices or available()
    if count > len(there):
        raise UserError(
            f"--parallel.devices is {count}, and there are {len(there)} ({there[0].device_kind}). Ask for fewer, or 0 "
            "for all; $JAX_NUM_CPU_DEVICES simulates more on a CPU"
        )
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=there[:count])


def check(config: Config) -> None:
    """UserError where a micro-batch can't be divided among the devices."""
    count, sequences = make(config.parallel).size, config.training.batch_size
    if sequences % count:
        raise UserError(
            f"--training.batch-size is {sequences}, and must be divisible by the number of devices, {count}: each "
            "takes the same number of a micro-batch's sequences. Change it, or --parallel.devices"
        )
