"""Moments in the host's pinned memory: a device takes them for the update, and gives the new ones back.

They are 8 bytes of a parameter's 12 to 16 that a device would keep from step to step. A step then moves 16 bytes of
each over the bus, 8 in each direction. The transfers are a part of the compiled step (`jax.device_put` in `jax.jit`),
and the numbers are the same.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from jaxgpt.errors import UserError
from jaxgpt.layers.numerics import not_before
from jaxgpt.options.config import Config

KIND = "pinned_host"


def has(device: Any) -> bool:
    """Returns whether programs of this device reach the host's pinned memory."""
    return any(memory.kind == KIND for memory in device.addressable_memories())


def saves(device: Any) -> bool:
    """Returns whether that is another memory than the device's own: of a CPU it is the same."""
    return device.platform != "cpu" and has(device)


def check(config: Config) -> None:
    """Raises a UserError where the options ask for it and the devices don't have it."""
    device = jax.devices()[0]
    if config.parallel.moments == "host" and not has(device):
        raise UserError(
            f"--parallel.moments host: programs of the {device.device_kind} don't reach the host's pinned memory: "
            "leave it away"
        )


def on_host(shardings: Any) -> Any:
    """Returns shardings in the host's memory from those on the devices."""
    return jax.tree.map(lambda where: where.with_memory_kind(KIND), shardings)


def fetched(moments: Any, norm: Float[Array, ""]) -> Any:
    """Returns moments on the device, moved there when the gradient's norm is known and not before."""
    return jax.tree.map(lambda array: not_before(norm, jax.device_put(array, jax.memory.Space.Device)), moments)


def given_back(moments: Any) -> Any:
    """Returns moments on the host."""
    return jax.tree.map(lambda array: jax.device_put(array, jax.memory.Space.Host), moments)
