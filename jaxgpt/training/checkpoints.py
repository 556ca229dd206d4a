"""A run's checkpoints, written and read by orbax.

    checkpoints/STEP/params       the parameters, alone: what generation and evaluation read
    checkpoints/STEP/optimizer    the rest of the train state
    checkpoints/STEP/about        JSON: the step, the model's shape, the tokenizer
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxgpt.config import Model
from jaxgpt.errors import RunError, UserError
from jaxgpt.models import gpt2
from jaxgpt.training.step import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns there of items that were not asked for


def save(folder: Path, state: TrainState, model: Model, tokenizer: dict[str, Any]) -> Path:
    """Writes the state under its step and returns where. A checkpoint appears whole or not at all.

    RunError where the disk is full or can't be written.
    """
    step = int(state.step)
    optimizer = {
        "moments": state.moments,
        "step": state.step,
        "key": jax.random.key_data(state.key),
        "nonfinite": state.nonfinite,
    }
    about = {"step": step, "model": dataclasses.asdict(model), "tokenizer": tokenizer}
    try:
        with ocp.CheckpointManager(folder.absolute()) as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(optimizer),
                    about=ocp.args.JsonSave(about),
                ),
            )
            manager.wait_until_finished()
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
        raise RunError(f"{folder}: the checkpoint of step {step} could not be written: {error}") from error
    return folder / str(step)


def load_params(run: Path, model: Model) -> tuple[gpt2.Params, dict[str, Any]]:
    """The newest checkpoint's parameters, and its `about`.

    UserError where there is no checkpoint, where it is damaged, and where it is another model's than `model`, whose
    vocabulary size may be 0 for whatever the checkpoint has.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no checkpoint. Has the run ended, or been stopped with Ctrl-C?")
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{folder}: there is no whole checkpoint. Has the run ended, or been stopped with Ctrl-C?")
        try:
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
            _check_same_model(folder / str(step), about["model"], model)
            saved = Model(**about["model"])
            target = jax.eval_shape(lambda: gpt2.init(saved, jax.random.key(0)))
            params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))).params
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / str(step)}: the checkpoint can't be read: {error}") from error
    return params, about


def _check_same_model(where: Path, saved: dict[str, Any], model: Model) -> None:
    expected = dataclasses.asdict(model)
    if not expected["vocabulary_size"]:
        del expected["vocabulary_size"]
    different = [f"{key} is {saved.get(key)} there and {value} here"
                 for key, value in expected.items() if saved.get(key) != value]
    if different:
        raise UserError(
            f"{where}: a checkpoint of another model than the run's config.toml describes: {', '.join(different)}"
        )
