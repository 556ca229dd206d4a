"""Bytes that cross the network in one train step, from the shapes of the parameters.

With P numbers in all tensors and P_layers in those of the layers, each tensor filled up to a multiple of the number of
devices, A micro-batches, gradients of 4 bytes a number and weights of w:

    zero    all-reduce    reduce-scatter    all-gather
    0       4 P
    1                     4 P               w P
    2                     4 P A             w P
    3                     4 P A             w (P - P_layers) + 2 w P_layers A

With Muon, stages 1 to 3 also have an all-to-all of the momentum of the blocks' matrices to their owners and one of the
updates back, 2 w P_matrices / D on each device, in the dtype of the products.

Of n bytes of tensors a ring sends (D-1)/D n from each of D devices in a reduce-scatter or an all-gather, and twice that
in an all-reduce, which is both; in an all-to-all a device sends (D-1)/D of the n bytes that it gets.
`tests/parallel/test_sharding.py` finds these bytes in compiled programs.
"""

import math
from typing import Any

import jax

from jaxgpt.models.blocks import Params
from jaxgpt.optimizers.matrices import owned

IN_A_MACHINE = 8  # graphics cards
NETWORK = 50e9  # bytes a second of each one's network card, one way: 400 Gb/s


def traffic(
    shapes: Params,
    *,
    devices: int,
    zero: int,
    micro_batches: int,
    weight_bytes: int,
    biases_again: bool = False,
    matrices: Params | None = None,
) -> dict[str, int]:
    """Returns the bytes of the tensors in one step, by kind of collective; gradients have 4 bytes a number.

    Args:
        shapes: Shapes of the parameters, layers apart.
        devices: Number of devices.
        zero: The ZeRO stage.
        micro_batches: Number of micro-batches.
        weight_bytes: Bytes of a number of the weights that are gathered.
        biases_again: Whether stage 3 gathers the layers' biases in the backward as well, which needs them only where it
            computes outputs again.
        matrices: Which of them are Muon's (`blocks.as_matrices`), None for AdamW.
    """
    if devices == 1:
        return {}
    if zero == 0:
        return {"all-reduce": 4 * _numbers(shapes, 1)}
    everything, blocks = _numbers(shapes, devices), _numbers(shapes.blocks, devices)
    paths = jax.tree.leaves_with_path(shapes.blocks)
    biases = _numbers([leaf for path, leaf in paths if path[-1].name == "bias"], devices)
    gathered = everything
    if zero == 3:
        gathered += micro_batches * (2 * blocks - (0 if biases_again else biases)) - blocks
    own = owned(matrices, devices) if matrices is not None else {}
    numbers = sum(count * -(-kind.numbers // devices) * devices for kind, count in own.items())
    return {
        "reduce-scatter": 4 * everything * (micro_batches if zero >= 2 else 1),
        "all-gather": weight_bytes * gathered,
        **({"all-to-all": 2 * weight_bytes * numbers} if own else {}),
    }


def _numbers(shapes: Any, devices: int) -> int:
    """Counts the numbers in all tensors, each filled up to a multiple of the number of devices."""
    return sum(-(-math.prod(leaf.shape) // devices) * devices for leaf in jax.tree.leaves(shapes))


def sent(tensors: dict[str, int], devices: int) -> dict[str, int]:
    """Returns the bytes that each device sends in a ring, from those of the tensors."""
    times = {kind: 2 if kind == "all-reduce" else 1 for kind in tensors}
    return {kind: size * times[kind] * (devices - 1) // devices for kind, size in tensors.items()}


def seconds(tensors: dict[str, int], devices: int, link: float, network: float) -> float:
    """Returns the time of all collectives one behind the other, without their latency.

    The rates are those of one device in one direction, in bytes a second: inside of a machine, and between machines.
    """
    inside = min(devices, IN_A_MACHINE)
    machines = devices / inside
    one = (inside - 1) / inside / link + (machines - 1) / machines / inside / network
    return one * sum(size * (2 if kind == "all-reduce" else 1) for kind, size in tensors.items())
