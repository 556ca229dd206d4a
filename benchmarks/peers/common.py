"""Measures a train step written in JAX."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import spec as specs
from benchmarks.peers.spec import Spec
from jaxgpt.data.loader import Batch
from jaxgpt.models import family
from jaxgpt.models.blocks import Params
from jaxgpt.training import flops


class Program(NamedTuple):
    """A jitted step, (state, None, batch) to (state, metrics), its state donated; metrics has `loss`, `grad_norm`."""

    step: Any
    state: Any
    note: str = ""  # what to tell of how the step is computed


def run(who: str, make: Callable[[Spec, Params], Program]) -> None:
    """Measures the program that `make` builds, whose state holds the parameters it is given; prints the answer."""
    # A program out of the cache would say nothing of compile time.
    jax.config.update("jax_enable_compilation_cache", False)
    spec = specs.read()
    params, batch = load(spec)
    step, state, note = make(spec, params)
    del params

    started = time.perf_counter()
    compiled = step.lower(state, None, batch).compile()
    compile_seconds = time.perf_counter() - started
    seconds, results = [], []
    for _ in range(specs.WARM_UP + spec.steps):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, None, batch))
        seconds.append(time.perf_counter() - started)
        specs.progress(seconds)
        results.append((float(metrics.loss), float(metrics.grad_norm)))
    device = jax.devices()[0]
    memory = device.memory_stats() or {}  # None on a CPU
    specs.report(
        spec,
        who,
        seconds=seconds[specs.WARM_UP :],
        loss=results[0][0],
        grad_norm=results[0][1],
        compile_seconds=compile_seconds,
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
        peak_bytes=memory.get("peak_bytes_in_use") or specs.peak_resident_bytes(),
        device=device.device_kind,
        peak_flops=flops.peak(spec.compute),
        note=note,
    )


def load(spec: Spec) -> tuple[Params, Batch]:
    """Returns the parameters and the batch, of one micro-batch, in the spec's file."""
    shapes = jax.eval_shape(lambda: family(spec.model).init(spec.model, jax.random.key(0)))
    with np.load(spec.weights, allow_pickle=False) as arrays:
        params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.array(arrays[name(path)]), shapes)
        batch = jax.tree.map(jnp.array, Batch(arrays["tokens"][None], arrays["targets"][None]))
    return params, batch


def name(path: tuple) -> str:
    """Returns a leaf's place in the parameters as the spec's file names it, "blocks.qkv.weight"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
