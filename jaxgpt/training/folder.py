"""A run's folder: the only place a run writes to.

    config.toml      everything needed to repeat the run
    metrics.jsonl    one object a line: training metrics by step, validation losses
    samples.txt      text drawn from the model
    loss.png         the loss curve
    checkpoints/     by orbax
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from jaxgpt import settings
from jaxgpt.config import Config
from jaxgpt.errors import UserError


class RunFolder:
    """An open run folder. UserError where it can't be made, or exists and `run.overwrite` is not set."""

    def __init__(self, config: Config):
        self.path = Path(config.run.folder) / config.run.name
        if self.path.exists():
            if not config.run.overwrite:
                raise UserError(
                    f"{self.path} exists and is left as it is. Give the run another name with --run.name, "
                    "or replace the old one with --run.overwrite"
                )
            if not (self.path / "config.toml").is_file():
                raise UserError(f"{self.path} is not a run's folder (it has no config.toml), so it is not replaced")
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
            settings.write(config, self.path / "config.toml")
            self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path}: can't write there ({error.strerror}). Choose another folder with --run.folder"
            ) from None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def metric(self, **values: Any) -> None:
        """Adds a line to metrics.jsonl, on disk when this returns. Numbers that are not finite become null."""
        finite = {key: value if _finite(value) else None for key, value in values.items()}
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()

    def sample(self, step: int, text: str) -> None:
        with (self.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")

    def close(self) -> None:
        self._metrics.close()


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
