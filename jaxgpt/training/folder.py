"""A run's folder: the only place a run writes to.

config.toml      everything needed to repeat the run
metrics.jsonl    one object a line: training metrics by step, validation losses
memory_plan.json what the train step needs, by name
samples.txt      text drawn from the model
loss.png         the loss curve
checkpoints/     by orbax
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt import settings
from jaxgpt.config import Config
from jaxgpt.errors import RunError, UserError


class RunFolder:
    """An open run folder. UserError where it can't be made, or exists and `run.overwrite` is not set."""

    def __init__(self, config: Config):
        self.path = Path(config.run.folder) / config.run.name
        try:
            if self.path.exists():
                self._check_replaceable(config.run.overwrite)
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
            settings.write(config, self.path / "config.toml")
            self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self.path}: can't write there ({reason}). Choose another folder with --run.folder"
            ) from None

    def _check_replaceable(self, overwrite: bool) -> None:
        if not overwrite:
            raise UserError(
                f"{self.path} exists and is left as it is. Give the run another name with --run.name, "
                "or replace the old one with --run.overwrite"
            )
        if not (self.path / "config.toml").is_file():
            raise UserError(f"{self.path} is not a run's folder (it has no config.toml), so it is not replaced")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def metric(self, **values: Any) -> None:
        """Adds a line to metrics.jsonl, on disk when this returns. Numbers that are not finite become null."""
        finite = {key: value if _finite(value) else None for key, value in values.items()}
        with self.writing("metrics.jsonl"):
            self._metrics.write(json.dumps(finite) + "\n")
            self._metrics.flush()

    def sample(self, step: int, text: str) -> None:
        """Adds a text to samples.txt."""
        with self.writing("samples.txt") as path, path.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes a file of one object."""
        with self.writing(name) as path:
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The path of a file in the folder; a RunError where writing it fails: a full disk, a folder that is gone."""
        path = self.path / name
        try:
            yield path
        except OSError as error:
            raise RunError(f"{path}: writing failed ({error.strerror}). Is the disk full?") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been reported
            self._metrics.close()


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
