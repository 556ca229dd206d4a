"""The memory of a train step on devices that aren't there, from shapes: nothing is compiled and nothing computed.

A step needs its state, and beside it what is there at one of three times, the one at which it is most:

    classifier   all saved activations, a chunk's logits, the gradient of the head and the product that is added to it
    backward     the activations of the layers to come, the gradients of those that are done, and a layer's workspace
    update       the gradients of all parameters; at stage 0 also their sum over the devices

With layers apart, activations go as gradients come; the stacks of a loop are both there in full. `memory_plan.measure`
knows the arrays. The workspace is as large as the activations of one layer, of which each has a gradient, or as three
blocks of attention's scores; the compiler may do with less. `tests/training/test_estimate.py` compares the totals
with compiled programs.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models.blocks import MOST_UNROLLED, ELSEWHERE
from jaxgpt.options.config import Config
from jaxgpt.training import memory_plan
from jaxgpt.training.state import layout_without_devices


class Estimate(NamedTuple):
    """The memory of a train step on one device, in bytes."""

    time: str  # when it is most: "classifier", "backward" or "update"
    parts: dict[str, int]  # what is there then, by name

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(config: Config, devices: int, *, gpu: bool) -> Estimate:
    """Estimates the memory of the train step of this configuration on each of so many devices.

    Args:
        config: The configuration with its sizes, and no "auto" in `compute`.
        devices: Number of devices, which need not be there.
        gpu: Whether they are GPUs, whose compiler orders a program otherwise than a CPU's.
    """
    compute, training, zero = config.compute, config.training, config.parallel.zero if devices > 1 else 0
    unrolled = compute.layers == "unrolled"
    stacked = _with_compute(config, layers="scanned")  # the same sizes, and traced once
    layout = layout_without_devices(stacked, devices)
    sizes = memory_plan.measure(stacked, layout)
    L = config.model.layers
    wide, narrow = accumulation_dtype(compute.dtype).itemsize, jnp.dtype(compute.dtype).itemsize
    ends, layer = _numbers(layout.shapes._replace(blocks=())), _numbers(layout.shapes.blocks) // L
    saved = sum(sizes.activations.values())
    whole_layer = sum(memory_plan.measure(_with_compute(stacked, recompute="none"), layout).activations.values()) // L

    sums = sizes.gradients // 2 if training.micro_batches > 1 else 0
    # A CPU's program without loops sums a layer's gradients as they come at stage 1 too, a GPU's without a loop over the
    # layers keeps them whole beside their shards at stages 2 and 3: it issues the sums together.
    whole, shards = wide * (ends + L * layer), wide * (ends + L * layer) // devices
    early = zero >= 2 or (zero == 1 and unrolled and not sums and not gpu)
    kept = (shards + (whole if gpu and unrolled and zero >= 2 else 0)) if early else whole
    copies = {0: narrow != wide, 3: 2 if unrolled else 1}.get(zero, 0) * narrow * layer
    again = whole_layer if compute.recompute == "block" else 0
    workspace = max(whole_layer + again, 3 * _scores(config, devices)) + copies + (wide * layer if early else 0)
    always = {
        "parameters": sizes.parameters,
        "moments": sizes.moments,
        "batch": 2 * 4 * training.micro_batches * training.batch_size * training.sequence_length // devices,
        "sum of gradients": sums,
        "weights": sizes.weights,
    }
    gradients, activations, of_workspace = "gradients", "saved activations", "workspace of a layer"
    times = {
        "classifier": {activations: saved + sizes.ends, gradients: sizes.table, "classifier": sizes.classifier + sizes.table},
        "backward": {activations: saved + sizes.ends, gradients: sizes.table + kept, of_workspace: workspace},
        "update": {gradients: (kept - sums if sums else kept) * (2 if zero == 0 and devices > 1 else 1)},
    }
    if unrolled:
        del times["backward"]
        times["first of backward"] = {activations: saved + sizes.ends, gradients: sizes.table, of_workspace: workspace}
        last = {activations: saved // L, gradients: max(kept, wide * ends + kept * L * layer // (ends + L * layer))}
        times["last of backward"] = {**last, of_workspace: workspace}
    found = [Estimate(time, always | parts) for time, parts in times.items()]
    return max(found, key=lambda one: one.total)


def _scores(config: Config, devices: int) -> int:
    """Returns the bytes of the scores of one block of queries; 0 where a kernel keeps them on the chip."""
    if config.compute.attention == "cudnn":
        return 0
    model, T = config.model, config.training.sequence_length
    block = min(config.compute.attention_block, T)
    keys = min(T, model.window + block) if model.window else T
    wide = accumulation_dtype(config.compute.dtype).itemsize
    return config.training.batch_size // devices * model.heads * block * keys * wide


def _numbers(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _with_compute(config: Config, **options: Any) -> Config:
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, **options))
