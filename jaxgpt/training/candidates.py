"""The ways to compute a step that `compute.fit` may choose among, with an estimate of the memory and time of each."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxgpt.models.blocks import ELSEWHERE, MOST_UNROLLED, RECOMPUTE_LEVELS
from jaxgpt.options import fit
from jaxgpt.options.config import Config
from jaxgpt.options.settings import changed
from jaxgpt.parallel.mesh import SHARDS
from jaxgpt.training import host_memory
from jaxgpt.training.estimate import estimate
from jaxgpt.training.memory_plan import NOTHING_ELSE, Else
from jaxgpt.training.state import layout_of
from jaxgpt.training.step_time import Speeds, speeds_here, step_seconds

CHUNKS = (512, 128)  # of the classifier, beside the one that is asked for; below, its products are slow

ElseOf = Callable[[Config], Else]


def nothing_else(config: Config) -> Else:
    """Returns that a run has nothing beside its step."""
    return NOTHING_ELSE


class Candidate(NamedTuple):
    """A configuration with nothing open, and what it would take."""

    config: Config
    bytes: int  # estimated, on one device
    seconds: float  # for an order alone


class Place(NamedTuple):
    """Devices that a run is to fit."""

    devices: int
    gpu: bool
    hosts: bool  # whether moments may be in the host's memory, and are then out of the device's
    speeds: Speeds


def place_here(config: Config) -> Place:
    """Returns the devices of this process."""
    device = jax.local_devices()[0]
    return Place(
        layout_of(config).devices,
        device.platform != "cpu",
        host_memory.saves(device),
        speeds_here(config.compute.dtype),
    )


def candidates(config: Config, place: Place, elsewhere: ElseOf = nothing_else) -> list[Candidate]:
    """Returns the ways to compute this configuration's step that may be the best, the fastest first.

    One that is slower than another and needs as much is none. Without `compute.fit` they are the recompute levels in
    their order.
    """
    choices = {name: [fit.value(config, name)] for name in fit.FREE} | {fit.SPLIT: [config.training.batch_size]}
    choices |= {name: _choices(name, config, place) for name in fit.free(config)}
    found = []
    for size, level, chunk, zero, moments in itertools.product(*(choices[name] for name in fit.FREE)):
        changed = _changed(config, place, size, level, chunk, zero, moments)
        beside = elsewhere(changed)
        needs = estimate(with_layers(changed, place), place.devices, gpu=place.gpu).total
        needs = max(needs + beside.with_step, *beside.times.values(), 0)
        seconds = step_seconds(changed, place.devices, place.speeds) if config.compute.fit else 0.0
        found.append(Candidate(changed, needs, seconds))
    found.sort(key=lambda one: (one.seconds, _order(one.config)))
    if not config.compute.fit:
        return found
    least = itertools.accumulate((one.bytes for one in found), min)
    before = [None, *least]
    return [one for one, least in zip(found, before, strict=False) if least is None or one.bytes < least]


def open_options(config: Config, place: Place) -> list[str]:
    """Returns the options among whose values there is a choice."""
    return [name for name in fit.free(config) if len(_choices(name, config, place)) > 1]


def _order(config: Config) -> tuple[int, ...]:
    """Returns what orders candidates of the same time: less to do first."""
    compute, parallel = config.compute, config.parallel
    level = RECOMPUTE_LEVELS.index(compute.recompute)
    return level, parallel.zero, config.training.micro_batches, -compute.classifier_chunk, parallel.moments == "host"


def _choices(name: str, config: Config, place: Place) -> Sequence[Any]:
    match name:
        case "compute.recompute":
            return RECOMPUTE_LEVELS
        case "compute.classifier_chunk":
            chunk = config.compute.classifier_chunk
            return [chunk, *(size for size in CHUNKS if size < chunk)] if config.objective.classifies else [chunk]
        case "parallel.zero":
            sharded = place.devices > 1 and not config.parallel.reproducible
            return (0, 1, 2, 3) if sharded else [config.parallel.zero]
        case "parallel.moments":
            return ("device", "host") if place.hosts else [config.parallel.moments]
        case _:
            return _micro_batches(config, place.devices)


def _micro_batches(config: Config, devices: int) -> list[int]:
    """Returns the sizes of micro-batches that a step's sequences can be cut in, the largest first.

    Each divides among the devices, and into the sequences that a validation loss is of.
    """
    unit = SHARDS if config.parallel.reproducible else devices
    both, _ = fit.undivided(config)
    small = [size for size in range(1, math.isqrt(both) + 1) if both % size == 0]
    sizes = {size for size in (*small, *(both // size for size in small)) if size % unit == 0}
    return sorted(sizes, reverse=True)


def _changed(config: Config, place: Place, size: int, level: str, chunk: int, zero: int, moments: str) -> Config:
    training = config.training
    cut = fit.split(config, size)
    cut["evaluation_batches"] = training.evaluation_batches * training.batch_size // size
    layers = config.compute.layers
    if layers == "auto" and place.gpu and zero >= 2:
        layers = "scanned"  # written out, a GPU's program keeps all gradients whole
    return changed(
        config,
        compute={"recompute": level, "classifier_chunk": chunk, "layers": layers},
        parallel={"zero": zero, "moments": moments},
        training=cut,
    )


def with_layers(config: Config, place: Place) -> Config:
    """Returns the configuration with the form that its layers take in the program."""
    if config.compute.layers != "auto":
        return config
    most = MOST_UNROLLED["gpu"] if place.gpu else ELSEWHERE
    form = "unrolled" if config.model.layers <= most else "scanned"
    return changed(config, compute={"layers": form})
