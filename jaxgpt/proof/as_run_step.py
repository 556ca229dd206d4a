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
from jaxgpt.optimizers import adamw, schedules
from jaxgpt.options.config import Config
from jaxgpt.proof.as_run import NOTHING, Check, Row, compared, on_host, tensor_name
from jaxgpt.proof.gradcheck_oracle import Tree, Truth
from jaxgpt.training.state import decays, specs

STEP = "the step"  # the name of its inputs
WHAT = ("parameters", "first moments", "second moments")
SEED = 5
FLOOR = 1e-3  # of the gradients' root mean square: the least deviation of the moments
WIDE = 4  # times a gradient's relative error that an update may have, in which it is divided and squared
ENOUGH = 0.1  # the deviation of a mean update rounded at random, relative to the update, that still says something


def rows(check: Check, compiled: jax.stages.Compiled) -> Iterator[Row]:
    """Yields the rows of a step: its loss, and its gradients' norm, parameters and moments."""
    config, layout = check.config, check.layout
    state, frozen, params, base = check.begin(ties=False)
    state = state._replace(step=_like(_step_of_full_rate(config), state.step))
    batch = check.batches().random(SEED)
    truth = check.oracle(params, base, batch, check.key(state))
    del params, base
    moments = _moments(truth.grads)
    state = state._replace(moments=adamw.Moments(*(_placed(tree, check) for tree in moments)))
    old, kept = on_host(state.params, layout).tensors, jax.tree.map(np.array, frozen)
    old = jax.tree.map(np.array, old)  # a copy: the step gives its memory to the new state
    update = _make_update(truth, int(state.step), config)

    new, metrics = compiled(state, frozen, batch)
    yield _number("loss", float(metrics.loss), truth.loss, check.limit)
    yield _number("gradients' norm", float(metrics.grad_norm), _norm(truth.grads), check.limit)
    if not metrics.taken:
        yield Row("parameters", STEP, math.inf, math.inf, check.limit, "the step is skipped")
    before, after = adamw.Moments(*moments), [on_host(tree, layout) for tree in (new.params, *new.moments)]
    trees = (old, *before, truth.grads, decays(old, config), stacked_marks(old), *(tree.tensors for tree in after))
    paths = [path for path, _ in jax.tree.leaves_with_path(old)]
    for path, *leaves in zip(paths, *map(jax.tree.leaves, trees), strict=True):
        was, (grad, decay, stacked), is_ = leaves[:3], leaves[3:6], leaves[6:]
        becomes, name = update(*was, grad, decay), tensor_name(path)
        for at, what in enumerate(WHAT):
            arrays, fault = (was[at], is_[at], becomes[at]), after[at].faults.get(name, "")
            yield _judged(name, f"{STEP}, {what}", arrays, WIDE * check.limit, stacked=stacked, fault=fault)
    yield from _frozen(kept, frozen, check.limit)


def _norm(grads: Tree) -> float:
    return math.sqrt(sum(float(np.vdot(grad, grad)) for grad in jax.tree.leaves(grads)))


def _number(name: str, found: float, truth: float, limit: float) -> Row:
    error = abs(found - truth) / abs(truth or 1.0)
    return Row(name, STEP, error, error, limit)


def _step_of_full_rate(config: Config) -> int:
    return min(config.optimizer.warmup_steps, config.training.steps - 1)


def _like(value: int, array: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(value, array.dtype), array.sharding)


def _moments(grads: Tree) -> adamw.Moments:
    """Returns AdamW's moments of gradients as large as these, as float32."""
    random = np.random.default_rng(SEED)
    leaves = jax.tree.leaves(grads)
    whole = math.sqrt(sum(float(np.vdot(leaf, leaf)) for leaf in leaves) / max(1, sum(leaf.size for leaf in leaves)))

    def second(grad: np.ndarray) -> np.ndarray:
        square = np.square(grad)
        return (np.mean(square) + square + (FLOOR * whole) ** 2) * (1 + random.random(grad.shape))

    seconds = jax.tree.map(second, grads)
    firsts = jax.tree.map(lambda square: np.sqrt(square) * random.standard_normal(square.shape), seconds)
    return jax.tree.map(lambda array: array.astype(np.float32), adamw.Moments(firsts, seconds))


def _placed(whole: Tree, check: Check) -> Tree:
    """Shards whole, stacked tensors over the devices, in their own dtype."""
    layout, compute = check.layout, check.config.compute
    place = jax.jit(
        lambda tree: layout.shard(arrange(tree, compute)), out_shardings=layout.shardings(specs(layout).params)
    )
    return place(whole)


def _make_update(truth: Truth, step: int, config: Config) -> Callable[..., tuple[np.ndarray, ...]]:
    """Returns what AdamW makes of a tensor, its moments and its gradient before clipping, in float64.

    It is written down here a second time, by NumPy: the step's own could not be found to be wrong with itself.
    """
    options, t = config.optimizer, step + 1
    norm, limit = _norm(truth.grads), options.clip_norm
    factor = min(1.0, limit / norm) if limit and norm else 1.0
    rate = float(schedules.learning_rate(jnp.int32(step), config.training.steps, options))

    def update(param: Any, first: Any, second: Any, grad: Any, decay: bool) -> tuple[np.ndarray, ...]:
        param, first, second, grad = (np.asarray(array, np.float64) for array in (param, first, second, grad))
        first = options.beta1 * first + (1 - options.beta1) * (factor * grad)
        second = options.beta2 * second + (1 - options.beta2) * np.square(factor * grad)
        scaled = first / (1 - options.beta1**t) / (np.sqrt(second / (1 - options.beta2**t)) + options.epsilon)
        return param - rate * (scaled + options.weight_decay * decay * param), first, second

    return update


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
