"""Reads weights from this project's own runs and checkpoints, and writes others' weights as a run."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.interop import tensors
from jaxgpt.interop.tensors import WeightSource
from jaxgpt.models.blocks import Params
from jaxgpt.options import settings
from jaxgpt.options.config import Compute, Config, Data, Model, Run
from jaxgpt.runs import checkpoints
from jaxgpt.runs.about import model_of


def open_checkpoint(folder: Path, *, newest: bool) -> WeightSource:
    """Opens a checkpoint, or the newest whole one of a run. UserError where it isn't whole, or there is none."""
    parts = ("params", "about")
    found = checkpoints.find(folder / "checkpoints", parts) if newest else checkpoints.at(folder, parts)
    dtype = found.about["configuration"].get("compute", {}).get("parameters", "float32")

    def load() -> Params:
        return jax.tree.map(np.asarray, checkpoints.params_of(found, tensors.DTYPES[dtype]))

    return WeightSource(
        where=str(found.path),
        kind="a run's checkpoint" if newest else "a checkpoint",
        model=model_of(found.about),
        dtype=dtype,
        tokenizer=checkpoints.tokenizer_of(found),
        load=load,
        notes=tuple(found.damaged),
    )


def write(
    folder: Path,
    params: Params,
    model: Model,
    dtype: str,
    tokenizer: tokenizers.Tokenizer | None,
    *,
    run: Path,
    origin: str,
) -> None:
    """Fills an empty folder, which will be at `run`, with a run of no steps, whose only checkpoint is that of step 0.

    The parameters are stacked NumPy arrays; `origin` says where they are from, for the run's note and messages.
    UserError where there is no tokenizer, or a number is beyond what the dtype can hold.
    """
    if tokenizer is None:
        raise UserError(f"{origin} doesn't say with which tokenizer it was trained: name it by --tokenizer")
    config = Config(
        model=model,
        compute=Compute(parameters="bfloat16" if dtype == "bfloat16" else "float32"),
        data=Data(tokenizer=tokenizer.name) if tokenizer.name in tokenizers.NAMES else Data(),  # type: ignore[arg-type]
        run=Run(name=run.name, folder=str(run.parent), note=f"converted from {origin}"),
    )
    settings.write(config, folder / "config.toml")
    about = {
        "configuration": dataclasses.asdict(config),
        "versions": settings.versions(),
        "tokenizer": tokenizer.state(),
        "converted_from": origin,
    }
    cast = jax.tree.map(lambda array: tensors.cast(array, tensors.DTYPES[dtype], "a tensor"), params)
    checkpoints.save_params(folder / "checkpoints" / "0", cast, about)
