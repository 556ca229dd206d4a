"""Reads and writes the safetensors files of a Hugging Face folder: one, or several with an index.

Tensors are memory-mapped and read one at a time; pickles are never read. The package safetensors checks each header
against its file's size.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgpt import files, foreign_text
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import huggingface_tokenizer, tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 1 << 24  # bytes; a thousand layers have a header of 2 million
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WRAPPERS = r"_orig_mod\.|module\."  # what torch.compile and DistributedDataParallel put before a name
SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors")


class Tensors:
    """All tensors of a folder, by their names without prefix."""

    def __init__(self, folder: Path, prefix: str, passed_over: str):
        self.paths = _shards(folder)
        self.where: dict[str, tuple[Any, str]] = {}  # by name: the open file, and the name in that file
        prefixes, unused = re.compile(f"(?:{re.escape(prefix)}|{WRAPPERS})+"), re.compile(passed_over)
        for path in self.paths:
            file = open_file(path)
            for stored in file.keys():  # noqa: SIM118  # it is no dict
                name = prefixes.sub("", stored, count=1) if prefixes.match(stored) else stored
                if unused.fullmatch(name):
                    continue
                if name in self.where:
                    raise UserError(f"{shown(path)}: the tensor {shown(name)} is there twice")
                self.where[name] = (file, stored)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Returns a tensor's shape, and its dtype by safetensors' name."""
        file, stored = self.where[name]
        part = file.get_slice(stored)
        return tuple(part.get_shape()), part.get_dtype()

    def read(self, name: str) -> np.ndarray:
        file, stored = self.where[name]
        return file.get_tensor(stored)


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


class Named(NamedTuple):
    """A tensor that is to be written."""

    name: str
    size: int  # its numbers
    read: Callable[[], np.ndarray]  # may return a view of any layout


def write(folder: Path, named: Iterable[Named], dtype: np.dtype, shard_bytes: int) -> None:
    """Writes one file, or several of at most `shard_bytes` (but for a tensor that alone has more), beside config.json.

    The tensors of one file are read and copied at a time, in their order. UserError for a number beyond what the dtype
    can hold.
    """
    shards: list[list[Named]] = [[]]
    filled = total = 0
    for tensor in named:
        size = tensor.size * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    where = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, dtype)
        where |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_shard(path: Path, shard: list[Named], dtype: np.dtype) -> None:
    # Copied also where that isn't needed: a view would keep the array that it is of while the next one is read.
    copies = {name: np.array(tensors.cast(read(), dtype, name), order="C") for name, _, read in shard}
    save_file(copies, path, metadata={"format": "pt"})
    shutil.copymode(path.with_name(CONFIG), path)  # safetensors makes it readable by its owner alone


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
