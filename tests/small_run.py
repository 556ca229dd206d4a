"""Whole runs of a tiny model on a small text, from the command line to the files they leave."""

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxgpt.commands import cli, train
from jaxgpt.runs import saving
from jaxgpt.runs.metrics_file import read_metrics

OPTIONS = {
    "model.family": "gpt2",
    "model.layers": 1,
    "model.heads": 2,
    "model.width": 16,
    "model.context": 16,
    "data.text": "text.txt",
    "data.tokenizer": "characters",
    "training.batch-size": 4,
    "optimizer.learning-rate": 0.02,
}
# A model that is smaller still, for runs whose numbers don't matter.
TINY = [
    "--model.family=gpt2",
    "--model.layers=1",
    "--model.heads=2",
    "--model.width=8",
    "--model.context=16",
    "--data.text=text.txt",
]
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "hats")


class Finished(NamedTuple):
    status: int
    printed: str
    errors: str
    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if "loss" in line]

    @property
    def validation(self) -> dict[int, float]:
        return {line["step"]: line["val_loss"] for line in self.metrics if "val_loss" in line}


def words(options: dict[str, Any], **changes: Any) -> list[str]:
    """The command line of these options beside `OPTIONS`; `training_steps=3` changes one."""
    return words_of(OPTIONS | options, **changes)


def words_of(options: dict[str, Any], **changes: Any) -> list[str]:
    """The command line of these options; `training_steps=3` changes one."""
    changed = {name.replace("_", ".", 1).replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in (options | changed).items() for word in (f"--{name}", str(value))]


def run(command: list[str], name: str, observers: Sequence[train.Observer] = ()) -> Finished:
    """Trains in runs/NAME of the current folder."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*command, "--run.name", name], observers)
    return Finished(status, out.getvalue(), err.getvalue(), Path("runs", name).absolute())


def saved_at(step: int, train: Callable[..., Finished], *arguments: Any, **changes: Any) -> Finished:
    """The run that `train` makes, which is saved after that step and at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Writer, "due", lambda self, now: now == step)
        finished = train(*arguments, **changes)
    assert finished.status == 0, finished.errors
    return finished


@contextlib.contextmanager
def in_folder(folder: Path, lines: int = 100, vocabulary: Sequence[str] = WORDS) -> Iterator[Path]:
    """Makes the folder the current one, with a text.txt of so many lines."""
    choose = random.Random(0)
    text = "".join(" ".join(choose.choices(vocabulary, k=7)) + "\n" for _ in range(lines))
    (folder / "text.txt").write_text(text)
    with contextlib.chdir(folder):
        yield folder
