"""One step of the very compiled program: what can only be seen there.

The program is given a state in the middle of a run, and a batch. Each trained tensor and each moment must then be what
the optimizer makes of the oracle's gradients, in float64 and of whole tensors; what is frozen must be what it was, to
the bit. So a write beyond a shard, memory that was given away too early, a part of the update that is lost, or an
adapter that never moves shows as a wrong number in the tensor that it is in.

The moments before the step are random, and as large as the gradients make them. With AdamW's first moments, 0, its
update would be the gradients' signs, which rounding decides wherever a gradient is nearly 0.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.models.blocks import arrange, stacked_marks
from jaxgpt.optimizers import adamw
from jaxgpt.options.config import Config
from jaxgpt.proof import as_run_optimizer
from jaxgpt.proof.as_run import NOTHING, Check, Row, Whole, compared, of_products, on_host, tensor_name
from jaxgpt.proof.as_run_optimizer import Expected, Rounding
from jaxgpt.proof.gradcheck_oracle import Tree
from jaxgpt.training.state import decays, shardings, specs

STEP = "the step"  # the name of its inputs
WHAT = ("parameters", "first moments", "second moments")
SEED = 5
FLOOR = 1e-3  # of the gradients' root mean square: the least deviation of the moments
ENOUGH = 0.1  # the deviation of a mean update rounded at random, relative to the update, that still says something


def rows(check: Check, compiled: jax.stages.Compiled) -> Iterator[Row]:
    """Yields the rows of a step: its loss, and its gradients' norm, parameters and moments."""
    config, layout = check.config, check.layout
    state, frozen, params, base = check.begin(ties=False)
    state = state._replace(step=_like(_step_of_full_rate(config), state.step))
    batch = check.batches().random(SEED)
    truth = check.oracle(params, base, batch, check.key(state))
    del params, base
    moments = _moments(truth.grads, config)
    state = state._replace(moments=_placed(moments, check))
    old, kept = on_host(state.params, layout).tensors, jax.tree.map(np.array, frozen)
    old = jax.tree.map(np.array, old)  # a copy: the step gives its memory to the new state
    rounding = Rounding(check.limit, *of_products(config, check.platform))
    update = as_run_optimizer.make_update(truth, int(state.step), config, rounding)

    new, metrics = compiled(state, frozen, batch)
    yield _number("loss", float(metrics.loss), truth.loss, check.limit)
    yield _number("gradients' norm", float(metrics.grad_norm), as_run_optimizer.norm(truth.grads), check.limit)
    if not metrics.taken:
        yield Row("parameters", STEP, math.inf, math.inf, check.limit, "the step is skipped")
    after = [on_host(tree, layout) for tree in (new.params, *new.moments)]
    yield from _tensors((old, *moments), after, truth.grads, update, config)
    yield from _frozen(kept, frozen, check.limit)


def _tensors(
    before: tuple[Tree, ...], after: list[Whole], grads: Tree, update: Callable[..., Expected], config: Config
) -> Iterator[Row]:
    """Yields the rows of the parameters and of both moments, tensor by tensor."""
    params = before[0]
    beside = grads, decays(params, config), _matrices(params, config), stacked_marks(params)
    trees = (*before, *(whole.tensors for whole in after), *beside)
    paths, structure = [path for path, _ in jax.tree.leaves_with_path(params)], jax.tree.structure(params)
    for path, *leaves in zip(paths, *map(structure.flatten_up_to, trees), strict=True):
        was, are, (grad, decay, columns, stacked) = leaves[:3], leaves[3:6], leaves[6:]
        expected, name = update(*was, grad, decay, columns), tensor_name(path)
        for at, (becomes, limit) in enumerate(zip(expected.arrays, expected.limits, strict=True)):
            inputs, fault = f"{STEP}, {WHAT[at]}", after[at].faults.get(name, "")
            yield _judged(name, inputs, (was[at], are[at], becomes), limit, stacked=stacked, fault=fault)


def _number(name: str, found: float, truth: float, limit: float) -> Row:
    error = abs(found - truth) / abs(truth or 1.0)
    return Row(name, STEP, error, error, limit)


def _step_of_full_rate(config: Config) -> int:
    return min(config.optimizer.warmup_steps, config.training.steps - 1)


def _like(value: int, array: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(value, array.dtype), array.sharding)


def _matrices(params: Tree, config: Config) -> Tree:
    """Returns for each tensor the columns of its matrices; None where there is none of Muon's."""
    return jax.tree_util.tree_map_with_path(
        lambda path, array: as_run_optimizer.matrices_beside(path, array.shape, config), params
    )


def _moments(grads: Tree, config: Config) -> adamw.Moments:
    """Returns moments of gradients as large as these, as float32, with None for second ones of Muon's matrices."""
    random = np.random.default_rng(SEED)
    leaves = jax.tree.leaves(grads)
    whole = as_run_optimizer.norm(grads) / math.sqrt(max(1, sum(leaf.size for leaf in leaves)))

    def second(grad: np.ndarray) -> np.ndarray:
        square = np.square(grad)
        return (np.mean(square) + square + (FLOOR * whole) ** 2) * (1 + random.random(grad.shape))

    seconds = jax.tree.map(second, grads)
    firsts = jax.tree.map(lambda square: np.sqrt(square) * random.standard_normal(square.shape), seconds)
    of_adamw = jax.tree.map(lambda array, beside: None if beside else array, seconds, _matrices(grads, config))
    return jax.tree.map(lambda array: array.astype(np.float32), adamw.Moments(firsts, of_adamw))


def _placed(moments: adamw.Moments, check: Check) -> adamw.Moments:
    """Shards whole, stacked moments over the devices, and moves them into the memory in which a run has them."""
    layout, config = check.layout, check.config
    on_devices, own = layout.shardings(specs(layout).moments), shardings(layout, config)
    place = [
        jax.jit(lambda tree: layout.shard(arrange(tree, config.compute)), out_shardings=where)
        for where in on_devices or (None, None)
    ]
    if own is None:
        return adamw.Moments(*(put(tree) for put, tree in zip(place, moments, strict=True)))
    return adamw.Moments(
        *(jax.device_put(put(tree), where) for put, tree, where in zip(place, moments, own.moments, strict=True))
    )


def _judged(name: str, inputs: str, arrays: tuple[np.ndarray, ...], limit: float, *, stacked: bool, fault: str) -> Row:
    """Returns the row of a tensor: how far its change is from the right one, relative to this.

    What the rounding of the new numbers to their own dtype explains is allowed too. The arrays are the old numbers, the
    new ones, and those that the new ones should be.
    """
    was, is_, becomes = arrays
    wide, moved = (np.asarray(array, np.float64) for array in (was, is_))
    change = becomes - wide
    row = compared(name, moved - wide, change, inputs, limit, stacked, fault)
    if row.fault:
        return row._replace(fault="it doesn't move" if row.fault == NOTHING else row.fault)
    eps = float(jnp.finfo(is_.dtype).eps)
    if is_.dtype == jnp.bfloat16:  # rounded at random, so that one number says nothing
        return _judged_on_average(row, wide, becomes, moved, eps)
    size, least = np.max(np.abs(becomes), initial=0.0), np.max(np.abs(change), initial=0.0)
    shares = [eps * size / least, eps * np.linalg.norm(becomes) / np.linalg.norm(change)] if least else [0.0]
    return row._replace(tolerance=row.tolerance + float(max(shares)))


def _judged_on_average(row: Row, was: np.ndarray, becomes: np.ndarray, is_: np.ndarray, eps: float) -> Row:
    """Judges numbers that are rounded at random: none is beyond its neighbours, and the mean change is right.

    The change, projected on the one expected, is 1 on average. A number is rounded by less than eps |θ|, and its
    variance is at most that times its change.
    """
    change, spacing = becomes - was, eps * np.maximum(np.abs(becomes), np.abs(was))
    beyond = np.abs(is_ - becomes) > spacing + row.tolerance * np.abs(change).max(initial=0.0)
    if np.any(beyond):
        return row._replace(fault="numbers beyond the neighbours of the right ones")
    square = float(np.sum(np.square(change)))
    deviation = math.sqrt(float(np.sum(np.square(change) * spacing * np.abs(change)))) / square if square else math.inf
    error = abs(float(np.sum((is_ - was) * change)) / square - 1) if deviation < ENOUGH else 0.0
    return row._replace(error=error, entry=error, tolerance=row.tolerance + 5 * min(deviation, ENOUGH))


def _frozen(before: Tree, after: Any, limit: float) -> Iterator[Row]:
    """Yields a row for each frozen tensor that has changed, or one for all of them."""
    if before is None:
        return
    changed = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, was), is_ in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if any(np.asarray(shard.data).tobytes() != was.tobytes() for shard in is_.addressable_shards)
    ]
    for name in changed:
        yield Row(name, STEP, math.inf, math.inf, limit, "frozen, and it changes")
    if not changed:
        yield Row("frozen tensors", STEP, 0.0, 0.0, limit)
