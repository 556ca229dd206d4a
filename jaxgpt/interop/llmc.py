"""Reads and writes llm.c's files: models, debug states, and the tokenizers with which its programs decode.

    model        256 int32: magic 20240326, version (3: float32, 5: bfloat16), context, V, L, heads, C, Vp, zeros
                 `gpt2_tables.TENSORS` in their order, layers stacked, weights (out, in), Vp rows of token embeddings
    debug state  256 int32: magic 20240327, version 2, B, T, zeros
                 tokens int32 (B, T), targets of the same shape, logits float32 (B, T, V), loss float32, and the
                 gradients in float32, laid out as the tensors in a model file. V and Vp stand in that file alone
    tokenizer    256 int32: magic 20240328, version, V, id of end-of-text (version 2; in version 1 it is 50256), zeros
                 for each token a byte with its length, and its bytes

All numbers are little-endian. Token tables with another Vp than ours can be read: rows from V on are passed over, and
ours are 0.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import gpt2_tables, tensors
from jaxgpt.interop.tensors import WeightSource
from jaxgpt.models.blocks import Params
from jaxgpt.options.checks import LARGEST
from jaxgpt.options.config import Model

HEADER_BYTES = 1024
MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC = 20240326, 20240327, 20240328
STATE_VERSION = 2
END_OF_TEXT = 50256  # its id in version 1 of tokenizer files
LONGEST_TOKEN = 255  # bytes
DTYPES = {3: "float32", 5: "bfloat16"}  # by version
VERSIONS = {name: version for version, name in DTYPES.items()}


def read_header(path: Path, magic: int, versions: tuple[int, ...], kind: str) -> tuple[list[int], int]:
    """Returns the 256 numbers at a file's beginning, and the file's size. UserError where it isn't of this kind."""
    files.refuse_pointer(path)
    length = files.size(path)
    with files.open_file(path) as file:
        beginning = file.read(HEADER_BYTES)
    if len(beginning) < HEADER_BYTES:
        raise UserError(f"{shown(path)}: {length} bytes, and {kind} begins with a header of {HEADER_BYTES}")
    numbers = np.frombuffer(beginning, "<i4").tolist()
    if numbers[0] != magic:
        raise UserError(f"{shown(path)}: not {kind}: it begins with {numbers[0]}, and {magic} is expected at byte 0")
    if numbers[1] not in versions:
        expected = " or ".join(map(str, versions))
        raise UserError(f"{shown(path)}: {kind} of version {numbers[1]} (at byte 4); version {expected} can be read")
    return numbers, length


def is_model(beginning: bytes) -> bool:
    """Returns whether a file that begins with these bytes is an llm.c file, of a model or another."""
    return int.from_bytes(beginning[:4], "little") in (MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC)


def write_header(numbers: list[int]) -> bytes:
    """Returns a header of 1024 bytes with these numbers, and zeros behind them."""
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[: len(numbers)] = numbers
    return header.tobytes()


def check_size(path: Path, found: int, expected: int, what: str) -> None:
    """Raises a UserError where a file's size isn't what its header says. Both are plain ints, which can't overflow."""
    if found != expected:
        problem = "is cut off or damaged" if found < expected else "has bytes that its header doesn't speak of"
        raise UserError(f"{shown(path)}: {found:,} bytes, and {what} takes {expected:,}: the file {problem}")


def positive(path: Path, number: int, place: int, what: str) -> int:
    """Returns a header's number. UserError, which names its byte offset, where it is not in [1, LARGEST]."""
    if not 1 <= number <= LARGEST:
        raise UserError(f"{shown(path)}: {what} is {number} (at byte {4 * place}), and must be from 1 to {LARGEST}")
    return number


# Models


def open_model(path: Path) -> WeightSource:
    """Opens a model file. UserError where it is none, its shape is impossible, or its size isn't the header's."""
    header, length = read_header(path, MODEL_MAGIC, tuple(DTYPES), "an llm.c model file")
    version, *shape = header[1:8]
    names = ("the context", "the vocabulary", "the number of layers", "the number of heads", "the width", "Vp")
    T, V, L, heads, C, rows = (
        positive(path, number, place, what) for place, (number, what) in enumerate(zip(shape, names, strict=True), 2)
    )
    if rows < V:
        raise UserError(f"{shown(path)}: Vp is {rows} (at byte 28), less than the vocabulary of {V}")
    if C % heads:
        raise UserError(f"{shown(path)}: the width is {C} (at byte 24), and {heads} heads don't divide it")
    model = Model(layers=L, heads=heads, width=C, context=T, vocabulary_size=V)
    dtype = tensors.DTYPES[DTYPES[version]]
    numbers = gpt2_tables.count(model) + (rows - model.padded_vocabulary_size) * C
    check_size(path, length, HEADER_BYTES + dtype.itemsize * numbers, f"a model of this shape in {dtype}")
    return WeightSource(
        where=str(path),
        kind=f"an llm.c model file, version {version}",
        model=model,
        dtype=dtype.name,
        tokenizer=None,
        load=lambda: read_tensors(path, HEADER_BYTES, model, rows, dtype),
    )


def memory_map(path: Path, dtype: Any) -> np.ndarray:
    """Returns all of a file as a read-only memory map, 1-D."""
    with files.open_file(path) as file:
        return np.memmap(file, dtype, mode="r")


def read_tensors(path: Path, offset: int, model: Model, rows: int, dtype: np.dtype) -> Params:
    """Reads the parameters from a file whose size has been checked, in our layout and the file's dtype.

    They begin at a byte offset, with `rows` rows in the token table.
    """
    mapped = memory_map(path, np.uint8)
    arrays = {}
    for tensor in gpt2_tables.TENSORS:
        shape = list(gpt2_tables.shape(tensor, model))
        if tensor.llmc == "wte":
            shape[0] = rows
        if tensor.is_weight:
            shape[1:] = shape[:0:-1]
        end = offset + dtype.itemsize * math.prod(shape)
        array = mapped[offset:end].view(dtype.newbyteorder("<") if dtype.kind == "f" else dtype).reshape(shape)
        arrays[tensor.ours], offset = _as_ours(array, tensor, model, dtype), end
    return gpt2_tables.from_named(arrays)


def _as_ours(array: np.ndarray, tensor: gpt2_tables.Tensor, model: Model, dtype: np.dtype) -> np.ndarray:
    """Returns a copy in our layout: weights (in, out) rather than (out, in), and the token table with our Vp."""
    ours = np.empty(gpt2_tables.shape(tensor, model), dtype)
    if tensor.llmc == "wte":
        ours[: model.vocabulary_size] = array[: model.vocabulary_size]
        ours[model.vocabulary_size :] = 0
    else:
        ours[...] = array.swapaxes(1, 2) if tensor.is_weight else array
    return ours


def write_model(path: Path, params: Params, model: Model, dtype_name: str) -> None:
    """Writes a model file of stacked NumPy arrays. UserError for a dtype that has no version."""
    if dtype_name not in VERSIONS:
        raise UserError(f"an llm.c model file can't hold {dtype_name}: take --dtype float32 or bfloat16")
    shape = [model.context, model.vocabulary_size, model.layers, model.heads, model.width]
    with path.open("wb") as file:
        file.write(write_header([MODEL_MAGIC, VERSIONS[dtype_name], *shape, model.padded_vocabulary_size]))
        for part in tensor_bytes(params, tensors.DTYPES[dtype_name]):
            file.write(part)


def tensor_bytes(params: Params, dtype: np.dtype) -> Iterator[bytes]:
    """Yields the tensors' bytes as llm.c stores them, one layer of a tensor at a time."""
    for tensor, array in gpt2_tables.paired(params):
        for layer in array if tensor.stacked else [array]:
            turned = np.ascontiguousarray(layer.T if tensor.is_weight else layer)
            yield tensors.cast(turned, dtype, tensor.llmc).tobytes()


# Debug states


class State(NamedTuple):
    tokens: np.ndarray  # (B, T) int32
    targets: np.ndarray  # (B, T) int32
    logits: np.ndarray  # (B, T, V) float32; a memory map in a state that was read
    loss: float
    grads: Params  # stacked, float32


def read_state(path: Path, model: Model) -> State:
    """Reads a debug state of this model. UserError where the file is none."""
    header, length = read_header(path, STATE_MAGIC, (STATE_VERSION,), "an llm.c debug state")
    B, T = (positive(path, header[place], place, what) for place, what in ((2, "B"), (3, "T")))
    if model.context < T:
        raise UserError(f"{shown(path)}: T is {T} (at byte 12), and the model's context is {model.context}")
    V, count = model.vocabulary_size, gpt2_tables.count(model)
    expected = HEADER_BYTES + 4 * (2 * B * T + B * T * V + 1 + count)
    check_size(path, length, expected, f"a state of {B} x {T} tokens of this model")
    mapped = memory_map(path, "<i4")[HEADER_BYTES // 4 :]
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
    grads = read_tensors(path, expected - 4 * count, model, model.padded_vocabulary_size, tensors.DTYPES["float32"])
    return State(tokens, targets, floats[:end].reshape(B, T, V), float(floats[end]), grads)


def write_state(path: Path, state: State) -> None:
    """Writes a debug state, whose gradients are stacked NumPy arrays."""
    with path.open("wb") as file:
        file.write(write_header([STATE_MAGIC, STATE_VERSION, *state.tokens.shape]))
        for ids in (state.tokens, state.targets):
            file.write(np.ascontiguousarray(ids, "<i4").tobytes())
        file.write(np.ascontiguousarray(state.logits, "<f4").tobytes())
        file.write(np.float32(state.loss).tobytes())
        for part in tensor_bytes(state.grads, tensors.DTYPES["float32"]):
            file.write(part)


# Tokenizers


def read_tokenizer(path: Path) -> tuple[tuple[bytes, ...], int]:
    """Returns the tokens of a tokenizer file by id, and the end of text's id. UserError where it is damaged."""
    header, length = read_header(path, TOKENIZER_MAGIC, (1, 2), "an llm.c tokenizer file")
    version, V = header[1], positive(path, header[2], 2, "the vocabulary")
    end_of_text = END_OF_TEXT if version == 1 else header[3]
    if not 0 <= end_of_text < V:
        raise UserError(f"{shown(path)}: end-of-text is {end_of_text} (at byte 12), and the vocabulary has {V} tokens")
    if length < HEADER_BYTES + 2 * V:  # before anything is read: a length and a byte each
        check_size(path, length, HEADER_BYTES + 2 * V, f"{V} tokens, at least,")
    if length > HEADER_BYTES + 256 * V:
        check_size(path, length, HEADER_BYTES + 256 * V, f"{V} tokens, at most,")
    data = files.read_bytes(path, length)
    tokens, place = [], HEADER_BYTES
    for number in range(V):
        end = place + 1 + (data[place] if place < len(data) else 0)
        if not place + 1 < end <= len(data):
            problem = "is cut off" if end > len(data) or place >= len(data) else "has no bytes"
            raise UserError(f"{shown(path)}: token {number} of {V}, at byte {place}, {problem}")
        tokens.append(data[place + 1 : end])
        place = end
    check_size(path, len(data), place, f"these {V} tokens")
    return tuple(tokens), end_of_text


def write_tokenizer(path: Path, tokens: Sequence[bytes], end_of_text: int | None) -> None:
    """Writes a tokenizer file. UserError for a vocabulary that the format can't hold."""
    if end_of_text is None:
        raise UserError("an llm.c tokenizer file names an end-of-text token, and this tokenizer has none")
    for number, token in enumerate(tokens):
        if not 1 <= len(token) <= LONGEST_TOKEN:
            raise UserError(
                f"token {number} has {len(token)} bytes, and an llm.c tokenizer file can hold 1 to {LONGEST_TOKEN}"
            )
    with path.open("wb") as file:
        file.write(write_header([TOKENIZER_MAGIC, 2, len(tokens), end_of_text]))
        for token in tokens:
            file.write(bytes([len(token)]) + token)
