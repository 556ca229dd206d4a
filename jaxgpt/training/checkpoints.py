"""A run's checkpoints, written and read by orbax.

checkpoints/STEP/params       the parameters, alone: what generation and evaluation read
checkpoints/STEP/optimizer    the rest of the train state
checkpoints/STEP/about        JSON: the step, the model's shape, the tokenizer
"""

import dataclasses
import gc
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxgpt.config import Model
from jaxgpt.errors import RunError, UserError
from jaxgpt.models import gpt2
from jaxgpt.optimizers import adamw
from jaxgpt.training.step import TrainState

T = TypeVar("T")


def save(folder: Path, state: TrainState, model: Model, tokenizer: dict[str, Any]) -> Path:
    """Writes the state under its step and returns where. A checkpoint appears whole or not at all.

    RunError where the disk is full or can't be written.
    """
    step = int(state.step)
    optimizer = {
        "moments": adamw.Moments(*map(gpt2.stacked, state.moments)),
        "step": state.step,
        "key": jax.random.key_data(state.key),
        "nonfinite": state.nonfinite,
    }
    about = {"step": step, "model": dataclasses.asdict(model), "tokenizer": tokenizer}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(gpt2.stacked(state.params)),
        optimizer=ocp.args.StandardSave(optimizer),
        about=ocp.args.JsonSave(about),
    )

    def write() -> None:
        with ocp.CheckpointManager(folder.absolute()) as manager:
            manager.save(step, args=items)
            manager.wait_until_finished()

    try:
        _call_orbax(write)
    except OSError as error:
        raise RunError(f"{folder}: the checkpoint of step {step} could not be written: {error}") from None
    return folder / str(step)


def load_params(run: Path, model: Model) -> tuple[gpt2.Params, dict[str, Any]]:
    """The newest checkpoint's parameters, and its `about`.

    UserError where there is no checkpoint, where it is damaged, and where it is another model's than `model`, whose
    vocabulary size may be 0 for whatever the checkpoint has.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no checkpoint. Has the run ended, or been stopped with Ctrl-C?")

    def read() -> tuple[gpt2.Params, dict[str, Any]]:
        with ocp.CheckpointManager(folder.absolute()) as manager:
            step = manager.latest_step()
            if step is None:
                raise UserError(f"{folder}: no checkpoint is whole. Has the run ended, or been stopped with Ctrl-C?")
            about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
            _check_same_model(folder / str(step), about["model"], model)
            saved = Model(**about["model"])
            target = jax.eval_shape(lambda: gpt2.init(saved, jax.random.key(0)))
            params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target))).params
            return params, about

    try:
        return _call_orbax(read)
    except OSError as error:
        raise UserError(
            f"{folder}: the newest checkpoint is damaged ({error}). Restore it from a copy, or train anew"
        ) from None


def _call_orbax(call: Callable[[], T]) -> T:
    """The call's result; of whatever exception, an OSError with its first line.

    Orbax reads and writes many arrays at once. When one fails, it leaves the others behind, and each would print a
    traceback when it ends or is collected, after the one message that we give. It also logs what was not asked for.
    """
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # of many types: Orbax even raises Exception itself
            message = (str(error) or type(error).__name__).splitlines()[0].partition(" See full")[0]
        time.sleep(0.5)
        gc.collect()
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    raise OSError(message)


def _check_same_model(where: Path, saved: dict[str, Any], model: Model) -> None:
    expected = dataclasses.asdict(model)
    if not expected["vocabulary_size"]:
        del expected["vocabulary_size"]
    different = [
        f"{key} is {saved.get(key)} there and {value} here"
        for key, value in expected.items()
        if saved.get(key) != value
    ]
    if different:
        raise UserError(
            f"{where}: a checkpoint of another model than the run's config.toml describes: {', '.join(different)}"
        )
