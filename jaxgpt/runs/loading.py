"""A run's trained model, loaded on this machine's devices."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import compilation_cache, files
from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.models.blocks import Params
from jaxgpt.options import settings
from jaxgpt.options.config import Config, Parallel
from jaxgpt.parallel import mesh
from jaxgpt.runs import checkpoints
from jaxgpt.runs.about import About, model_of


class Trained(NamedTuple):
    config: Config  # as `settings.read_trained` reads it, with the devices that `load` was given
    params: Params
    tokenizer: tokenizers.Tokenizer
    about: About  # the checkpoint's metadata
    damaged: list[str]  # a message for each newer checkpoint that isn't whole


def load(run: Path, devices: int = 0) -> Trained:
    """Returns the model of a run's newest whole checkpoint.

    Args:
        run: The run's folder.
        devices: Number of devices, each of which gets all parameters; 0 takes all devices.

    Raises:
        UserError: There is no such run, it has no whole checkpoint, or there are fewer devices.
    """
    if not files.exists(run / "config.toml"):
        raise UserError(f"--run {shown(run)}: not a run's folder (it has no config.toml){settings.runs_near(run)}")
    config = settings.read_trained(run)
    settings.check(config)
    compilation_cache.use("")
    parallel = Parallel(devices=devices)
    everywhere = NamedSharding(mesh.make(parallel), PartitionSpec())
    params, found = checkpoints.load_params(run, config.model)
    model = model_of(found.about)
    # Scanned layers: one is compiled and not all of them, since there is a program for each length.
    compute = dataclasses.replace(config.compute, layers="scanned")
    config = dataclasses.replace(config, model=model, compute=compute, parallel=parallel)
    tokenizer = checkpoints.tokenizer_of(found)
    if everywhere.mesh.size > 1:
        params = jax.device_put(params, everywhere)
    return Trained(config, params, tokenizer, found.about, found.damaged)
