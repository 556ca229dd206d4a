"""Reads and writes Hugging Face's GPT-2 folders: config.json, and safetensors in one file or several with an index.

Tensors are memory-mapped and read one at a time; pickles are never read. config.json is checked against the headers of
the safetensors files before anything is allocated. The package safetensors checks each header against its file's size.
"""

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgpt import files, foreign_text
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import huggingface_config, huggingface_tokenizer, tensors
from jaxgpt.interop.tensors import WeightSource
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
LARGEST_HEADER = 1 << 24  # bytes; a thousand layers have a header of 2 million
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
HEAD, TOKEN = "lm_head.weight", "wte.weight"  # two names of one tensor
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Prefixes of tensor names: of transformers, of torch.compile, and of DistributedDataParallel.
PREFIXES = re.compile(r"(?:transformer\.|_orig_mod\.|module\.)+")
SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors")
BUFFER = re.compile(r"h\.\d{1,9}\.attn\.(bias|masked_bias)")  # the causal mask, which old files store
BLOCK = re.compile(r"h\.(0|[1-9]\d{0,8})\.(.+)", re.DOTALL)
OF_BLOCKS = {tensor.huggingface: tensor for tensor in tensors.TENSORS if tensor.stacked}
OF_ENDS = {tensor.huggingface: tensor for tensor in tensors.TENSORS if not tensor.stacked}


class _Tensors:
    """All tensors of a folder, by their names without prefix."""

    def __init__(self, folder: Path):
        self.paths = _shards(folder)
        self.where: dict[str, tuple[Any, str]] = {}  # by name: the open file, and the name in that file
        for path in self.paths:
            file = open_file(path)
            for stored in file.keys():  # noqa: SIM118  # it is no dict
                name = PREFIXES.sub("", stored, count=1) if PREFIXES.match(stored) else stored
                if BUFFER.fullmatch(name):
                    continue
                if name in self.where:
                    raise UserError(f"{shown(path)}: the tensor {shown(name)} is there twice")
                self.where[name] = (file, stored)
        if HEAD in self.where and TOKEN not in self.where:
            self.where[TOKEN] = self.where.pop(HEAD)

    def header(self, name: str) -> tuple[list[int], str]:
        """Returns a tensor's shape, and its dtype by safetensors' name."""
        file, stored = self.where[name]
        part = file.get_slice(stored)
        return part.get_shape(), part.get_dtype()

    def read(self, name: str) -> np.ndarray:
        file, stored = self.where[name]
        return file.get_tensor(stored)


def open_folder(folder: Path) -> WeightSource:
    """Opens a folder. UserError where it isn't GPT-2's, its files don't agree, or it has no weights."""
    config = files.read_json(folder / CONFIG, 1 << 20, huggingface_tokenizer.root(folder))
    model = huggingface_config.model_of(folder / CONFIG, config)
    found = _Tensors(folder)
    dtypes = _check(folder, found, model)
    dtype = STORED[dtypes.pop()] if len(dtypes) == 1 else "float32"
    end_of_text = huggingface_config.end_of_text(config)
    tokenizer, notes = huggingface_tokenizer.read(folder, model, end_of_text)
    return WeightSource(
        where=str(folder),
        kind="a Hugging Face folder" + (f" of {len(found.paths)} files" if len(found.paths) > 1 else ""),
        model=model,
        dtype=dtype,
        tokenizer=tokenizer,
        load=lambda: _load(folder, found, model, tensors.DTYPES[dtype]),
        notes=(*notes, *huggingface_config.notes(config)),
        unreadable_tokenizer=tokenizer is None and bool(notes),
    )


# Files


def _shards(folder: Path) -> list[Path]:
    """Returns the folder's safetensors files. UserError where it has none."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        advice = (
            f"{pickled[0]} is a pickle, which can run code and is not read: save the model again with transformers, "
            "which writes safetensors"
            if pickled
            else "give a folder that transformers' save_pretrained wrote"
        )
        raise UserError(f"{shown(folder)}: there is neither {WEIGHTS} nor {INDEX}; {advice}")
    index = files.read_json(folder / INDEX, within=huggingface_tokenizer.root(folder))
    return [folder / name for name in shard_names(index, folder)]


def shard_names(index: dict[str, Any], folder: Path) -> list[str]:
    """Returns the files that an index names. UserError for one that is not the plain name of a safetensors file."""
    weights = index.get("weight_map")
    if not (weights and isinstance(weights, dict) and all(isinstance(name, str) for name in weights.values())):
        raise UserError(f"{shown(folder / INDEX)}: there is no weight_map from tensors to files")
    names = sorted(set(weights.values()))
    for name in names:
        if not SHARD.fullmatch(name):
            raise UserError(
                f"{shown(folder / INDEX)}: the file {quoted(name[:80])} is refused: it must be the plain name of a "
                ".safetensors file in this folder"
            )
    return names


def open_file(path: Path) -> Any:
    """Opens a safetensors file. UserError where it is damaged.

    The package checks the header against the file's size, but accepts names that are there twice, so they are refused
    here.
    """
    within = huggingface_tokenizer.root(path.parent)
    files.refuse_pointer(path, within)
    try:
        with files.open_file(path, within) as file:
            length, room = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size - 8
            if length > min(room, LARGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes, and {max(room, 0):,} follow")
            foreign_text.parse_json(file.read(length), unique=True)
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{shown(path)}: not a whole safetensors file ({shown(error)}). Get it again from where it came"
        ) from None


# Tensors


def _check(folder: Path, found: _Tensors, model: Model) -> set[str]:
    """Returns the dtypes of all tensors, in a time that doesn't depend on how many layers config.json claims.

    UserError where the tensors are not exactly the model's, or one has another shape, or a dtype not in STORED.
    """
    dtypes = set()
    for name in found.where:
        tensor = _tensor(name, model)
        if tensor is None:
            raise UserError(
                f"{shown(folder)}: the tensor {quoted(name[:80])} is none of a GPT-2 of {model.layers} layers"
            )
        shape, stored = found.header(name)
        expected = list(tensors.shape(tensor, model))[tensor.stacked :]  # of one layer
        if tensor.huggingface == TOKEN:
            expected[0] = model.vocabulary_size  # without the padding
        if shape != expected:
            turned = len(shape) > 1 and shape == expected[::-1] and tensor.stacked
            advice = ": as nn.Linear and nanoGPT store it. docs/formats.md tells how to turn it" if turned else ""
            raise UserError(f"{shown(folder)}: the tensor {name} is {shape}, and {expected} by {CONFIG}{advice}")
        if stored not in STORED:
            raise UserError(
                f"{shown(folder)}: the tensor {name} is of type {shown(stored)}; {', '.join(STORED)} can be read"
            )
        dtypes.add(stored)
    if len(found.where) - (HEAD in found.where) != len(OF_ENDS) + model.layers * len(OF_BLOCKS):
        of_blocks = (f"h.{layer}.{name}" for layer in range(model.layers) for name in OF_BLOCKS)
        missing = next(name for name in itertools.chain(OF_ENDS, of_blocks) if name not in found.where)
        raise UserError(f"{shown(folder)}: the tensor {missing} is missing, which a GPT-2 of {model.layers} layers has")
    return dtypes


def _tensor(name: str, model: Model) -> tensors.Tensor | None:
    """Returns the tensor with this name, the token table for the head; None where the model has no such tensor."""
    if name == HEAD:
        return OF_ENDS[TOKEN]
    of_block = BLOCK.fullmatch(name)
    if of_block:
        return OF_BLOCKS.get(of_block[2]) if int(of_block[1]) < model.layers else None
    return OF_ENDS.get(name)


def _load(folder: Path, found: _Tensors, model: Model, dtype: np.dtype) -> Params:
    arrays = {}
    for tensor in tensors.TENSORS:
        array = arrays[tensor.ours] = np.empty(tensors.shape(tensor, model), dtype)
        if tensor.stacked:
            for layer in range(model.layers):
                array[layer] = found.read(f"h.{layer}.{tensor.huggingface}")
        elif tensor.huggingface == TOKEN:
            array[: model.vocabulary_size] = found.read(tensor.huggingface)
            array[model.vocabulary_size :] = 0
        else:
            array[...] = found.read(tensor.huggingface)
    token = arrays["embedding.token"][: model.vocabulary_size]
    if HEAD in found.where and found.read(HEAD).astype(dtype).tobytes() != token.tobytes():
        raise UserError(f"{shown(folder)}: {HEAD} differs from {TOKEN}, and in this project's GPT-2 both are one")
    return tensors.from_named(arrays)


# Writing


def write_folder(
    folder: Path, params: Params, model: Model, dtype: str, tokenizer: Tokenizer | None, shard_bytes: int
) -> None:
    """Fills an empty folder with a model, its stacked NumPy arrays in a dtype that is a key of `tensors.DTYPES`.

    A safetensors file has `shard_bytes` at most, but for a tensor that alone is larger. UserError for a number beyond
    what the dtype can hold.
    """
    end_of_text = tokenizer.end_of_text if tokenizer else None
    _write_json(folder / CONFIG, huggingface_config.content_of(model, dtype, end_of_text))
    _write_json(folder / "generation_config.json", dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text))
    if tokenizer:
        for name, content in huggingface_tokenizer.files_of(tokenizer, model).items():
            (folder / name).write_text(content, encoding="utf-8")
    _write_weights(folder, params, model, tensors.DTYPES[dtype], shard_bytes)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, params: Params, model: Model, dtype: np.dtype, shard_bytes: int) -> None:
    """Writes one file, or several of at most `shard_bytes` (but for a tensor that alone has more) and their index."""
    shards: list[list[tuple[str, np.ndarray]]] = [[]]
    filled = total = 0
    for name, array in _named(params, model):
        size = math.prod(array.shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, array))
        filled, total = filled + size, total + size
    where = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        contiguous = {name: np.ascontiguousarray(tensors.cast(array, dtype, name)) for name, array in shard}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / file)  # safetensors makes it readable by its owner alone
        where |= dict.fromkeys(contiguous, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _named(params: Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors' names at Hugging Face, and their arrays, which are views of ours."""
    for tensor, array in tensors.paired(params):
        if tensor.stacked:
            for layer in range(model.layers):
                yield f"{PREFIX}h.{layer}.{tensor.huggingface}", array[layer]
        elif tensor.huggingface == TOKEN:
            yield PREFIX + tensor.huggingface, array[: model.vocabulary_size]
        else:
            yield PREFIX + tensor.huggingface, array
