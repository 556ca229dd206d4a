"""A run's checkpoints as they lie on the disk, and reading them with orbax. `saving.py` writes them.

checkpoints/STEP/params       the parameters, alone: what generation and evaluation read
checkpoints/STEP/optimizer    the rest of the train state
checkpoints/STEP/about        JSON: the step, the options, the tokenizer, the data, and how long the run's files were
checkpoints/STEP/SHA256SUMS   written last: a checkpoint without it was not finished
"""

import contextlib
import gc
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxgpt import files, out_of_memory
from jaxgpt.data import tokenizers
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.models import family
from jaxgpt.models.blocks import Params, are_stacked, stacked, unstacked
from jaxgpt.options import settings
from jaxgpt.options.config import Config, Model
from jaxgpt.parallel import processes
from jaxgpt.runs import checksums
from jaxgpt.runs.about import About, check_size, model_of, read_about
from jaxgpt.training.state import TrainState, on_trees

# Which there are


def whole_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that were written to their end, in order."""
    return [step for step in steps_of(folder) if checksums.is_there(folder / str(step))]


def steps_of(folder: Path) -> list[int]:
    """The steps of all checkpoints that have their name, which orbax gives them when all of their files are there.

    UserError where the folder can't be read, since a run that seems to have none is begun anew; and for a link: older
    checkpoints are deleted, and what it leads to may be another run's.
    """
    found = [folder / name for name in files.names(folder) if _STEP.fullmatch(name) and (folder / name).is_dir()]
    for path in found:
        if path.is_symlink():
            raise UserError(f"{shown(path)}: a link, and is not followed. Put the checkpoint itself in its place")
    return sorted(int(path.name) for path in found)


def unfinished(folder: Path) -> list[Path]:
    """What a killed process, or a full disk, has left half written, by the names that we and orbax give.

    What else lies in the folder is the user's.
    """
    begun = [
        folder / name
        for name in files.names(folder)
        if _TEMPORARY.fullmatch(name) or (_STEP.fullmatch(name) and not files.exists(folder / name / checksums.NAME))
    ]
    return [path for path in begun if path.is_dir() and not path.is_symlink()]


_STEP = re.compile("0|[1-9][0-9]{0,9}")
_TEMPORARY = re.compile(r"[0-9]{1,10}\.orbax-checkpoint-tmp(-[0-9]+)?")

# Reading


class Found(NamedTuple):
    """The newest checkpoint that is as it was written, and a message for each newer one that is not."""

    path: Path
    about: About
    damaged: list[str]


def find(folder: Path, parts: tuple[str, ...] | None = None) -> Found:
    """The newest whole checkpoint; with `parts`, one of which those folders are whole. All processes take the same.

    UserError where there is none, or none that is whole.
    """
    found = search(folder, parts)
    if isinstance(found, str):
        raise UserError(found)
    return found


def search(folder: Path, parts: tuple[str, ...] | None = None) -> Found | str:
    """`find`, but for why there is none that is whole: it is returned, and not raised."""
    name, messages = processes.talk.from_first(lambda: _newest_whole(folder, parts))
    if not name:
        return messages[-1]
    found = Found(folder / name, read_about(folder / name), messages)
    if found.about["step"] != int(name):
        raise UserError(f"{found.path}: says that it is of step {found.about['step']}. Restore it from a copy")
    return found


def _newest_whole(folder: Path, parts: tuple[str, ...] | None) -> tuple[str, list[str]]:
    """Its name, empty if there is none, and the messages."""
    files.check_within(folder, folder.parent)
    if not whole_steps(folder):
        return "", [f"{folder}: there is no whole checkpoint (has the run been saved yet?)"]
    damaged = []
    path, damage = folder, ""
    for step in reversed(steps_of(folder)):
        path = folder / str(step)
        damage = checksums.damage(path, parts)
        if not damage:
            return path.name, damaged
        damaged.append(f"{path}: this checkpoint is not whole ({damage}); the one before it is used")
    return "", [
        f"{path}: this checkpoint is not whole ({damage}), and there is no other that is. Restore it from a copy, or "
        "train anew"
    ]


def at(path: Path, parts: tuple[str, ...] | None = None) -> Found:
    """One checkpoint. UserError where it isn't whole; with `parts`, where one of those folders isn't."""
    damage = checksums.damage(path, parts)
    if damage:
        raise UserError(f"{path}: this checkpoint is not whole ({damage}). Restore it from a copy, or take another")
    return Found(path, read_about(path), [])


def load_params(run: Path, model: Model) -> tuple[Params, Found]:
    """The newest whole checkpoint's parameters, and where they come from.

    UserError as `find` raises it, and where it is another model's than `model`, whose vocabulary size may be 0 for
    whatever the checkpoint has.
    """
    found = find(run / "checkpoints", ("params", "about"))
    _check_same_model(found.path, found.about["configuration"]["model"], model)
    return params_of(found), found


def tokenizer_of(found: Found) -> Tokenizer:
    """A checkpoint's tokenizer. UserError where it has none that can be read."""
    try:
        return tokenizers.from_state(found.about["tokenizer"])
    except UserError as error:
        raise UserError(f"{found.path}: its tokenizer can't be read: {error}") from None


def params_of(found: Found) -> Params:
    """A checkpoint's parameters, in float32."""
    check_size(found.path, found.about)
    saved = model_of(found.about)
    target = _placed(jax.eval_shape(lambda: family(saved).init(saved, jax.random.key(0))))
    return _read(found.path, ocp.args.Composite(params=ocp.args.StandardRestore(target))).params


def save_params(path: Path, params: Params, about: dict[str, Any]) -> None:
    """Writes a checkpoint of parameters alone, which nothing can be resumed from. OSError where it can't be written."""
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params), about=ocp.args.JsonSave(about | {"step": int(path.name)})
    )
    with quiet():
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(path.absolute(), args=items)
            error = ""
        except Exception as raised:  # of many types: orbax even raises Exception itself
            error = one_line(raised)
        if error:
            let_others_fail()
            raise OSError(error)
    checksums.write(path)


def load_state(path: Path, target: TrainState) -> TrainState:
    """The train state of a checkpoint. `target` gives shapes, dtypes and, where its leaves have them, shardings."""
    params, optimizer = saved_form(target)
    arguments = ocp.args.Composite(
        params=ocp.args.StandardRestore(_placed(params)), optimizer=ocp.args.StandardRestore(_placed(optimizer))
    )
    restored = _read(path, arguments)
    return _state_form(restored.params, restored.optimizer, apart=not are_stacked(target.params.blocks))


def saved_form(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """The parameters, and all else; of the random key its data. Layers are stacked, however they are computed.

    Also of shapes.
    """
    if not are_stacked(state.params.blocks):
        of_shapes = isinstance(state.step, jax.ShapeDtypeStruct)
        state = jax.eval_shape(_stacked, state) if of_shapes else _stacked(state)
    rest = state._asdict()
    params, key = rest.pop("params"), rest.pop("key")
    if isinstance(key, jax.Array):
        data = jax.random.key_data(key)
    else:
        data = jax.eval_shape(jax.random.key_data, key).update(sharding=key.sharding)
    return params, rest | {"key": data}


def _stacked(state: TrainState) -> TrainState:
    return on_trees(stacked, state)


def _state_form(params: Params, rest: dict[str, Any], *, apart: bool) -> TrainState:
    state = TrainState(params=params, **rest | {"key": jax.random.wrap_key_data(rest["key"])})
    return on_trees(unstacked, state) if apart else state


def _placed(shapes: Any) -> Any:
    """Shapes with a sharding each: their own, or else this process's first device.

    (Orbax would take the one that was saved.)
    """
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first),
        shapes,
    )


def _read(path: Path, arguments: ocp.args.Composite) -> Any:
    """What a checkpoint has. UserError where orbax can't read it."""
    with quiet():
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(path.absolute(), args=arguments)
        except Exception as error:  # of many types: orbax even raises Exception itself
            if out_of_memory.is_cause(error):  # which is no damage
                raise
            message = one_line(error)
        let_others_fail()
    raise UserError(f"{path}: this checkpoint can't be read ({message}). Restore it from a copy, or train anew")


def _check_same_model(where: Path, saved: dict[str, Any], model: Model) -> None:
    different = [
        f"{found.key} is {found.saved} there and {found.asked} here"
        for found in settings.differences({"model": saved}, Config(model=model))
        if found.section == "model" and (found.key != "vocabulary_size" or found.asked)
    ]
    if different:
        raise UserError(
            f"{where}: a checkpoint of another model than the run's config.toml describes: {', '.join(different)}"
        )


# Orbax


def one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].partition(" See full")[0]


def let_others_fail() -> None:
    """After an error, while orbax is kept quiet: the time in which other arrays' reads or writes end, and fail too."""
    time.sleep(0.5)
    gc.collect()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from printing.

    It reads and writes many arrays at once. When one fails, it leaves the others behind, and each would print a
    traceback when it ends or is collected, beside the one message that we give. It also logs what was not asked for.
    """
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
