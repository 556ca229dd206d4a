"""Loads a model to draw from or to score: a run of ours, or weights in any other format that is read."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import compilation_cache, files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import detect_format, huggingface, peft, runs, tensors
from jaxgpt.interop.tensors import WeightSource
from jaxgpt.options import checks
from jaxgpt.options.config import Compute, Config, Parallel
from jaxgpt.parallel import mesh
from jaxgpt.runs.about import About
from jaxgpt.runs.checkpoints import Trained
from jaxgpt.terminal import command, say


def is_run(folder: Path) -> bool:
    """Returns whether weights are a run's of ours; what isn't there counts as one, for the message about it."""
    foreign = folder.is_file() or any((folder / name).exists() for name in (huggingface.CONFIG, peft.CONFIG))
    return not foreign or files.exists(folder / "config.toml")


def is_on_hub(name: str) -> bool:
    """Returns whether a name that is no path is OWNER/NAME of a model on the hub; one in runs/ is a run's."""
    first, _, rest = name.partition("/")
    there = files.exists(Path(name)) or files.exists(Path(first))
    return bool(rest and detect_format.HUB_NAME.fullmatch(name)) and first != "runs" and not there


def template_of(source: WeightSource) -> dict[str, Any]:
    """Returns the state of the chat template that belongs to weights; {} where they have none."""
    return source.template.state() if source.template else {}


def load(name: str, devices: int = 0) -> Trained:
    """Returns a model with its parameters on each of so many devices; 0 takes all devices.

    UserError as `runs.load` and `detect_format.open_weights` raise it, and where weights name no tokenizer.
    """
    if is_run(Path(name)) and not is_on_hub(name):
        return runs.load(Path(name), devices, detect_format.open_weights)
    source = detect_format.open_weights(name)
    if source.tokenizer is None:
        why = (
            source.notes[0] if source.unreadable_tokenizer else "they don't say with which tokenizer they were trained"
        )
        raise UserError(
            f"--run {shown(name)}: {why}. Make a run of these weights that has another: "
            f"{command('convert', name, 'runs/NAME', '--tokenizer', 'TOKENIZER')}"
        )
    for note in source.notes:
        say(f"{shown(source.where)}: {note}", error=True)
    dtype = "bfloat16" if source.dtype == "bfloat16" else "float32"
    config = Config(
        model=source.model,
        compute=Compute(dtype=dtype, parameters=dtype, layers="scanned"),
        parallel=Parallel(devices=devices),
    )
    checks.check(config)
    compilation_cache.use("")
    everywhere = NamedSharding(mesh.make(config.parallel), PartitionSpec())
    params = jax.tree.map(lambda array: tensors.cast(array, tensors.DTYPES[dtype], name), source.load())
    told = About(
        step=0,
        configuration=dataclasses.asdict(config),
        tokenizer=source.tokenizer.state(),
        template=template_of(source),
        versions={},
        sequences_per_step=0,
        text={},
        lengths={},
        base={},
        best={},
        kept={},
        converted_from=source.where,
    )
    return Trained(config, jax.device_put(params, everywhere), source.tokenizer, told)
