"""The time of a train step, roughly: by it the ways to make a step fit are put in order, the fastest first.

    products        the matrix products, with those that the recompute level repeats, at the device's peak
    memory          bytes that each micro-batch moves beside them, at the bandwidth of the device's memory: the weights
                    twice, the gradients, their sum, activations that are computed again; and for each chunk of the
                    classifier its table twice and the table's gradient
    network         the collectives, one behind the other
    host            moments that are in the host's memory, there and back

It is no prediction: nothing overlaps here. What counts is the order.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models import family
from jaxgpt.models.blocks import unstacked
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.parallel.traffic import NETWORK, seconds, traffic
from jaxgpt.training import flops, memory_plan
from jaxgpt.training.device_memory import CARDS, Card
from jaxgpt.training.estimate import numbers_of
from jaxgpt.training.state import layout_without_devices


class Speeds(NamedTuple):
    """Rates of a device: operations a second, and bytes a second to its memory, to other devices and to the host."""

    products: float
    memory: float
    link: float
    host: float


HOST = 25e9  # bytes a second over PCIe 4.0 x16, as measured copies have it
CPU = Speeds(1e11, 2e10, 1e10, 2e10)  # of a few cores; simulated devices share them


def speeds_of(card: Card | None, dtype: str) -> Speeds:
    """Returns the rates of a card, or a CPU's where there is none."""
    if card is None:
        return CPU
    return Speeds(flops.known_peak(card.kind, dtype) or 1e14, card.bandwidth, card.link, HOST)


def speeds_here(dtype: str) -> Speeds:
    """Returns the rates of this process's device; of one that isn't known, those of a card like it."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return CPU
    known = next((card for card in CARDS.values() if card.kind == device.device_kind), CARDS["a100"])
    speeds = speeds_of(known, dtype)
    return speeds._replace(products=flops.known_peak(device.device_kind, dtype) or speeds.products)


def step_seconds(config: Config, devices: int, speeds: Speeds) -> float:
    """Returns the time of a step of this configuration on so many devices; for an order alone."""
    model, training, compute = config.model, config.training, config.compute
    A, T = training.micro_batches, training.sequence_length
    tokens = training.batch_size * config.objective.texts * T // devices  # of a micro-batch on a device
    sizes = memory_plan.measure(config, devices)
    narrow, wide = jnp.dtype(compute.dtype).itemsize, accumulation_dtype(compute.dtype).itemsize

    of_token = family(model).flops_per_token(model, T, recompute=compute.recompute)
    kept = changed(config, compute={"recompute": "none"})
    again = sum(memory_plan.measure(kept, devices).activations.values()) - sum(sizes.activations.values())
    of_layer, of_ends = numbers_of(config)
    numbers = model.layers * of_layer + of_ends
    of_batch = 2 * numbers * narrow + numbers * wide * (3 if A > 1 else 1) + 2 * again
    chunks = math.ceil(tokens / compute.classifier_chunk) if config.objective.classifies else 0
    of_batch += chunks * model.padded_vocabulary_size * model.width * (2 * narrow + 2 * wide)
    found = A * (tokens * of_token / speeds.products + of_batch / speeds.memory)
    if devices > 1:
        tensors = network_bytes(config, devices)
        found += seconds(tensors, devices, speeds.link, min(NETWORK, speeds.link))
    if config.parallel.moments == "host":
        found += 2 * sizes.moments / speeds.host
    return found


def network_bytes(config: Config, devices: int) -> dict[str, int]:
    """Returns the bytes of the tensors that cross the network in a step, by kind of collective."""
    scanned = changed(config, compute={"layers": "scanned"})
    return _network_bytes(memory_plan.without_batch(scanned), devices, config.training.micro_batches)


@functools.lru_cache
def _network_bytes(config: Config, devices: int, micro_batches: int) -> dict[str, int]:
    layout = layout_without_devices(config, devices)
    return traffic(
        jax.eval_shape(unstacked, layout.shapes),
        devices=devices,
        zero=config.parallel.zero,
        micro_batches=micro_batches,
        weight_bytes=jnp.dtype(config.compute.dtype).itemsize,
        biases_again=True,
        matrices=layout.matrices,
    )
