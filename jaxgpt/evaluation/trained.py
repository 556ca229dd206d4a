"""A run's model, ready to be evaluated on this machine's devices."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import compilation_cache, settings
from jaxgpt.config import Config, Model, Parallel
from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.models.blocks import Params
from jaxgpt.parallel import mesh
from jaxgpt.training import checkpoints


class Trained(NamedTuple):
    config: Config  # the run's, but for how it is divided among devices: each has all parameters
    params: Params
    tokenizer: tokenizers.Tokenizer
    about: dict[str, Any]  # what its checkpoint says of itself
    damaged: list[str]  # a message for each newer checkpoint that isn't whole


def load(run: Path, devices: int = 0) -> Trained:
    """The newest whole checkpoint of a run, on so many devices (0: all).

    UserError where there is no such run, no whole checkpoint of it, and where there are fewer devices.
    """
    if not (run / "config.toml").is_file():
        raise UserError(f"--run {run}: not a run's folder (it has no config.toml){settings.runs_near(run)}")
    config = settings.read(run / "config.toml")
    settings.check(config)
    compilation_cache.use(config.run.compilation_cache)
    parallel = Parallel(devices=devices)
    everywhere = NamedSharding(mesh.make(parallel), PartitionSpec())
    params, found = checkpoints.load_params(run, config.model)
    model = Model(**found.about["configuration"]["model"])
    # One layer is compiled and not all of them, since there is a program for each length.
    compute = dataclasses.replace(config.compute, layers="scanned")
    config = dataclasses.replace(config, model=model, compute=compute, parallel=parallel)
    tokenizer = tokenizers.from_state(found.about.get("tokenizer", {}))
    if everywhere.mesh.size > 1:
        params = jax.device_put(params, everywhere)
    return Trained(config, params, tokenizer, found.about, found.damaged)
