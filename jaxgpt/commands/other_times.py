"""Memory that a run needs on a device beside its train step: what lives next to it, and what is there at other times.

    beside a step       the next step's batch; a policy's reference, which is a second copy of what is trained; on a
                        CPU, whose memory is the host's, the batches that are made ahead and the copy of the state that
                        a checkpoint is written from
    drawing text        the state, the parameters whole and in the dtype that text is drawn in, a text's keys and values
    drawing rollouts    the same, with the keys and values of all answers that a device draws at once
    scoring tasks       the state, and a batch of `evaluation.batch_size` texts in the forward pass
    saving              the state, its moments always, and its copy in a checkpoint's layout

A validation loss needs less than a step: it has no gradients, and keeps no layer's activations.
All is from shapes, and counted high where a program may need less.
"""

import dataclasses
import functools

import jax

from jaxgpt.generation import rollouts
from jaxgpt.generation.decoder import computed_in
from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models import family, with_scalar
from jaxgpt.models.blocks import are_stacked, arrange, cast
from jaxgpt.models.cache import init_cache
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.training import memory_plan
from jaxgpt.training.candidates import ElseOf
from jaxgpt.training.memory_plan import Else, bytes_of
from jaxgpt.training.state import layout_of, layout_without_devices

AHEAD = 2  # batches that the loader makes while a step runs
SLOTS = 1  # texts that are drawn at once for a sample


def of_run(config: Config) -> ElseOf:
    """Returns `elsewhere` on this process's devices."""
    return functools.partial(elsewhere, devices=layout_of(config).devices, cpu=jax.default_backend() == "cpu")


def elsewhere(config: Config, devices: int, *, cpu: bool) -> Else:
    """Returns what a run of this configuration needs beside its step on each of so many devices.

    Args:
        config: The configuration, complete.
        devices: Their number; none need be there.
        cpu: Whether they are a CPU's, in the host's memory.
    """
    sizes, training = memory_plan.measure(config, devices), config.training
    sequences = training.micro_batches * training.batch_size * config.objective.texts // devices
    batch = 2 * 4 * sequences * training.sequence_length
    on_device = sizes.moments if cpu or config.parallel.moments == "device" else 0
    reference = reference_of(config, sizes)
    state = sizes.parameters + on_device + sizes.frozen + reference
    beside = {"the next batch": batch}
    written = (sizes.parameters + sizes.moments) // (1 if config.parallel.zero and devices > 1 else devices)
    if cpu:
        beside = {"batches": AHEAD * batch, "a checkpoint that is written": written}
    if reference:
        beside["the reference"] = reference
    times = {}
    if config.objective.name != "reward":
        times["drawing text"] = state + _drawing(_without_step(config), devices, SLOTS, cpu)
    if config.objective.name == "policy":
        answers = training.micro_batches * training.batch_size * config.rollouts.minibatches // devices
        slots = min(rollouts.MOST_SLOTS, answers)
        times["drawing rollouts"] = state + _drawing(_without_step(config), devices, slots, cpu)
    if config.evaluation.tasks:
        times["scoring tasks"] = state + sizes.weights + _scoring(config)
        slots = config.evaluation.batch_size
        times["drawing answers"] = state + _drawing(_without_step(config), devices, slots, cpu)
    # A checkpoint has its layers stacked, and of each tensor a part on each device.
    apart, whole = config.compute.layers != "scanned", devices > 1 and not config.parallel.zero
    if apart or devices > 1:
        trained = sizes.parameters + sizes.moments
        # Layers that are apart are stacked in XLA's temporaries first, and the largest stacks are there twice.
        stacks = 3 * trained // 2 if apart and devices > 1 else 0
        parts = trained // (devices if whole else 1)
        times["saving"] = sizes.frozen + reference + trained + stacks + parts + (written if cpu else 0)
    return Else(beside, times)


def reference_of(config: Config, sizes: memory_plan.Sizes) -> int:
    """Returns the bytes of a policy's reference on a device, which is there throughout; 0 where there is none."""
    return sizes.parameters if config.objective.name == "policy" and config.objective.has_reference else 0


def _without_step(config: Config) -> Config:
    """Returns the configuration with one value for all that drawing doesn't depend on."""
    config = memory_plan.without_batch(config)
    return changed(config, parallel={"moments": "device"})


@functools.lru_cache
def _drawing(config: Config, devices: int, slots: int, cpu: bool) -> int:
    """Returns the bytes of a `Decoder` beside the state: its parameters, and its texts' keys and values."""
    layout, model = layout_without_devices(config, devices), config.model
    compute = computed_in(config.compute)
    if not cpu:  # of which there may be one here, where the devices are elsewhere
        compute = dataclasses.replace(compute, dtype=config.compute.dtype)
    shapes, gathered = layout.shapes, layout.sharded
    if config.lora.rank:  # merged with their base
        shapes, gathered = jax.eval_shape(lambda: family(model).init(model, jax.random.key(0))), True
    elif config.objective.scalar_head:
        shapes = with_scalar.model_of(shapes)
    if gathered:
        dtype = config.compute.dtype if config.lora.rank else compute.dtype
        shapes = jax.eval_shape(lambda tree: cast(tree, dtype), shapes)
    apart = are_stacked(shapes.blocks)
    arranged = jax.eval_shape(lambda tree: arrange(tree, compute), shapes) if apart else shapes
    copied = are_stacked(shapes.blocks) != are_stacked(arranged.blocks)
    drawn_with = jax.eval_shape(lambda tree: cast(tree, compute.dtype), arranged)
    cache = jax.eval_shape(lambda tree: init_cache(tree, model.context, model, compute.dtype), drawn_with)
    of_cache, wide = bytes_of(cache), accumulation_dtype(compute.dtype).itemsize
    # A prompt's keys and values come before their cache, and beside them what one layer computes with.
    block = min(compute.attention_block, model.context)
    layer = wide * model.context * (8 * model.width + model.heads * block)
    logits = 4 * wide * slots * model.padded_vocabulary_size
    return (
        (bytes_of(shapes) if gathered else 0)
        + (bytes_of(arranged) if copied else 0)
        + (bytes_of(drawn_with) if drawn_with != arranged else 0)
        + (slots + 1) * of_cache
        + layer
        + logits
    )


def _scoring(config: Config) -> int:
    """Returns the bytes that a batch of a task's texts takes in the forward pass."""
    model, compute = config.model, config.compute
    wide, T = accumulation_dtype(compute.dtype).itemsize, config.model.context
    block = min(compute.attention_block, T)
    of_text = T * (12 * model.width + model.heads * block)
    return wide * config.evaluation.batch_size * of_text
