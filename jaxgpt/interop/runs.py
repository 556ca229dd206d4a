"""Reads weights from this project's own runs and checkpoints, and writes others' weights as a run."""

import dataclasses
from pathlib import Path

import jax

from jaxgpt.data import chat_templates, tokenizers
from jaxgpt.data.chat_templates import Template
from jaxgpt.errors import UserError
from jaxgpt.interop import bases, tensors
from jaxgpt.interop.tensors import AdapterSource, WeightSource
from jaxgpt.models.blocks import Adapters, Params
from jaxgpt.options import settings
from jaxgpt.options.config import Compute, Config, Data, Model, Run
from jaxgpt.runs import checkpoints
from jaxgpt.runs.about import about_base, lora_of, model_of


def load(run: Path, devices: int, open_weights: bases.Open) -> checkpoints.Trained:
    """Returns a run's model as `checkpoints.load` does; adapters are merged into a base that `open_weights` opens."""

    def whole(params: Params, found: checkpoints.Found) -> Params:
        return bases.merged(params, found, open_weights) if lora_of(found.about).rank else params

    return checkpoints.load(run, devices, whole)


def open_checkpoint(folder: Path, open_weights: bases.Open, *, newest: bool) -> WeightSource:
    """Opens a checkpoint, or the newest whole one of a run. UserError where it isn't whole, or there is none.

    Adapters are merged into their base, which `open_weights` opens.
    """
    parts = ("params", "about")
    found = checkpoints.find(folder / "checkpoints", parts) if newest else checkpoints.at(folder, parts)
    checkpoints.check_draws(found)
    dtype = found.about["configuration"].get("compute", {}).get("parameters", "float32")
    options, base, template = lora_of(found.about), found.about["base"], found.about["template"]

    def load() -> Params:
        if options.rank:
            return bases.as_numpy(bases.merged(checkpoints.params_of(found), found, open_weights), dtype)
        return checkpoints.numpy_params_of(found, tensors.DTYPES[dtype])

    def load_adapters() -> Adapters:
        return bases.as_numpy(checkpoints.params_of(found), "float32")

    def readers() -> Params:
        return checkpoints.leaf_readers_of(found, tensors.DTYPES[dtype])

    adapters = AdapterSource(options, base.get("name", ""), load_adapters, base.get("sha256", ""))
    return WeightSource(
        where=str(found.path),
        kind="a run's checkpoint" if newest else "a checkpoint",
        model=model_of(found.about),
        dtype=dtype,
        tokenizer=checkpoints.tokenizer_of(found),
        load=load,
        readers=None if options.rank else readers,
        notes=tuple(found.damaged),
        template=chat_templates.from_state(template) if template else None,
        adapters=adapters if options.rank else None,
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
    template: Template | None = None,
    adapters: AdapterSource | None = None,
) -> None:
    """Fills an empty folder, which will be at `run`, with a run of no steps, whose only checkpoint is that of step 0.

    The parameters are stacked NumPy arrays, whole ones or, with `adapters`, what that loads. `origin` says where they
    are from, for the run's note and messages.
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
    if adapters:
        config = settings.changed(config, lora=adapters.options, training={"init_from": adapters.base})
    settings.write(config, folder / "config.toml")
    about = {
        "configuration": dataclasses.asdict(config),
        "versions": settings.versions(),
        "tokenizer": tokenizer.state(),
        "converted_from": origin,
        **({"template": template.state()} if template else {}),
        **({"base": about_base(adapters.base, adapters.fingerprint)} if adapters else {}),
    }
    cast = jax.tree.map(lambda array: tensors.cast(array, tensors.DTYPES[dtype], "a tensor"), params)
    checkpoints.save_params(folder / "checkpoints" / "0", cast, about)
