"""The log-probabilities of a run's answers under its reference, in the run's folder.

They are computed once. A checkpoint has their digest, so that a resumed run trains against the same ones and needs
neither the reference's weights nor a second pass.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.runs.folder import RunFolder

NAME = "reference.json"
LARGEST = 1 << 30  # bytes


class Reference(NamedTuple):
    train: np.ndarray  # float32 (pairs, 2): of the chosen answers and of the rejected ones
    held_out: np.ndarray

    def digest(self) -> str:
        """Returns the SHA-256 of all numbers and their shapes."""
        found = hashlib.sha256()
        for part in self:
            found.update(str(part.shape).encode() + np.ascontiguousarray(part, "<f4").tobytes())
        return found.hexdigest()


def write(folder: RunFolder, reference: Reference) -> None:
    """Writes the file. RunError where that fails."""
    with folder.replacing(NAME) as path:
        path.write_text(json.dumps({name: part.tolist() for name, part in reference._asdict().items()}), "utf-8")


def read(folder: Path, digest: str) -> Reference | None:
    """Returns what the file has; None where there is none, or one of another digest."""
    try:
        values = files.read_json(folder / NAME, LARGEST, folder)
        parts = [_array(values.get(name)) for name in Reference._fields]
    except (UserError, FileNotFoundError):
        return None
    found = Reference(*parts)
    return found if found.digest() == digest else None


def _array(value: object) -> np.ndarray:
    """Returns pairs of numbers as an array, an empty one where they are something else."""
    pairs = value if isinstance(value, list) else []
    fine = all(
        isinstance(pair, list) and len(pair) == 2 and all(type(x) is float and math.isfinite(x) for x in pair)
        for pair in pairs
    )
    return np.array(pairs if fine else [], np.float32).reshape(-1, 2)
