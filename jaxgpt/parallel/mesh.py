"""The mesh of the devices that train together: one axis, "data", along which they lie process by process."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxgpt.errors import UserError
from jaxgpt.options.config import Config, Parallel

AXIS = "data"
SHARDS = 8  # virtual shards of `parallel.reproducible`


def available() -> int:
    """Returns the number of devices, over all processes, that `parallel.devices` = 0 takes."""
    return len(jax.devices())


def make(parallel: Parallel) -> Mesh:
    """Returns the mesh. UserError where more devices are asked for than there are, or not as many of each process."""
    there = jax.devices()
    count = parallel.devices or available()
    if count > len(there):
        raise UserError(
            f"--parallel.devices is {count}, and there are {len(there)} ({there[0].device_kind}). Ask for fewer, or 0 "
            "for all; $JAX_NUM_CPU_DEVICES simulates more on a CPU"
        )
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=_taken(there, count))


def _taken(there: list[Any], count: int) -> list[Any]:
    """Returns the first devices of each process, as many of each. UserError where that can't be."""
    processes = jax.process_count()
    each, rest = divmod(count, processes)
    own = [[device for device in there if device.process_index == process] for process in range(processes)]
    if rest or any(len(devices) < each for devices in own):
        have = ", ".join(str(len(devices)) for devices in own)
        raise UserError(
            f"--parallel.devices would be {count}, which are not as many of each process: the {processes} processes "
            f"have {have}. Give a multiple of {processes} that all of them have"
        )
    return [device for devices in own for device in devices[:each]]


def check(config: Config) -> None:
    """Raises a UserError where a micro-batch can't be divided among the devices, or not into the virtual shards."""
    count, sequences = make(config.parallel).size, config.training.batch_size
    if sequences % count:
        raise UserError(
            f"--training.batch-size is {sequences}, and must be divisible by the number of devices, {count}: each "
            "takes the same number of a micro-batch's sequences. Change it, or --parallel.devices"
        )
    if not config.parallel.reproducible:
        return
    needs = {
        f"--parallel.zero 0 (it is {config.parallel.zero})": config.parallel.zero == 0,
        f"1, 2, 4 or 8 devices (--parallel.devices; here it would be {count})": SHARDS % count == 0,
        f"a --training.batch-size divisible by {SHARDS} (it is {sequences})": sequences % SHARDS == 0,
    }
    missing = [need for need, there in needs.items() if not there]
    if missing:
        raise UserError(f"--parallel.reproducible needs {' and '.join(missing)}")
