"""A run's checkpoints as they lie on the disk, and reading them with orbax. `saving.py` writes them.

checkpoints/STEP/params       the parameters, alone: what generation and evaluation read
checkpoints/STEP/optimizer    the rest of the train state
checkpoints/STEP/about        JSON: the step, the options, the tokenizer, the data, and how long the run's files were
checkpoints/STEP/SHA256SUMS   written last: a checkpoint without it was not finished
"""

import contextlib
import functools
import gc
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxgpt import compilation_cache, errors, files
from jaxgpt.data import tokenizers
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.models import family, lora, with_scalar
from jaxgpt.models.blocks import Params, are_stacked, stacked, unstacked
from jaxgpt.options import checks, command_line, settings
from jaxgpt.options.config import Config, Model, Parallel
from jaxgpt.parallel import mesh, processes
from jaxgpt.runs import best, checksums
from jaxgpt.runs.about import About, check_size, lora_of, model_of, objective_of, read_about
from jaxgpt.terminal import command, say
from jaxgpt.training.state import TrainState, on_trees

PIECES = 1 << 26  # bytes of pieces of arrays that may be read at once, beside those of the arrays themselves
LONGEST_REASON = 400  # characters of an error of orbax's
CHUNK = 16 << 20  # bytes of an array that are packed at once, where there is memory for little more than the arrays
_TEMPORARY = re.compile(r"[0-9]{1,10}\.orbax-checkpoint-tmp(-[0-9]+)?")


def whole_steps(folder: Path) -> list[int]:
    """Returns the steps of the whole checkpoints, those that were written to their end, in order."""
    return [step for step in steps_of(folder) if checksums.is_there(folder / str(step))]


def steps_of(folder: Path) -> list[int]:
    """Returns the steps of all checkpoints that have their final name, in order.

    Orbax gives a checkpoint that name when all of its files are written. UserError where the folder can't be read,
    since a run that seems to have no checkpoint is begun anew; or where a checkpoint is a link, since older checkpoints
    are deleted, and the link may lead to another run's.
    """
    found = [folder / name for name in files.names(folder) if best.STEP.fullmatch(name) and (folder / name).is_dir()]
    for path in found:
        if path.is_symlink():
            raise UserError(f"{shown(path)}: a link, and is not followed. Put the checkpoint itself in its place")
    return sorted(int(path.name) for path in found)


def unfinished(folder: Path) -> list[Path]:
    """Returns the half-written checkpoints that a killed process or a full disk has left.

    They are known by the names that this package and orbax give. Anything else in the folder is the user's.
    """
    begun = [
        folder / name
        for name in files.names(folder)
        if _TEMPORARY.fullmatch(name)
        or (best.STEP.fullmatch(name) and not files.exists(folder / name / checksums.NAME))
    ]
    return [path for path in begun if path.is_dir() and not path.is_symlink()]


class Found(NamedTuple):
    """The newest whole checkpoint, and a message for each newer one that is damaged."""

    path: Path
    about: About
    damaged: list[str]


def find(folder: Path, parts: tuple[str, ...] | None = None) -> Found:
    """Returns the newest whole checkpoint in a run's checkpoints/; all processes get the same one.

    `parts` are the subfolders that must be whole, such as ("params", "about"); without it all. UserError where there is
    no checkpoint, or none that is whole.
    """
    found = search(folder, parts)
    if isinstance(found, str):
        raise UserError(found)
    return found


def search(folder: Path, parts: tuple[str, ...] | None = None) -> Found | str:
    """Returns the newest whole checkpoint as `find` does, or else the message that `find` would raise."""
    name, messages = processes.talk.broadcast(lambda: _newest_whole(folder, parts))
    if not name:
        return messages[-1]
    found = Found(folder / name, read_about(folder / name), messages)
    if found.about["step"] != int(name):
        raise UserError(f"{found.path}: says that it is of step {found.about['step']}. Restore it from a copy")
    return found


def _newest_whole(folder: Path, parts: tuple[str, ...] | None) -> tuple[str, list[str]]:
    """Returns the name of the newest whole checkpoint, empty where there is none, and the messages."""
    files.check_within(folder, folder.parent)
    if not whole_steps(folder):
        return "", [f"{folder}: there is no whole checkpoint (has the run been saved yet?)"]
    damaged, last = [], ""
    for step in reversed(steps_of(folder)):
        damage = checksums.damage(folder / str(step), parts)
        if not damage:
            return str(step), damaged
        last = f"{folder / str(step)}: this checkpoint is not whole ({damage})"
        damaged.append(f"{last}; the one before it is used")
    return "", [f"{last}, and there is no other that is. Restore it from a copy, or train anew"]


def at(path: Path, parts: tuple[str, ...] | None = None) -> Found:
    """Returns the checkpoint at `path`. UserError where it, or with `parts` one of those subfolders, isn't whole."""
    damage = checksums.damage(path, parts)
    if damage:
        raise UserError(f"{path}: this checkpoint is not whole ({damage}). Restore it from a copy, or take another")
    return Found(path, read_about(path), [])


def load_params(run: Path, model: Model, checkpoint: Path | None = None) -> tuple[Params, Found]:
    """Returns the parameters of a run's newest whole checkpoint, or of this one, and the checkpoint.

    UserError as `find` raises it, and where it is of another model. A vocabulary size of 0 in `model` stands for any.
    """
    parts = ("params", "about")
    found = at(checkpoint, parts) if checkpoint else find(run / "checkpoints", parts)
    different = [
        f"{other.key} is {other.saved} there and {other.asked} here"
        for other in settings.model_differences(found.about["configuration"]["model"], model)
        if other.key != "vocabulary_size" or other.asked
    ]
    if different:
        what = "a checkpoint of another model than the run's config.toml describes"
        raise UserError(f"{found.path}: {what}: {', '.join(different)}")
    return params_of(found), found


class Trained(NamedTuple):
    """A run's trained model, on this machine's devices."""

    config: Config  # as `settings.read_trained` reads it, with the devices that `load` was given
    params: Params
    tokenizer: Tokenizer
    about: About  # the checkpoint's metadata


def load(run: Path, devices: int = 0, merged: Callable[[Params, Found], Params] | None = None) -> Trained:
    """Returns the model of a run's newest whole checkpoint, and names damaged ones on stderr; or of the named one.

    `run` is the run's folder, or a checkpoint of it, as `best.checkpoint_of` has them.

    Each of so many devices gets all parameters; 0 takes all devices. Of a run of adapters, `merged` makes whole
    parameters (`interop.runs.load`). UserError where there is no such run, it has no whole checkpoint, or there are
    fewer devices.
    """
    checkpoint, run = best.checkpoint_of(run), best.run_of(run)
    if not files.exists(run / "config.toml"):
        raise UserError(f"--run {shown(run)}: not a run's folder (it has no config.toml){command_line.runs_near(run)}")
    config = settings.read_trained(run)
    checks.check(config)
    compilation_cache.use("")
    parallel = Parallel(devices=devices)
    everywhere = NamedSharding(mesh.make(parallel), PartitionSpec())
    params, found = load_params(run, config.model, checkpoint)
    for message in found.damaged:
        say(message, error=True)
    if merged:
        params = merged(params, found)
    # Scanned layers: one is compiled and not all of them, since there is a program for each length.
    config = settings.changed(config, model=model_of(found.about), compute={"layers": "scanned"}, parallel=parallel)
    if everywhere.mesh.size > 1:
        params = jax.device_put(params, everywhere)
    return Trained(config, params, tokenizer_of(found), found.about)


def tokenizer_of(found: Found) -> Tokenizer:
    """Returns a checkpoint's tokenizer. UserError where it has none that can be read."""
    try:
        return tokenizers.from_state(found.about["tokenizer"])
    except UserError as error:
        raise UserError(f"{found.path}: its tokenizer can't be read: {error}") from None


def params_of(found: Found, dtype: DTypeLike = jnp.float32) -> Params:
    """Returns a checkpoint's parameters: those that were trained, but for a head of values beside the model's own.

    UserError for a reward model.
    """
    check_draws(found)
    return _without_head(_params_of(found, dtype))


def scored_params_of(found: Found) -> with_scalar.Params:
    """Returns a reward model's parameters, or its adapters, with its scalar head."""
    params = _params_of(found, jnp.float32)
    assert isinstance(params, with_scalar.Params)
    return params


def check_draws(found: Found) -> None:
    """Raises a UserError for a checkpoint of a reward model, which draws no text."""
    if objective_of(found.about).name == "reward":
        by_it = ["--best-of", 8, "--reward-model", found.path.parent.parent]
        raise UserError(
            f"{found.path}: a reward model, which scores texts and draws none. Choose among another model's texts by "
            f"it: {command('generate', 'MODEL', '--prompt', 'PROMPT', *by_it)}"
        )


def _params_of(found: Found, dtype: DTypeLike) -> Any:
    target = _placed(_target(found, dtype))
    return _read(found.path, ocp.args.Composite(params=ocp.args.StandardRestore(target))).params


def _without_head(params: Any) -> Params:
    return with_scalar.model_of(params) if isinstance(params, with_scalar.Params) else params


def save_params(path: Path, params: Params, about: dict[str, Any]) -> None:
    """Writes a checkpoint of parameters alone, which no run can resume from. OSError where it can't be written."""
    metadata = ocp.args.JsonSave(about | {"step": int(path.name)})
    arrays = jax.tree.map(np.asarray, params)
    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), arrays)
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(arrays, save_args=in_chunks), about=metadata)
    with quiet():
        try:
            with ocp.Checkpointer(
                ocp.CompositeCheckpointHandler(params=_of_numpy(), about=ocp.JsonCheckpointHandler())
            ) as checkpointer:
                checkpointer.save(path.absolute(), args=items)
            error = ""
        except Exception as raised:  # of many types: orbax even raises Exception itself
            error = errors.one_line(raised)
        if error:
            let_others_fail()
            raise OSError(error)
    checksums.write(path)


def numpy_params_of(found: Found, dtype: DTypeLike) -> Params:
    """Returns a checkpoint's parameters as NumPy arrays, which JAX would copy once more.

    They are those of `params_of`. They are read one after another, the largest first: orbax holds what is packed of all
    that it reads at once.
    """
    shapes, structure = jax.tree.flatten(_without_head(_target(found, dtype)))
    readers = jax.tree.leaves(leaf_readers_of(found, dtype))
    arrays = {place: readers[place]() for place in sorted(range(len(shapes)), key=lambda place: -shapes[place].size)}
    return jax.tree.unflatten(structure, [arrays[place] for place in range(len(shapes))])


def leaf_readers_of(found: Found, dtype: DTypeLike) -> Params:
    """Returns, in the place of each of the parameters of `params_of`, a function that reads it as a NumPy array."""
    check_draws(found)
    leaves, structure = jax.tree.flatten(_target(found, dtype))

    def read(place: int) -> np.ndarray:
        target = jax.tree.unflatten(
            structure, [leaf if i == place else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
        )
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.dtype(dtype)), target)
        restore = ocp.args.PyTreeRestore(target, restore_args=arguments)
        return jax.tree.leaves(_read(found.path, ocp.args.Composite(params=restore), numpy=True).params)[place]

    return _without_head(
        jax.tree.unflatten(structure, [functools.partial(read, place) for place in range(len(leaves))])
    )


def _target(found: Found, dtype: DTypeLike) -> Params:
    """Returns the shapes of a checkpoint's parameters. UserError where its files can't hold them."""
    check_size(found.path, found.about)
    saved, options, key = model_of(found.about), lora_of(found.about), jax.random.key(0)

    def init():
        params = lora.init(saved, options, key, dtype) if options.rank else family(saved).init(saved, key, dtype)
        if not objective_of(found.about).scalar_head:
            return params
        return with_scalar.attach(params, with_scalar.init_scalar(saved, key, dtype))

    return jax.eval_shape(init)


def _of_numpy(room: float | None = None) -> ocp.PyTreeCheckpointHandler:
    """Returns a handler of NumPy arrays that copies none of them; it reads so many GB at once."""
    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False, restore_concurrent_gb=room)  # type: ignore[arg-type]


def load_state(path: Path, target: TrainState) -> TrainState:
    """Returns a checkpoint's train state, with the shapes, dtypes and, where it has them, shardings of `target`."""
    params, optimizer = saved_form(target)
    parts = {"params": params, "optimizer": optimizer}
    arguments = {name: ocp.args.StandardRestore(_placed(part)) for name, part in parts.items()}
    restored = _read(path, ocp.args.Composite(**arguments))
    key = jax.random.wrap_key_data(restored.optimizer["key"])
    state = TrainState(params=restored.params, **restored.optimizer | {"key": key})
    return state if are_stacked(target.params.blocks) else on_trees(unstacked, state)


def saved_form(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """Returns a train state as checkpoints have it: the parameters, and everything else in a dict.

    Layers are stacked, however they are computed, and the random key is saved as its data. The state may be of arrays
    or of shapes.
    """
    if not are_stacked(state.params.blocks):
        of_shapes = isinstance(state.step, jax.ShapeDtypeStruct)
        state = jax.eval_shape(functools.partial(on_trees, stacked), state) if of_shapes else on_trees(stacked, state)
    rest = {name: part for name, part in state._asdict().items() if part is not None}
    params, key = rest.pop("params"), rest.pop("key")
    if isinstance(key, jax.Array):
        data = jax.random.key_data(key)
    else:
        data = jax.eval_shape(jax.random.key_data, key).update(sharding=key.sharding)
    return params, rest | {"key": data}


def _placed(shapes: Any) -> Any:
    """Returns the shapes with a sharding each: their own, or else this process's first device.

    Without one, orbax would take the sharding that was saved.
    """
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first)

    return jax.tree.map(placed, shapes)


def _read(path: Path, arguments: ocp.args.Composite, *, numpy: bool = False) -> Any:
    """Returns what orbax restores from a checkpoint. UserError where it can't be read."""
    with quiet():
        try:
            with ocp.Checkpointer(_bounded(arguments, numpy)) as checkpointer:
                return checkpointer.restore(path.absolute(), args=arguments)
        except Exception as error:  # of many types: orbax even raises Exception itself
            if errors.is_out_of_memory(error):  # the checkpoint isn't damaged
                raise
            # Orbax's messages are as long as pages, and quote what the files say.
            message = shown(errors.one_line(error).partition(" [tensorstore_spec")[0], LONGEST_REASON)
        let_others_fail()
    raise UserError(f"{path}: this checkpoint can't be read ({message}). Restore it from a copy, or train anew")


def _bounded(arguments: ocp.args.Composite, numpy: bool) -> ocp.CompositeCheckpointHandler:
    """Returns a handler that reads no more at once than what is asked for may need.

    The files say how large the pieces of an array are, and one of kilobytes may be unpacked to a terabyte.
    """
    leaves = jax.tree.leaves([part.item for part in arguments.values()])
    numbers = sum(leaf.size for leaf in leaves if leaf is not ocp.PLACEHOLDER)
    room = (PIECES + 4 * 4 * numbers) / 10**9  # pieces that don't divide a tensor reach beyond it, on each axis
    handler: Any = _of_numpy(room) if numpy else ocp.StandardCheckpointHandler(restore_concurrent_gb=room)  # type: ignore[arg-type]
    handlers: dict[str, Any] = dict.fromkeys(arguments, handler)
    return ocp.CompositeCheckpointHandler(**handlers)


def let_others_fail() -> None:
    """Waits after an error, while orbax is kept quiet, until the reads or writes of other arrays end or fail too."""
    time.sleep(0.5)
    gc.collect()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from printing.

    Orbax reads and writes many arrays at once. When one fails, it leaves the others behind, and each would print a
    traceback when it ends or is collected, beside the one message that the package gives. Orbax also logs what nobody
    asked for.
    """
    with contextlib.ExitStack() as restored:
        for logger in map(logging.getLogger, ("absl", "asyncio")):
            restored.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        restored.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = lambda _: None
        yield
