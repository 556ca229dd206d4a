"""Resuming a run from its last checkpoint.

The next step sees the data it would have seen, since `loader.batch_at` is a function of the step alone; everything
else is in the checkpoint. So on the same number of devices the run ends with the same bits as one that was never
stopped.
"""

import dataclasses
from typing import Any

from jaxgpt.data import fingerprint
from jaxgpt.data.corpus import Described
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes
from jaxgpt.runs import checkpoints, saving
from jaxgpt.runs.about import About, about_base
from jaxgpt.runs.best import Best
from jaxgpt.runs.checkpoints import Found
from jaxgpt.runs.folder import RunFolder, open_folder
from jaxgpt.training.state import Base, TrainState

# Options that make another run, beside the model's. The text is compared by its content, so it may have moved.
FIXED = {
    "compute": {"products", "fp8_scaling", "fp8_history"},
    "data": {"tokenizer", "validation_fraction"},
    "training": {"sequence_length", "seed", "init_from"},
    "objective": {"name", "completions", "reference_free", "advantages"},
    "rollouts": {"answers", "minibatches", "epochs"},
    "optimizer": {"name"},
}


def about(
    folder: RunFolder,
    data: Described,
    base: Base | None = None,
    kept: dict[str, Any] | None = None,
    best: Best | None = None,
) -> dict[str, Any]:
    """Returns a checkpoint's metadata, without its step; `kept` is what the objective keeps in it."""
    of_base = base and about_base(folder.config.training.init_from, base.fingerprint)
    return {
        "configuration": dataclasses.asdict(folder.config),
        "versions": settings.versions(),
        "tokenizer": data.tokenizer.state(),
        "template": data.template,
        "sequences_per_step": folder.config.training.micro_batches * folder.config.training.batch_size,
        "text": data.fingerprint,
        "lengths": folder.lengths(),
        **({"base": of_base} if of_base else {}),
        **({"best": best._asdict()} if best else {}),
        **({"kept": kept} if kept else {}),
    }


def open_run(config: Config, data: Described) -> tuple[RunFolder, Found | None]:
    """Opens the run's folder, and finds the checkpoint that it resumes from, if it does. Changes nothing there yet."""
    folder = open_folder(config)
    try:
        return folder, find(folder, data) if folder.resumes else None
    except BaseException:
        folder.close()
        raise


def find(folder: RunFolder, data: Described) -> Found | None:
    """Finds the newest whole checkpoint, and checks that the run may resume from it.

    With `--resume auto` a run without a whole checkpoint begins anew, and the old folder is kept under another name: a
    job that is restarted again and again would otherwise never get further. Returns None where the folder is a new one
    now. UserError where there is no checkpoint, it is another run's, or the text is not the one it was trained on.
    """
    found = checkpoints.search(folder.checkpoints)
    if isinstance(found, str):
        if folder.config.run.resume != "auto":
            raise UserError(f"{found}. --resume auto begins anew, and keeps this run under another name")
        folder.start_over(found)
        return None
    if found.about["converted_from"]:
        raise UserError(
            f"{found.path}: these weights were converted from {shown(found.about['converted_from'])}, and there is no "
            "run to go on with. Begin one from them: --init-from this run's folder, and another --run.name"
        )
    _check(str(found.path), found.about, folder.config, data)
    return found


def resume(folder: RunFolder, found: Found, target: TrainState) -> tuple[TrainState, list[str]]:
    """Returns the state in the form of `target`, and the lines to print; cuts the run's files back to that step."""
    config, saved = folder.config, found.about
    state = checkpoints.load_state(found.path, target)
    if state.nonfinite >= config.training.stop_after_nonfinite:  # the run stopped for these, and now tries again
        state = state._replace(nonfinite=state.nonfinite * 0)
    step = saved["step"]
    damaged = folder.go_on(config, step, saved["lengths"])
    if processes.first():
        saving.delete_unfinished(folder.checkpoints)
        for other in checkpoints.whole_steps(folder.checkpoints):
            if other > step:  # not whole, and trained again
                saving.delete(folder.checkpoints / str(other))
    begun = f"resuming after step {step}, from {found.path}"
    done = f"nothing to train: its {step:,} steps are done, and --training.steps with a larger number goes on"
    return state, [
        *found.damaged,
        begun,
        *([done] if step >= config.training.steps else []),
        *damaged,
        *_changes(saved, config),
    ]


def _check(where: str, saved: About, config: Config, data: Described) -> None:
    """Raises a UserError that names both values of each option that differs and must not change."""
    different = [
        f"{found.option} was {shown(found.saved)} and is {shown(found.asked)}"
        for found in settings.differences(saved["configuration"], config)
        if found.section in ("model", "lora") or found.key in FIXED.get(found.section, ())
    ]
    if saved["tokenizer"] != data.tokenizer.state() and not different:
        different.append("the tokenizer has other tokens")
    sequences = config.training.micro_batches * config.training.batch_size
    if saved["sequences_per_step"] != sequences:
        different.append(
            f"a step had {saved['sequences_per_step']} sequences and has {sequences} "
            "(--training.batch-size times --training.micro-batches)"
        )
    if different:
        raise UserError(
            f"{where}: this run can't be resumed with other options: {'; '.join(different)}. Give the old ones, or "
            "another --run.name to begin a new run"
        )
    change = fingerprint.difference(saved["text"], data.fingerprint) if saved["text"] else ""
    if change:
        name = f"--data.mixture {config.data.mixture}" if config.data.mixture else f"--data.text {config.data.text}"
        raise UserError(
            f"{name}: not the text that {where} was trained on: {change}. Restore the text, or "
            "give another --run.name to begin a new run"
        )


def _changes(saved: About, config: Config) -> list[str]:
    """Returns a line for each allowed difference from when the checkpoint was written."""
    options = [
        f"changed   {found.option} was {shown(found.saved)} and is {shown(found.asked)}"
        for found in settings.differences(saved["configuration"], config)
        if found.section not in ("run", "checkpoint", "sampling")
    ]
    versions = settings.versions()
    return options + [
        f"changed   {name} was {shown(old)} and is {versions[name]}: the numbers may differ in their last bits"
        for name, old in saved["versions"].items()
        if versions.get(name, old) != old  # `name` is one of ours
    ]
