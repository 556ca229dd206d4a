"""The lowest validation loss of a run so far, and the checkpoint that has it.

`Best` is a function of the run's validation losses in their order, and each checkpoint's metadata has it as it was
then: a run that was killed and goes on comes to the same. With `checkpoint.keep_best` the checkpoint of that step is
kept beside the newest ones, and `best.json` in the run's folder names it:

    {"step": 300, "val_loss": 1.2345}

It is written when that checkpoint is whole, and before the one that it named until then is deleted. A checkpoint is
named by its path, runs/NAME/checkpoints/300, and the best one also as runs/NAME/checkpoints/best.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt import files, writing
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.runs import checksums

NAME = "best.json"
STEP = re.compile("0|[1-9][0-9]{0,9}")
LARGEST = 1 << 12  # bytes


class Best(NamedTuple):
    """The lowest validation loss so far."""

    step: int  # after which it was the lowest; 0 for before the first
    loss: float
    since: int  # number of evaluations after that one
    evaluated: int  # step of the last evaluation


def after(best: Best | None, step: int, loss: float) -> Best | None:
    """Returns the lowest loss, now that it is `loss` after `step`; one that isn't finite is not the lowest."""
    if best is not None and step <= best.evaluated:
        return best  # this evaluation has been counted
    if math.isfinite(loss) and (best is None or loss < best.loss):
        return Best(step, loss, 0, step)
    return best and best._replace(since=best.since + 1, evaluated=step)


def of_about(values: dict[str, Any]) -> Best | None:
    """Returns what a checkpoint's metadata have; None where they have nothing."""
    return Best(values["step"], float(values["loss"]), values["since"], values["evaluated"]) if values else None


def resumed(checkpoints: Path, step: int, values: dict[str, Any], *, keep: bool) -> Best | None:
    """Returns the lowest loss of a run that goes on after `step`.

    A finished run's last evaluation is made after its last checkpoint, and is known from `best.json`. With `keep` a
    loss whose checkpoint isn't there counts no more.
    """
    found, marked = of_about(values), read(checkpoints.parent)
    if found and marked and marked[0] == step and marked[1] < found.loss:
        found = Best(step, marked[1], 0, step)
    if keep and found and found.step and not checksums.is_there(checkpoints / str(found.step)):
        return None
    return found


def read(run: Path) -> tuple[int, float] | None:
    """Returns the step and the loss that best.json names; None where there is none that can be read."""
    try:
        values = files.read_json(run / NAME, LARGEST, run)
    except (UserError, OSError):
        return None
    step, loss = values.get("step"), values.get("val_loss")
    if type(step) is not int or type(loss) is not float or not (0 < step < 2**31 and math.isfinite(loss)):
        return None
    return step, loss


def write(run: Path, best: Best | None) -> None:
    """Writes best.json, or deletes it where there is no such checkpoint. OSError where that fails."""
    if best is None:
        (run / NAME).unlink(missing_ok=True)
    elif read(run) != (best.step, best.loss):
        with writing.replacing(run / NAME) as new:
            new.write_text(json.dumps({"step": best.step, "val_loss": best.loss}) + "\n", encoding="utf-8")


def run_of(path: Path) -> Path:
    """Returns the run's folder of a checkpoint's path; another path as it is."""
    return path.parents[1] if _is_of_a_run(path) else path


def checkpoint_of(path: Path) -> Path | None:
    """Returns the checkpoint that a path names, by its step or as the best; None where it names none.

    UserError where there is no best one.
    """
    if not _is_of_a_run(path):
        return None
    if path.name != "best":
        return path
    found = read(path.parents[1])
    if found is None:
        raise UserError(f"{shown(path)}: no checkpoint was kept as the best (--checkpoint.keep-best keeps it)")
    return path.with_name(str(found[0]))


def _is_of_a_run(path: Path) -> bool:
    named = STEP.fullmatch(path.name) or path.name == "best"
    return bool(named) and path.parent.name == "checkpoints" and files.exists(path.parents[1] / "config.toml")
