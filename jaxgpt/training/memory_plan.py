"""The memory plan: what a run's train step needs, by name, against what there is; and what would make it fit.

The total is the compiled program's own: arguments, outputs that don't reuse an argument's memory, temporaries. The
names come from shapes. Temporaries without a name are workspace; where the named arrays are together larger than the
temporaries, not all of them exist at once, and the difference is taken off again: the logits of a chunk of tokens
are gone when the blocks' gradients come, which take the same memory.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.errors import UserError
from jaxgpt.layers.numerics import accumulation_dtype
from jaxgpt.models import family, lora, with_scalar
from jaxgpt.models.blocks import RECOMPUTE_LEVELS, Context, Inputs, cast
from jaxgpt.options.config import Compute, Config, Training
from jaxgpt.parallel.sharding import Layout
from jaxgpt.training import step
from jaxgpt.training.device_memory import Capacity
from jaxgpt.training.state import frozen_shapes, layout_of, state_of

SMALLEST_CHUNK = 128  # of the classifier: below it, its products are slow


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

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.total <= self.capacity

    def summary(self) -> str:
        """Returns the total and what there is, in one line."""
        has = "" if self.capacity is None else f" of {_size(self.capacity)}"
        return f"{_size(self.total)}{has}"

    def lines(self) -> list[str]:
        """Returns the plan as a table for people."""
        lines = [f"  {name:<38}{size / 2**20:>12,.1f} MiB" for name, size in self.parts.items() if size]
        layer = ", ".join(f"{name} {size / 2**20:,.2f}" for name, size in self.activations.items() if size)
        has = "" if self.capacity is None else f" of {self.capacity / 2**20:,.1f} MiB"
        return [
            f"memory    of the compiled train step, recompute = {self.recompute}",
            *lines,
            f"  {'total':<38}{self.total / 2**20:>12,.1f} MiB{has}, {self.source}",
            f"  one layer's saved activations, MiB: {layer}",
            f"  sequences in a micro-batch: {self.batch_size}"
            + ("" if self.largest_batch_size is None else f"; about {self.largest_batch_size:,} would fit"),
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as memory_plan.json has it."""
        return dataclasses.asdict(self) | {"total": self.total, "fits": self.fits}


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Sizes:
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
    table: int  # the gradient of the head's table, which may be the token table; 0 where it is frozen

    @property
    def saved(self) -> int:
        return sum(self.activations.values()) + self.ends

    @property
    def fixed(self) -> tuple[int, int]:
        """Temporaries that don't grow with the batch: while the classifier runs, and when all gradients are there."""
        return self.weights + self.table + self.classifier, self.weights + self.gradients


def prepare(config: Config, has: Capacity) -> tuple[Config, jax.stages.Compiled, Plan]:
    """Chooses the recompute level, compiles the train step and plans its memory.

    "auto" takes the fastest level that fits, or the last. Returns the configuration with its level, the compiled train
    step, and its plan. UserError where it doesn't fit in what the run has, with options that would make it fit.
    """
    levels = RECOMPUTE_LEVELS if config.compute.recompute == "auto" else (config.compute.recompute,)
    for candidate in [_with(config, compute={"recompute": level}) for level in levels]:
        last = candidate.compute.recompute == levels[-1]
        if not last and has.bytes is not None and least(candidate) > has.bytes:
            continue
        program = step.compile_step(candidate)
        plan = make(candidate, program, has)
        if plan.fits:
            return candidate, program, plan
        del program
    raise _refusal(candidate, plan)


def make(config: Config, program: jax.stages.Compiled, has: Capacity) -> Plan:
    """Returns the plan of this configuration's compiled train step."""
    found: Any = program.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = measure(config)
    named = {
        f"gradients{' and their sum' if config.training.micro_batches > 1 else ''}": sizes.gradients,
        f"weights in {config.compute.dtype}": sizes.weights,
        f"saved activations of {config.model.layers} layers": sum(sizes.activations.values()),
        "saved activations of the ends": sizes.ends,
        "classifier": sizes.classifier,
    }
    rest = temporaries - sum(named.values())
    parts = {
        "masters (float32)" if config.compute.parameters == "float32" else "parameters (bfloat16)": sizes.parameters,
        "moments (float32)": sizes.moments,
        f"frozen base ({config.lora.base})": sizes.frozen,
        "batch, counters, metrics": arguments + new - sizes.parameters - sizes.moments - sizes.frozen,
        **named,
        "workspace" if rest >= 0 else "less: what is never there together": rest,
    }
    layer = {name: size // config.model.layers for name, size in sizes.activations.items()}
    total = arguments + new + temporaries
    largest = None if has.bytes is None else _largest_batch(config, sizes, total - temporaries, temporaries, has.bytes)
    return Plan(parts, layer, has.bytes, has.source, config.compute.recompute, config.training.batch_size, largest)


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


def measure(config: Config, layout: Layout | None = None) -> Sizes:
    """Returns the sizes by name on one device, from shapes: nothing is computed.

    `layout` is `layout_of(config)` where it isn't given; a layout without devices measures what is to run elsewhere.
    """
    layout = layout or layout_of(config)
    model, compute, training = config.model, config.compute, config.training
    shards, frozen = jax.eval_shape(layout.shard, layout.shapes), frozen_shapes(config)
    state = jax.eval_shape(functools.partial(state_of, config=config), shards)
    weights = jax.eval_shape(lambda params: cast(params, compute.dtype), layout.shapes)
    sequences = training.batch_size // layout.devices * config.objective.texts
    activations, ends = _saved(config, layout, sequences)
    wide = accumulation_dtype(compute.dtype)
    gradients = sum(leaf.size * wide.itemsize for leaf in jax.tree.leaves(weights))
    chunk = min(compute.classifier_chunk, sequences * training.sequence_length)
    logits = chunk * model.padded_vocabulary_size if config.objective.classifies else 0
    divided = layout.devices if layout.sharded else 1
    # The copies that are there throughout: blocks that are cast or gathered one by one are counted as workspace.
    by_block = layout.zero == 3 or not layout.sharded
    ends = (weights, layout.shapes) if not by_block else (tree._replace(blocks=()) for tree in (weights, layout.shapes))
    copies = [
        leaf for leaf, own in zip(*map(jax.tree.leaves, ends), strict=True) if layout.sharded or leaf.dtype != own.dtype
    ]
    return Sizes(
        parameters=_bytes(state.params) // divided,
        frozen=_bytes(frozen),
        moments=_bytes(state.moments) // divided,
        gradients=gradients * (2 if training.micro_batches > 1 else 1) // (divided if layout.zero >= 2 else 1),
        weights=_bytes(copies),
        activations=activations,
        ends=ends,
        logits=logits * wide.itemsize,
        classifier=logits * (wide.itemsize + jnp.dtype(compute.dtype).itemsize),
        table=0 if frozen is not None else model.padded_vocabulary_size * model.width * wide.itemsize,
    )


def _saved(config: Config, layout: Layout, sequences: int) -> tuple[dict[str, int], int]:
    """Returns the bytes of the residuals of all layers by their names, and of those of the ends.

    They are traced for one sequence and for two: each further one has as much more. So a size of any batch is quick.
    """
    one, two = (_residuals(_traced(config, number), layout) for number in (1, 2))
    more = sequences - 1
    names = {name: size + more * (two[0][name] - size) for name, size in one[0].items()}
    return names, one[1] + more * (two[1] - one[1])


def _traced(config: Config, sequences: int) -> Config:
    """Returns the configuration with defaults for all options that a layer's residuals don't depend on."""
    compute, default = config.compute, Compute()
    kept = {name: getattr(compute, name) for name in ("dtype", "attention", "attention_block", "recompute", "layers")}
    training = Training(batch_size=sequences, sequence_length=config.training.sequence_length)
    compute = dataclasses.replace(default, **kept)
    return Config(config.model, compute, training=training, objective=config.objective, lora=config.lora)


@functools.lru_cache
def _residuals(config: Config, layout: Layout) -> tuple[dict[str, int], int]:
    model, compute, training = config.model, config.compute, config.training
    weights, frozen = jax.eval_shape(lambda params: cast(params, compute.dtype), layout.shapes), frozen_shapes(config)
    tokens = jax.ShapeDtypeStruct((training.batch_size, training.sequence_length), jnp.int32)
    inputs = Inputs(tokens, tokens if model.documents_apart else None)  # type: ignore[arg-type]
    whole, context = weights, Context(model, compute)
    if frozen is not None:
        attach = functools.partial(lora.attach, model=model, options=config.lora, dtype=compute.dtype)
        whole, context = (
            jax.eval_shape(attach, weights, frozen),
            context._replace(gather=lora.gather(frozen, compute.dtype)),
        )
    if config.objective.scalar_head:
        whole = with_scalar.model_of(whole)
    _, residuals, _ = jax.eval_shape(
        lambda params, inputs: family(model).features(params, inputs, context), whole, inputs
    )
    return _by_name(residuals.blocks), _bytes(residuals._replace(blocks=()))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _by_name(blocks: Any) -> dict[str, int]:
    """Sums bytes by the name of the block's field, over all layers, however those are stored."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(blocks):
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        name = names[0] if names else "input"
        sizes[name] = sizes.get(name, 0) + leaf.size * leaf.dtype.itemsize
    return sizes


# A plan that doesn't fit


def _refusal(config: Config, plan: Plan) -> UserError:
    """Returns the error, with the options that would make it fit, each of them compiled to see that it does."""
    assert plan.capacity is not None
    needs, has = plan.total / 2**20, plan.capacity / 2**20
    head = f"the train step needs {needs:,.0f} MiB, and {has:,.0f} MiB is {plan.source}. "
    found = [fitting for kind in _changes(config, plan) if (fitting := _first_that_fits(kind, plan))]
    if not found:
        chunk = min(SMALLEST_CHUNK, config.compute.classifier_chunk)
        least_of_all = {"recompute": "block", "classifier_chunk": chunk, "dtype": "bfloat16"}
        everything = _with(config, compute=least_of_all, training=_split(config, layout_of(config).devices))
        found = [fitting] if (fitting := _first_that_fits([everything], plan)) else []
    if not found:
        return UserError(f"{head}No option makes this model fit: take a smaller one, or a larger device")
    width = max(len(_words(config, change)) for change, _ in found)
    rows = [
        f"  {_words(config, change):<{width}}   {total / 2**20:,.0f} MiB, {(plan.total - total) / 2**20:,.0f} less"
        for change, total in found
    ]
    return UserError(f"{head}It fits with {'any of' if len(rows) > 1 else ''}\n" + "\n".join(rows))


def _changes(config: Config, plan: Plan) -> Iterator[list[Config]]:
    """Yields changes that might make it fit, kind by kind, the cheapest in time first; of a kind the smallest first."""
    compute, training = config.compute, config.training
    after = RECOMPUTE_LEVELS[RECOMPUTE_LEVELS.index(compute.recompute) + 1 :]
    yield [_with(config, compute={"recompute": level}) for level in after if level != "block"]
    devices = layout_of(config).devices
    chunk = min(compute.classifier_chunk, training.batch_size // devices * training.sequence_length)
    yield [_with(config, compute={"classifier_chunk": size}) for size in (512, SMALLEST_CHUNK) if size < chunk]
    divisors = [
        size for size in range(training.batch_size - 1, 0, -1) if training.batch_size % size == size % devices == 0
    ]
    promising = [size for size in divisors if size <= (plan.largest_batch_size or 0)] or divisors[-1:]
    yield [_with(config, training=_split(config, size)) for size in promising]
    if "block" in after:
        yield [_with(config, compute={"recompute": "block"})]
    if compute.dtype != "bfloat16":
        yield [_with(config, compute={"dtype": "bfloat16"})]


def _split(config: Config, batch_size: int) -> dict[str, int]:
    """Returns the options that cut the same batch in smaller micro-batches."""
    training = config.training
    return {"batch_size": batch_size, "micro_batches": training.micro_batches * training.batch_size // batch_size}


def _first_that_fits(candidates: list[Config], plan: Plan) -> tuple[Config, int] | None:
    """Returns the first candidate that fits, and the bytes that its compiled program needs; None where none does."""
    assert plan.capacity is not None
    for candidate in candidates:
        if least(candidate) <= plan.capacity:
            changed = make(candidate, step.compile_step(candidate), Capacity(plan.capacity, plan.source))
            if changed.fits:
                return candidate, changed.total
    return None


def _words(config: Config, changed: Config) -> str:
    """Returns the command-line options that turn `config` into `changed`."""
    words = []
    for section in ("compute", "training"):
        before, after = (dataclasses.asdict(getattr(of, section)) for of in (config, changed))
        words += [
            f"--{section}.{key.replace('_', '-')} {value}" for key, value in after.items() if value != before[key]
        ]
    return " ".join(words)


def _with(config: Config, **sections: dict[str, Any]) -> Config:
    """Returns the configuration with some options of some sections changed."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)
