"""The mesh of the devices that train together: one axis, "data", along which they lie process by process.

At most a few programs are dispatched to them at once (`in_turn`).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxgpt.errors import UserError
from jaxgpt.options import fit
from jaxgpt.options.config import Config, Parallel

AXIS = "data"
SHARDS = 8  # virtual shards of `sharding.summed`
MOST_IN_FLIGHT = 4  # programs dispatched and not known to be done; the training loop has two


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


def without_devices(count: int) -> Mesh:
    """Returns a mesh that has a size and no devices: nothing can be compiled for it or run on it."""
    return AbstractMesh((count,), (AXIS,))  # type: ignore[return-value]


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
    count, (sequences, words) = make(config.parallel).size, fit.undivided(config)
    if sequences % count:
        raise UserError(
            f"{words}, and must be divisible by the number of devices, {count}: each "
            "takes the same number of a micro-batch's sequences. Change it, or --parallel.devices"
        )
    if not config.parallel.reproducible:
        return
    needs = {
        f"--parallel.zero 0 (it is {config.parallel.zero})": config.parallel.zero == 0,
        f"1, 2, 4 or 8 devices (--parallel.devices; here it would be {count})": SHARDS % count == 0,
        f"sequences that are divisible by {SHARDS} ({words})": sequences % SHARDS == 0,
    }
    missing = [need for need, there in needs.items() if not there]
    if missing:
        raise UserError(f"--parallel.reproducible needs {' and '.join(missing)}")


def in_turn(results: Iterable[Any]) -> Iterator[Any]:
    """Yields the results of dispatched programs, in NumPy's memory and in their order, a few programs at a time.

    JAX returns before a program has run, so a loop that only dispatches fills the devices' queues: with batches, for
    which there may be no room, and on simulated devices until they deadlock. XLA's CPU client takes 32 programs a
    device. The launch of one more waits for room, in a thread of the pool that also runs the programs; with few cores
    the pool has no more threads than there are devices. With one of them waiting, a program whose devices have to meet
    in a collective never gets all the threads that it needs, and there is never room. So results are read while the
    loop goes on. The device has the next programs in its queue meanwhile.

    `results` dispatches a program for each result that is asked of it.
    """
    waiting: deque[Any] = deque()
    for result in results:
        waiting.append(result)
        if len(waiting) == MOST_IN_FLIGHT:
            yield _read(waiting.popleft())
    while waiting:
        yield _read(waiting.popleft())


def _read(result: Any) -> Any:
    """Returns a result in NumPy's memory; waits for all devices, and not only for the one that it is read from."""
    return jax.device_get(jax.block_until_ready(result))
