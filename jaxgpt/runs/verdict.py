"""gradcheck.json in a run's folder: what `run.py gradcheck --as-run` found of the run's gradients, and where."""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt import files
from jaxgpt.errors import UserError

NAME = "gradcheck.json"
MOST_TENSORS = 1000
MOST_CHARACTERS = 300


class Tensor(NamedTuple):
    """The worst that was found of a tensor, over all inputs."""

    tensor: str
    error: float  # ‖a - b‖ / ‖b‖
    entry: float  # max |a - b| / max |b|
    tolerance: float
    inputs: str  # the inputs at which it is the worst
    fault: str
    passed: bool


def as_json(tensors: list[Tensor], about: dict[str, Any]) -> dict[str, Any]:
    """Returns the object that the file has; `about` says what was compared, where, and with what."""
    return {
        "passed": all(tensor.passed for tensor in tensors),
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **about,
        "tensors": [{name: _finite(value) for name, value in tensor._asdict().items()} for tensor in tensors],
    }


def _finite(value: Any) -> Any:
    """Returns the value, and None for a number that JSON hasn't got."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(folder: Path) -> dict[str, Any]:
    """Returns what the file of a run's folder says, as far as a page shows it; {} where there is none.

    The file may be someone else's: texts are cut to a length, and numbers are numbers. UserError where it is damaged.
    """
    path = folder / NAME
    if not files.exists(path):
        return {}
    found = files.read_json(path, within=folder)
    tensors, passed = found.get("tensors"), found.get("passed")
    if type(passed) is not bool or not isinstance(tensors, list) or not all(isinstance(row, dict) for row in tensors):
        raise UserError(f"{path}: not what gradcheck --as-run writes. Without the file the report leaves it out")
    versions = found.get("versions")
    return {
        "passed": passed,
        **{name: _text(found.get(name)) for name in ("when", "step", "device", "driver", "compared")},
        "versions": {_text(name): _text(of) for name, of in versions.items()} if isinstance(versions, dict) else {},
        "tensors": [_row(row) for row in tensors[:MOST_TENSORS]],
    }


def _row(found: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: _text(found.get(name)) for name in ("tensor", "inputs", "fault")},
        **{name: _number(found.get(name)) for name in ("error", "entry", "tolerance")},
        "passed": found.get("passed") is True,
    }


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _text(value: Any) -> str:
    return value[:MOST_CHARACTERS] if isinstance(value, str) else ""
