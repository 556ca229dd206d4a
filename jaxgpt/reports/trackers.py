"""Trackers beside metrics.jsonl, by `run.trackers`: TensorBoard's event files, and Weights & Biases.

    tensorboard   runs/NAME/tensorboard, by tensorboardX; tensorboard --logdir runs shows it
    wandb         an account's project "jaxgpt", or with WANDB_MODE=offline files in runs/NAME/wandb alone

Both come with the `trackers` extra. They get every number of metrics.jsonl under the same name, a task's as
`hellaswag/accuracy`.
"""

import dataclasses
import importlib.util
import math
import os
import re
import secrets
from pathlib import Path
from typing import Any

from jaxgpt import files, writing
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.options.config import Config

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
LONGEST_IDENTITY = 1000  # bytes
IDENTITY = "wandb_id.txt"  # keeps the run's id there, so that a resumed run goes on with it


def check(config: Config) -> list[str]:
    """Returns the names in `run.trackers`. UserError for one that doesn't exist or isn't installed."""
    names = list(dict.fromkeys(word.strip() for word in config.run.trackers.split(",") if word.strip()))
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"--run.trackers {name}: there is no such tracker. There are: {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"--run.trackers {name} needs {PACKAGES[name]}: make env EXTRAS=trackers (or pip install -e "
                "'.[trackers]') installs it"
            )
    return names


def start(config: Config, folder: Path) -> "list[Tracker]":
    """Starts the trackers that the configuration names. UserError as `check` raises it, and where one can't begin."""
    made: "list[Tracker]" = []
    for name in check(config):
        try:
            made.append(TensorBoard(folder) if name == "tensorboard" else WeightsAndBiases(config, folder))
        except Exception as error:  # no account, network or disk: the user asked for it, and can still change it
            for tracker in made:
                tracker.close()
            raise UserError(f"--run.trackers {name}: it can't begin ({error or type(error).__name__})") from None
    return made


def _check_own(folder: Path) -> None:
    """Raises a UserError where a tracker would write somewhere else than in the run's folder."""
    if folder.is_symlink():
        raise UserError(f"{shown(folder)} is a link, and is not written through")


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a line of metrics.jsonl by their tracker's names, without the step."""
    prefix = f"{values['task']}/" if "task" in values else ""
    return {
        f"{prefix}{key}": value
        for key, value in values.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


class TensorBoard:
    name = "tensorboard"

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter  # with the extra only

        _check_own(folder / "tensorboard")
        # What a run that was killed wrote behind its last checkpoint is written again: the newer event counts.
        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=30)

    def write(self, values: dict[str, Any]) -> None:
        for key, value in numbers(values).items():
            self._writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    name = "wandb"

    def __init__(self, config: Config, folder: Path):
        import wandb  # with the extra only

        _check_own(folder / "wandb")
        path, machine = folder / IDENTITY, folder / "machine.json"
        known = files.read_text(path, LONGEST_IDENTITY, within=folder).strip() if os.path.lexists(path) else ""
        identity = known if re.fullmatch("[A-Za-z0-9_-]+", known) else secrets.token_hex(8)
        with writing.replacing(path) as temporary:
            temporary.write_text(f"{identity}\n", encoding="utf-8")
        about = {"machine": files.read_json(machine, within=folder)} if os.path.lexists(machine) else {}
        self._run = wandb.init(
            project="jaxgpt",
            name=config.run.name,
            notes=config.run.note or None,
            dir=str(folder),
            id=identity,
            resume="allow",
            config=dataclasses.asdict(config) | about,
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps may come again after a resumption, which wandb's own counter, that only grows, would drop.
        self._run.define_metric("*", step_metric="step")

    def write(self, values: dict[str, Any]) -> None:
        self._run.log({"step": values["step"], **numbers(values)})

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases
