"""The train step compiled before there is a state, and the memory that it may have.

What a program needs is known once it is compiled: so the step is compiled from shapes alone, and the loop runs that
very program.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from jaxgpt import out_of_memory
from jaxgpt.data.loader import Batch
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Compute, Config
from jaxgpt.parallel import processes
from jaxgpt.training.step import TrainState, init_params, init_state, layout_of, make_train_step, specs, state_of

CGROUPS = Path("/sys/fs/cgroup")


def shapes(config: Config) -> tuple[TrainState, None, Batch]:
    """The shapes of a train step's arguments: the state, what is frozen (nothing), and the batch."""
    training = config.training
    tokens = jax.ShapeDtypeStruct((training.micro_batches, training.batch_size, training.sequence_length), np.int32)
    return state_shapes(config), None, Batch(tokens, tokens)


def state_shapes(config: Config) -> TrainState:
    """Those of `init_state`."""
    return _state_shapes(_without_recompute(config))


@functools.lru_cache
def _state_shapes(config: Config) -> TrainState:
    return jax.eval_shape(lambda: init_state(config))


def compile_step(config: Config) -> jax.stages.Compiled:
    """The train step of this configuration, which must have its sizes filled in and no "auto" in `compute`."""
    return make_train_step(config).lower(*shapes(config)).compile()


def initial_state(config: Config, given: Params | None = None) -> TrainState:
    """`init_state`, in two programs: what the random weights need while they are drawn is gone when the moments come.

    In one, a run with small batches would need more for its first state than for its steps, which the plan is of. With
    `given` parameters none are drawn.
    """
    made = jax.block_until_ready(random_params(config) if given is None else given)
    _, rest = _first_programs(_without_recompute(config))
    return TrainState(made, *rest())


def random_params(config: Config) -> Params:
    """Those of `init_state`. JAX doesn't wait until they are drawn."""
    params, _ = _first_programs(_without_recompute(config))
    return params()


def _without_recompute(config: Config) -> Config:
    """Whatever level is chosen, the first state is the same, and so are the programs that make it."""
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, recompute="none"))


@functools.lru_cache
def _first_programs(config: Config) -> tuple[Callable[[], Params], Callable[[], tuple[Any, ...]]]:
    layout = layout_of(config)
    where = layout.shardings(specs(layout))
    params, rest = (where.params, where[1:]) if where else (None, None)
    return (
        jax.jit(lambda: init_params(config), out_shardings=params),
        jax.jit(lambda: state_of(state_shapes(config).params, config)[1:], out_shardings=rest),
    )


class Capacity(NamedTuple):
    bytes: int | None  # None where nobody says
    source: str  # what it is, for people


def capacity(compute: Compute) -> Capacity:
    """The memory that a run may have: `compute.memory_limit_gib`, else what the device or the system has left.

    Of several processes the least, so that all of them compile the same program.
    """
    all_of_them = [Capacity(*found) for found in processes.talk.from_all(_own_capacity(compute))]
    return min(all_of_them, key=lambda found: -1 if found.bytes is None else found.bytes)


def _own_capacity(compute: Compute) -> Capacity:
    if compute.memory_limit_gib:
        return Capacity(int(compute.memory_limit_gib * 2**30), "--compute.memory-limit-gib")
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}  # None on a CPU
    if "bytes_limit" in stats:
        return Capacity(
            stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"what JAX has of the {device.device_kind}"
        )
    if device.platform == "cpu":
        left = [*_system_left(), *_cgroups_left(CGROUPS, Path("/proc/self/cgroup"))]
        if left:
            return Capacity(min(left), "what is available to this process")
    return Capacity(None, f"{device.device_kind} doesn't say what it has")


def _system_left() -> list[int]:
    """Returns the bytes that the system has left, and those of the address space under a limit of the shell's."""
    with contextlib.suppress(Exception):  # of many types: where there is no /proc, or half of one
        left = [psutil.virtual_memory().available]
        limit = out_of_memory.address_space()
        if limit is not None:
            left.append(max(limit - psutil.Process().memory_info().vms, 0))
        return left
    return []


def _cgroups_left(root: Path, membership: Path) -> list[int]:
    """Bytes left under each memory limit that Linux control groups set this process, of version 1 or 2.

    A limit holds for all groups below it, so those above this process's own count too. Inside a container the path that
    the kernel tells may be the host's; the root of what is mounted there is then the container's own group.
    """
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if "memory" in controllers.split(","):
            top, limit, usage, reclaimable = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        elif not controllers:
            top, limit, usage, reclaimable = root, "memory.max", "memory.current", ""
        else:
            continue
        group = Path(os.path.normpath(f"/{path.strip('/')}")).relative_to("/")
        for folder in (group, *group.parents):
            found = _number(top / folder / limit)
            if found is not None:
                used = (_number(top / folder / usage) or 0) - _cached(top / folder, f"{reclaimable}inactive_file")
                left.append(max(found - used, 0))
    return left


def _number(path: Path) -> int | None:
    """The number in the file; None where there is no such file, or no limit in it ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cached(group: Path, key: str) -> int:
    """Bytes of files that the kernel keeps for the group and gives up when memory is asked for."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
