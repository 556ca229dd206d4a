"""The memory of a train step on devices that aren't there, from shapes: nothing is compiled and nothing computed.

A step needs its state, and beside it what is there at one of these times, the one at which it is most:

    classifier   all saved activations, a chunk's logits, the head's gradient and the product that is added to it
    backward     the activations of the layers to come, the gradients of those that are done, and a layer's workspace
    update       the gradients of all parameters; at stage 0 also their sum over the devices
    muon         the gradients, and two copies of the matrices that the device orthogonalises

With layers apart, activations go as gradients come; the stacks of a loop are both there in full. `memory_plan.measure`
knows the arrays. A layer's workspace is as large as its activations, of which each has a gradient, or as three blocks
of attention's scores; the compiler may do with less. `tests/training/test_estimate.py` compares the totals with
compiled programs, and says how far they are off.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.optimizers.matrices import owned
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.training import memory_plan
from jaxgpt.training.memory_plan import Sizes
from jaxgpt.training.state import layout_without_devices

ACTIVATIONS, GRADIENTS = "saved activations", "gradients"


class Estimate(NamedTuple):
    """The memory of a train step on one device, in bytes."""

    time: str  # when it is most
    parts: dict[str, int]  # what is there then, by name

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class _Counts(NamedTuple):
    """Bytes that the times below are put together from."""

    layers: int
    saved: int  # activations of all layers
    sum: int  # gradients of the micro-batches so far
    whole: int  # all gradients of a micro-batch
    kept: int  # what a device keeps of them
    ends: int  # those of all but the layers, whole
    workspace: int
    matrices: int  # those that a device orthogonalises, in the dtype of the products; 0 for AdamW


def estimate(config: Config, devices: int, *, gpu: bool) -> Estimate:
    """Estimates the memory of the train step of this configuration on each of so many devices.

    Args:
        config: The configuration with its sizes, and no "auto" in `compute`.
        devices: Number of devices, which need not be there.
        gpu: Whether they are GPUs, whose compiler orders a program otherwise than a CPU's.
    """
    sizes, counts = _measure(config, devices, gpu)
    training = config.training
    on_host = gpu and config.parallel.moments == "host"  # a CPU's memory is the host's
    tokens = training.micro_batches * training.batch_size * training.sequence_length // devices
    always = {
        "parameters": sizes.parameters,
        "moments": 0 if on_host else sizes.moments,
        "frozen base": sizes.frozen,
        "batch": 2 * 4 * tokens,
        "sum of gradients": counts.sum,
        "weights": sizes.weights,
    }
    unrolled, summed = config.compute.layers == "unrolled", config.parallel.zero == 0 and devices > 1
    times = _times(sizes, counts, unrolled=unrolled, summed=summed)
    times["update"]["moments from the host"] = sizes.moments if on_host else 0
    return max((Estimate(time, always | parts) for time, parts in times.items()), key=lambda found: found.total)


def _times(sizes: Sizes, counts: _Counts, *, unrolled: bool, summed: bool) -> dict[str, dict[str, int]]:
    """Returns what is there at each time beside what always is."""
    activations, workspace = counts.saved + sizes.ends, {"workspace of a layer": counts.workspace}
    classifier = {ACTIVATIONS: activations, GRADIENTS: sizes.table, "classifier": sizes.classifier + sizes.table}
    gradients = counts.kept - counts.sum
    updates = {
        "update": {GRADIENTS: gradients * (2 if summed else 1)},
        # The weights, which are counted throughout, are not needed any more.
        "muon": {GRADIENTS: gradients, "matrices": max(0, 2 * counts.matrices - sizes.weights)},
    }
    if not unrolled:
        backward = {ACTIVATIONS: activations, GRADIENTS: sizes.table + counts.kept, **workspace}
        return {"classifier": classifier, "backward": backward, **updates}
    first = {ACTIVATIONS: activations, GRADIENTS: sizes.table, **workspace}
    of_layers = counts.kept * (counts.whole - counts.ends) // counts.whole
    gradients = max(counts.kept, counts.ends + of_layers)
    last = {ACTIVATIONS: counts.saved // counts.layers, GRADIENTS: gradients, **workspace}
    return {"classifier": classifier, "first layer's backward": last, "last layer's backward": first, **updates}


def _measure(config: Config, devices: int, gpu: bool) -> tuple[Sizes, _Counts]:
    zero, unrolled = config.parallel.zero if devices > 1 else 0, config.compute.layers == "unrolled"
    # The same sizes, from a trace of one layer with one block of queries.
    stacked = changed(config, compute={"layers": "scanned", "attention_block": config.training.sequence_length})
    sizes = memory_plan.measure(stacked, devices)
    L, all_kept = config.model.layers, changed(stacked, compute={"recompute": "none"})
    activations = sum(memory_plan.measure(all_kept, devices).activations.values()) // L

    wide, narrow = accumulation_dtype(config.compute.dtype).itemsize, jnp.dtype(config.compute.dtype).itemsize
    numbers, ends = numbers_of(stacked)
    ends *= wide
    whole = ends + wide * L * numbers
    sums = sizes.gradients // 2 if config.training.micro_batches > 1 else 0
    # A CPU's program without loops sums a layer's gradients over the devices as they come at stage 1 too. A GPU's
    # without a loop over the layers keeps them whole beside their shards at stages 2 and 3, and sums them together.
    early = zero >= 2 or (zero == 1 and unrolled and not sums and not gpu)
    kept = whole // devices + (whole if gpu and unrolled else 0) if early else whole

    again = activations if config.compute.recompute == "block" else 0
    copies = {0: int(narrow != wide), 3: 2 if unrolled else 1}.get(zero, 0) * narrow * numbers  # cast or gathered
    workspace = max(activations + again, 3 * _scores(config, devices)) + copies + (wide * numbers if early else 0)
    saved = sum(sizes.activations.values())
    matrices = narrow * _numbers_orthogonalised(memory_plan.without_batch(stacked), devices if zero else 1)
    return sizes, _Counts(L, saved, sums, whole, kept, ends, workspace, matrices)


@functools.lru_cache
def _numbers_orthogonalised(config: Config, owners: int) -> int:
    """Counts the numbers in the matrices that a device orthogonalises; of a search's many candidates once."""
    own = owned(layout_without_devices(config, owners).matrices, owners)
    return sum(count * kind.numbers for kind, count in own.items())


def _scores(config: Config, devices: int) -> int:
    """Returns the bytes of the scores of one block of queries; 0 where a kernel keeps them on the chip."""
    if config.compute.attention in ("cudnn", "pallas"):
        return 0
    model, T = config.model, config.training.sequence_length
    block = min(config.compute.attention_block, T)
    keys = min(T, model.window + block) if model.window else T
    sequences = config.training.batch_size // devices
    return sequences * model.heads * block * keys * accumulation_dtype(config.compute.dtype).itemsize


def numbers_of(config: Config) -> tuple[int, int]:
    """Counts the numbers in a layer's trained parameters, and in those of all but the layers."""
    return _numbers(memory_plan.without_batch(config))


@functools.lru_cache
def _numbers(config: Config) -> tuple[int, int]:
    shapes = layout_without_devices(config, 1).shapes
    layers, ends = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
        for part in (shapes.blocks, shapes._replace(blocks=()))
    )
    return layers // config.model.layers, ends
