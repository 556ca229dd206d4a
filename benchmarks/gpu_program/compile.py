"""Compiles a train step for an NVIDIA GPU on a machine without one, by JAX's CUDA plugin alone.

XLA is told what the card is (`cards.py`) rather than asking one. It times nothing then: products are cuBLASLt's, and
the algorithms of cuBLASLt and cuDNN stay open, as does the memory that they ask for beyond 4 MiB.
"""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from benchmarks.gpu_program.cards import CUDNN, Card
from benchmarks.peers import jax_grad
from benchmarks.peers.spec import Spec
from jaxgpt.errors import RunError, UserError
from jaxgpt.kernels import choose, cudnn_attention
from jaxgpt.models import gpt2
from jaxgpt.models.blocks import arrange
from jaxgpt.options.config import Config
from jaxgpt.training import state, step

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
# Without a card nothing is timed, and Triton's products with tiles that nobody chose say nothing.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Program(NamedTuple):
    text: str  # XLA's optimised program of one device
    temporaries: int  # bytes, of one device
    arguments: int


def missing() -> str:
    """Returns why nothing can be compiled for a GPU here, or ""."""
    if any(_is_there(plugin) for plugin in PLUGINS):
        return ""
    return (
        "compiling for a GPU needs JAX's CUDA plugin, which isn't installed here: make gpu-program installs it into an "
        "environment of its own (180 MB; neither a GPU nor a driver is needed)"
    )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


@contextlib.contextmanager
def devices_of(card: Card, count: int = 1) -> Iterator[list[Any]]:
    """Makes all code believe that this machine has so many of these cards; yields them. Nothing can be run on them.

    Raises:
        UserError: The plugin isn't there.
    """
    if why := missing():
        raise UserError(why)
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=card.target(), topology=f"1x1x{count}")
    except Exception as error:  # whatever the plugin says
        raise RunError(f"JAX's CUDA plugin doesn't compile for {card.name}: {error}") from error
    there = list(topology.devices)
    with contextlib.ExitStack() as stack:
        for module, name, fake in (
            (jax, "devices", lambda *_: there),
            (jax, "local_devices", lambda *_, **__: there),
            (jax, "default_backend", lambda: "gpu"),
            (jax, "jit", functools.partial(_jit, jax.jit)),
            (choose, "_cuda_capability", lambda: card.capability),
            (cudnn_attention.cudnn, "check_cudnn_version", lambda: 10000 * CUDNN[0] + 100 * CUDNN[1]),
        ):
            stack.enter_context(mock.patch.object(module, name, fake))
        # What Pallas asks for the card from JAX 0.11 on.
        named = AbstractMesh((), (), abstract_device=AbstractDevice(card.name, card.cores, "gpu"))
        stack.enter_context(jax.sharding.use_abstract_mesh(named))
        stack.enter_context(jax.default_matmul_precision("default"))
        stack.callback(_forget_devices)
        _forget_devices()
        yield there


def _jit(jit: Callable, function: Callable, *, inline: bool = False, **options: Any) -> Callable:
    """`jax.jit`, but what is to be inlined is traced in its place each time: JAX would lose the lines it is from."""
    return function if inline else jit(function, **options)


def _forget_devices() -> None:
    """Drops cached results about other devices."""
    state.layout_of.cache_clear()
    jax.clear_caches()


def ours(config: Config, devices: list[Any]) -> Program:
    """Compiles this project's train step; within `devices_of`."""
    shapes, where = step.shapes(config), state.shardings(state.layout_of(config), config)
    if config.parallel.moments == "host":
        placed = jax.tree.map(lambda where, tree: _in(where, tree), where, shapes[0])
        shapes = (placed, *shapes[1:])
    return _compiled(step.make_train_step(config), shapes, devices)


def _in(where: Any, shapes: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)


def automatic(config: Config, layers: str, devices: list[Any]) -> Program:
    """Compiles the peer with `jax.value_and_grad`, its layers "scanned" or "unrolled"; within `devices_of`."""
    training = config.training
    spec = Spec(
        model=config.model,
        batch=training.batch_size,
        sequence=training.sequence_length,
        dtype=config.compute.dtype,
        steps=1,
        weights="",
        optimizer=config.optimizer,
        compute=dataclasses.replace(config.compute, layers=layers),  # type: ignore[arg-type]
    )
    made = []

    def first_state() -> Any:
        made.append(jax_grad.make(spec, arrange(gpt2.init(spec.model, jax.random.key(0)), spec.compute)))
        return made[0].state

    first = jax.eval_shape(first_state)
    return _compiled(made[0].step, (first, *step.shapes(config)[1:]), devices)


def _compiled(function: Any, shapes: Any, devices: list[Any]) -> Program:
    where = SingleDeviceSharding(devices[0]) if len(devices) == 1 else None  # several are in the step's own shardings
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or where), shapes)
    compiled = function.lower(*arguments).compile(compiler_options=OPTIONS)
    memory = compiled.memory_analysis()
    return Program(compiled.as_text(), memory.temp_size_in_bytes, memory.argument_size_in_bytes)
