"""Reads and writes llm.c's debug states: a batch with the model's logits, loss and gradients.

    256 int32    magic 20240327, version 2, B, T, zeros
    tokens       int32 (B, T), and targets of the same shape
    logits       float32 (B, T, V)
    loss         float32
    gradients    float32, laid out as the tensors in a model file (`llmc.py`)

V and Vp stand in the model's file alone.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import llmc, tensors
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model

MAGIC = 20240327
VERSION = 2
FLOAT32 = tensors.DTYPES["float32"]


class State(NamedTuple):
    tokens: np.ndarray  # (B, T) int32
    targets: np.ndarray  # (B, T) int32
    logits: np.ndarray  # (B, T, V) float32; a memory map in a state that was read
    loss: float
    grads: Params  # stacked, float32


def read(path: Path, model: Model) -> State:
    """Reads a debug state of this model. UserError where the file is none."""
    header = llmc.read_header(path, MAGIC, (VERSION,), "an llm.c debug state")
    B, T = (llmc.positive(path, header.numbers[place], place, what) for place, what in ((2, "B"), (3, "T")))
    if model.context < T:
        raise UserError(f"{shown(path)}: T is {T} (at byte 12), and the model's context is {model.context}")
    V, count = model.vocabulary_size, tensors.count(model)
    expected = llmc.HEADER_BYTES + 4 * (2 * B * T + B * T * V + 1 + count)
    llmc.check_size(path, header.file_bytes, expected, f"a state of {B} x {T} tokens of this model")
    mapped = llmc.memory_map(path, "<i4")[llmc.HEADER_BYTES // 4 :]
    tokens, targets = (np.array(mapped[i * B * T : (i + 1) * B * T]).reshape(B, T) for i in range(2))
    for what, ids in (("token", tokens), ("target", targets)):
        outside = np.flatnonzero((ids < 0) | (ids >= V))
        if outside.size:
            place = int(outside[0])
            raise UserError(
                f"{shown(path)}: {what} {ids.flat[place]} at position {place} is not in the vocabulary of {V}"
            )
    floats = mapped[2 * B * T :].view("<f4")
    end = B * T * V
    grads = llmc.read_tensors(path, expected - 4 * count, model, model.padded_vocabulary_size, FLOAT32)
    return State(tokens, targets, floats[:end].reshape(B, T, V), float(floats[end]), grads)


def write(path: Path, state: State) -> None:
    """Writes a debug state, whose gradients are stacked NumPy arrays."""
    with path.open("wb") as file:
        file.write(llmc.write_header([MAGIC, VERSION, *state.tokens.shape]))
        for ids in (state.tokens, state.targets):
            file.write(np.ascontiguousarray(ids, "<i4").tobytes())
        file.write(np.ascontiguousarray(state.logits, "<f4").tobytes())
        file.write(np.float32(state.loss).tobytes())
        for part in llmc.tensor_bytes(state.grads, FLOAT32):
            file.write(part)
