"""A small run as somebody might send it: its folder, and a checkpoint whose checksums fit whatever is changed in it."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.data import tokenizers
from jaxgpt.interop import runs
from jaxgpt.models import gpt2
from jaxgpt.options.config import Model
from jaxgpt.runs import checksums
from jaxgpt.runs.about import FILE

MODEL = Model(layers=1, heads=2, width=8, context=6, vocabulary_size=256)
RUN = Path("runs", "sent")
CHECKPOINT = RUN / "checkpoints" / "0"
METADATA = CHECKPOINT / FILE


def lay_out(folder: Path) -> None:
    """Writes the run to runs/sent in this folder."""
    for name, content in _files().items():
        (folder / RUN / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / RUN / name).write_bytes(content)


@functools.cache
def _files() -> dict[str, bytes]:
    params = jax.tree.map(np.asarray, gpt2.init(MODEL, jax.random.key(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, RUN.name)
        folder.mkdir()
        runs.write(folder, params, MODEL, "float32", tokenizers.make("bytes", ""), run=RUN, origin="elsewhere")
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(**fields: Any) -> None:
    """Gives fields of the checkpoint's metadata other values, and makes its checksums fit."""
    write(json.dumps(json.loads(METADATA.read_text()) | fields))


def write(content: str) -> None:
    """Replaces the checkpoint's metadata, and makes its checksums fit."""
    METADATA.write_text(content)
    checksums.write(CHECKPOINT)


def options(**sections: dict[str, Any]) -> dict[str, Any]:
    """The options in the checkpoint's metadata, some of them changed."""
    saved = json.loads(METADATA.read_text())["configuration"]
    return saved | {name: saved.get(name, {}) | table for name, table in sections.items()}
