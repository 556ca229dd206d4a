"""The memory plan: what a run's train step needs, by name, against what there is; and what would make it fit.

The total is the compiled program's own: arguments, outputs that don't reuse an argument's memory, temporaries. The
names come from shapes. Temporaries without a name are workspace; where the named arrays are together larger than the
temporaries, not all of them exist at once, and the difference is taken off again: the logits of a chunk of tokens
are gone when the blocks' gradients come, which take the same memory.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models import family, fp8, lora, with_scalar
from jaxgpt.models.blocks import Context, Inputs, cast
from jaxgpt.options.config import Compute, Config, Training
from jaxgpt.options.settings import changed
from jaxgpt.training.device_memory import Capacity
from jaxgpt.training.state import frozen_shapes, layout_of, layout_without_devices, state_of


class Else(NamedTuple):
    """Bytes that a run needs on a device beside its step's program."""

    beside: dict[str, int]  # by name: what may be there while a step runs
    times: dict[str, int]  # by name: all that is there at another time, the state too

    @property
    def with_step(self) -> int:
        return sum(self.beside.values())


NOTHING_ELSE = Else({}, {})


@dataclass(frozen=True)
class Plan:
    """The memory of a compiled train step on one device; all sizes in bytes."""

    parts: dict[str, int]  # by name; together the total
    activations: dict[str, int]  # what each part of one layer keeps for the backward
    capacity: int | None
    source: str  # what the capacity is, for people
    recompute: str  # the level
    batch_size: int
    largest_batch_size: int | None  # estimated; None where the capacity isn't known
    host: int = 0  # bytes in the host's memory
    elsewhere: Else = NOTHING_ELSE

    @property
    def total(self) -> int:
        """Returns the bytes of the step's program: arguments, results that are no argument's, temporaries and code."""
        return sum(self.parts.values())

    @property
    def need(self) -> int:
        """Returns the most bytes that the run has on the device at any time after its step is compiled."""
        return max(self.total + self.elsewhere.with_step, *self.elsewhere.times.values(), 0)

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.need <= self.capacity

    def summary(self) -> str:
        """Returns what the run needs and what there is, in one line."""
        has = "" if self.capacity is None else f" of {_size(self.capacity)}"
        return f"{_size(self.need)}{has}"

    def lines(self) -> list[str]:
        """Returns the plan as a table for people."""
        lines = [f"  {name:<38}{size / 2**20:>12,.1f} MiB" for name, size in self.parts.items() if size]
        layer = ", ".join(f"{name} {size / 2**20:,.2f}" for name, size in self.activations.items() if size)
        has = "" if self.capacity is None else f" of {self.capacity / 2**20:,.1f} MiB"
        return [
            f"memory    of the compiled train step, recompute = {self.recompute}",
            *lines,
            f"  {'total':<38}{self.total / 2**20:>12,.1f} MiB{has}, {self.source}",
            *self._other_lines(),
            f"  one layer's saved activations, MiB: {layer}",
            f"  sequences in a micro-batch: {self.batch_size}"
            + ("" if self.largest_batch_size is None else f"; about {self.largest_batch_size:,} would fit"),
        ]

    def _other_lines(self) -> list[str]:
        of_host = {"moments in the host's memory": self.host} if self.host else {}
        beside, times = self.elsewhere
        named = of_host | {f"beside it: {name}": size for name, size in beside.items()}
        named |= {f"in all, {name}": size for name, size in times.items()}
        return [f"  {name:<38}{size / 2**20:>12,.1f} MiB" for name, size in named.items()]

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as memory_plan.json has it."""
        elsewhere = self.elsewhere._asdict()
        return dataclasses.asdict(self) | {
            "elsewhere": elsewhere,
            "total": self.total,
            "need": self.need,
            "fits": self.fits,
        }


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


class Sizes(NamedTuple):
    """Sizes of a train step's arrays on one device, from their shapes, in bytes."""

    parameters: int  # of the train state: float32 masters, or bfloat16 without masters
    frozen: int  # the base of adapters
    moments: int
    gradients: int
    weights: int  # the copy in the compute dtype; 0 where the parameters themselves serve
    activations: dict[str, int]  # residuals by their names, of all layers
    ends: int  # residuals of what is in no block
    logits: int  # of one chunk
    classifier: int  # the chunk's logits and their gradient
    second_gradient: int  # of a micro-batch, when the error of products of 8 bits is measured; else 0
    table: int  # the gradient of the head's table, which may be the token table; 0 where it is frozen

    @property
    def saved(self) -> int:
        return sum(self.activations.values()) + self.ends

    @property
    def fixed(self) -> tuple[int, int]:
        """Temporaries that don't grow with the batch: while the classifier runs, and when all gradients are there."""
        return self.weights + self.table + self.classifier, self.weights + self.gradients


def make(config: Config, program: jax.stages.Compiled, has: Capacity, elsewhere: Else = NOTHING_ELSE) -> Plan:
    """Returns the plan of this configuration's compiled train step."""
    found: Any = program.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    code, host = found.generated_code_size_in_bytes, found.host_argument_size_in_bytes
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = measure(config)
    named = {
        f"gradients{' and their sum' if config.training.micro_batches > 1 else ''}": sizes.gradients,
        f"weights in {config.compute.dtype}": sizes.weights,
        f"saved activations of {config.model.layers} layers": sum(sizes.activations.values()),
        "saved activations of the ends": sizes.ends,
        "classifier": sizes.classifier,
    }
    rest, moments = temporaries - sum(named.values()), 0 if host else sizes.moments
    parts = {
        "masters (float32)" if config.compute.parameters == "float32" else "parameters (bfloat16)": sizes.parameters,
        "moments (float32)": moments,
        f"frozen base ({config.lora.base})": sizes.frozen,
        "second gradient, to measure FP8's error": sizes.second_gradient,
        "batch, counters, metrics": arguments + new - sizes.parameters - moments - sizes.frozen,
        "compiled code": code,
        **named,
        "workspace" if rest >= 0 else "less: what is never there together": rest,
    }
    layer = {name: size // config.model.layers for name, size in sizes.activations.items()}
    total = arguments + new + temporaries + code + sizes.second_gradient
    largest = None if has.bytes is None else _largest_batch(config, sizes, total - temporaries, temporaries, has.bytes)
    level, batch = config.compute.recompute, config.training.batch_size
    return Plan(parts, layer, has.bytes, has.source, level, batch, largest, host, elsewhere)


def _largest_batch(config: Config, sizes: Sizes, state: int, temporaries: int, capacity: int) -> int:
    """Estimates the number of sequences in the largest micro-batch that fits; it errs on the small side.

    The temporaries peak while the classifier runs or when all gradients are there. Each time a fixed part of them does
    not grow with the batch, and at most all the rest does. For a batch r times as large

        temporaries(r) ≤ max over both of  fixed + r (temporaries - fixed)

    which takes the smaller fixed part for r > 1 and the larger one for r < 1.
    """
    batch, room = config.training.batch_size, capacity - state
    fixed = min(min(sizes.fixed) if temporaries <= room else max(sizes.fixed), temporaries - 1)
    return max(0, math.floor(batch * (room - fixed) / (temporaries - fixed)))


def least(config: Config) -> int:
    """Returns a lower bound, in bytes, on what the train step takes: what is there when the classifier runs."""
    sizes = measure(config)
    return sizes.parameters + sizes.frozen + sizes.moments + sizes.weights + sizes.saved + sizes.table + sizes.logits


def measure(config: Config, devices: int | None = None) -> Sizes:
    """Returns the sizes by name on one device, from shapes: nothing is computed.

    `devices` is their number, of which none need be there; None takes those that the options say.
    """
    devices = layout_of(config).devices if devices is None else devices
    model, compute, training = config.model, config.compute, config.training
    fixed = _of_parameters(without_batch(config), devices)
    sequences = training.batch_size // devices * config.objective.texts
    activations, ends = _saved(config, sequences)
    wide = accumulation_dtype(compute.dtype)
    chunk = min(compute.classifier_chunk, sequences * training.sequence_length)
    logits = chunk * model.padded_vocabulary_size if config.objective.classifies else 0
    frozen = config.lora.rank > 0
    # Of several micro-batches the step has a gradient and the sum of all, and measuring has two as well.
    measures = compute.products == "fp8" and compute.fp8_error_every and training.micro_batches == 1
    return fixed._replace(
        gradients=fixed.gradients * (2 if training.micro_batches > 1 else 1),
        second_gradient=fixed.second_gradient if measures else 0,
        activations=activations,
        ends=ends,
        logits=logits * wide.itemsize,
        classifier=logits * (wide.itemsize + jnp.dtype(compute.dtype).itemsize),
        table=0 if frozen else model.padded_vocabulary_size * model.width * wide.itemsize,
    )


def without_batch(config: Config) -> Config:
    """Returns the configuration with defaults for what the parameters' sizes don't depend on."""
    nothing = {name: getattr(Compute(), name) for name in ("classifier_chunk", "memory_limit_gib", "fit", "fit_keeps")}
    return changed(config, compute={"recompute": "none", **nothing}, training=Training())


@functools.lru_cache
def _of_parameters(config: Config, devices: int) -> Sizes:
    """Returns the sizes that don't depend on the batch; those that do are 0."""
    layout, compute = layout_without_devices(config, devices), config.compute
    shards, frozen = jax.eval_shape(layout.shard, layout.shapes), frozen_shapes(config)
    state = jax.eval_shape(functools.partial(state_of, config=config), shards)
    weights = jax.eval_shape(lambda params: cast(params, compute.dtype), layout.shapes)
    wide = accumulation_dtype(compute.dtype)
    gradients = sum(leaf.size * wide.itemsize for leaf in jax.tree.leaves(weights))
    divided = layout.devices if layout.sharded else 1
    # The copies that are there throughout: blocks that are cast or gathered one by one are counted as workspace.
    by_block = layout.zero == 3 or not layout.sharded
    ends = (weights, layout.shapes) if not by_block else (tree._replace(blocks=()) for tree in (weights, layout.shapes))
    copies = [
        leaf for leaf, own in zip(*map(jax.tree.leaves, ends), strict=True) if layout.sharded or leaf.dtype != own.dtype
    ]
    return Sizes(
        parameters=bytes_of(state.params) // divided,
        frozen=bytes_of(frozen),
        moments=bytes_of(state.moments) // divided,
        gradients=gradients // (divided if layout.zero >= 2 else 1),
        second_gradient=gradients // divided,
        weights=bytes_of(copies),
        activations={},
        ends=0,
        logits=0,
        classifier=0,
        table=0,
    )


def _saved(config: Config, sequences: int) -> tuple[dict[str, int], int]:
    """Returns the bytes of the residuals of all layers by their names, and of those of the ends.

    They are traced for one sequence and for two: each further one has as much more. So a size of any batch is quick.
    """
    one, two = (_residuals(_traced(config, number)) for number in (1, 2))
    more = sequences - 1
    names = {name: size + more * (two[0][name] - size) for name, size in one[0].items()}
    return names, one[1] + more * (two[1] - one[1])


def _traced(config: Config, sequences: int) -> Config:
    """Returns the configuration with defaults for all options that a layer's residuals don't depend on."""
    nothing = {name: getattr(Compute(), name) for name in ("classifier_chunk", "memory_limit_gib", "fit", "fit_keeps")}
    compute = dataclasses.replace(config.compute, **nothing)
    training = Training(batch_size=sequences, sequence_length=config.training.sequence_length)
    return Config(config.model, compute, training=training, objective=config.objective, lora=config.lora)


@functools.lru_cache
def _residuals(config: Config) -> tuple[dict[str, int], int]:
    model, compute, training = config.model, config.compute, config.training
    shapes, frozen = layout_without_devices(config, 1).shapes, frozen_shapes(config)
    weights = jax.eval_shape(lambda params: cast(params, compute.dtype), shapes)
    tokens = jax.ShapeDtypeStruct((training.batch_size, training.sequence_length), jnp.int32)
    inputs = Inputs(tokens, tokens if model.documents_apart else None)  # type: ignore[arg-type]
    whole = with_scalar.model_of(weights) if config.objective.scalar_head else weights
    context = Context(model, compute)
    if frozen is not None:
        attach = functools.partial(lora.attach, model=model, options=config.lora, dtype=compute.dtype)
        whole, context = (
            jax.eval_shape(attach, whole, frozen),
            context._replace(gather=lora.gather(frozen, compute.dtype)),
        )
    if compute.products == "fp8":
        whole, context = fp8.attach(whole, None, context)
    _, residuals, _ = jax.eval_shape(
        lambda params, inputs: family(model).features(params, inputs, context), whole, inputs
    )
    return _by_name(residuals.blocks), bytes_of(residuals._replace(blocks=()))


def bytes_of(tree: Any) -> int:
    """Returns the size of all arrays of a tree, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _by_name(blocks: Any) -> dict[str, int]:
    """Sums bytes by the name of the block's field, over all layers, however those are stored."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(blocks):
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        name = names[0] if names else "input"
        sizes[name] = sizes.get(name, 0) + leaf.size * leaf.dtype.itemsize
    return sizes
