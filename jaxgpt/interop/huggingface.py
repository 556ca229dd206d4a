"""Reads and writes Hugging Face's folders: config.json, safetensors files, and a tokenizer's.

config.json is checked against the headers of the safetensors files before anything is allocated. Tensors are read one
at a time into the stacked arrays of this project, and are written a file at a time from views of them, so that a
conversion takes little more memory than the weights. Where an array can be read when its turn comes, it takes less.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import files
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import (
    gpt2_tables,
    huggingface_chat,
    huggingface_config,
    huggingface_tokenizer,
    llama_tables,
    tensors,
)
from jaxgpt.interop.safetensors_files import CONFIG, STORED, Named, Tensors, write, write_json
from jaxgpt.interop.tensors import NUMBER, Part, Table, WeightSource
from jaxgpt.models import family
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model

TABLES: dict[str, Callable[[Model], Table]] = {
    "gpt2": gpt2_tables.table,
    "llama": llama_tables.table,
    "mixtral": llama_tables.table,
}
LINEAR = ": as nn.Linear and nanoGPT store it. docs/formats.md tells how to turn it"
NUMBERS = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,8})(?=\.)")  # of layers and experts in a name


def table_of(model: Model) -> Table:
    """Returns the table of a model's tensors."""
    return TABLES[model.family](model)


def open_folder(folder: Path) -> WeightSource:
    """Opens a folder. UserError where it is no model of ours, its files don't agree, or it has no weights."""
    config = files.read_json(folder / CONFIG, 1 << 20, huggingface_tokenizer.root(folder))
    model = huggingface_config.model_of(folder / CONFIG, config)
    table = table_of(model)
    found = Tensors(folder, table.prefix, table.passed_over)
    _name_head(found, table)
    dtypes = _check(folder, found, table, model)
    dtype = STORED[dtypes.pop()] if len(dtypes) == 1 else "float32"
    end_of_text = huggingface_config.end_of_text(config)
    tokenizer, notes = huggingface_tokenizer.read(folder, model, end_of_text)
    return WeightSource(
        where=str(folder),
        kind="a Hugging Face folder" + (f" of {len(found.paths)} files" if len(found.paths) > 1 else ""),
        model=model,
        dtype=dtype,
        tokenizer=tokenizer,
        load=lambda: _load(folder, found, table, model, tensors.DTYPES[dtype]),
        notes=(*notes, *huggingface_config.notes(config)),
        unreadable_tokenizer=tokenizer is None and bool(notes),
        template=huggingface_chat.template_of(folder),
    )


def _is_tied(table: Table) -> bool:
    return all(part.name != table.head for part in table.parts)


def _name_head(found: Tensors, table: Table) -> None:
    """Takes a head that is there alone for the token table of a tied model."""
    if _is_tied(table) and table.head in found.where and table.token not in found.where:
        found.where[table.token] = found.where.pop(table.head)


def _check(folder: Path, found: Tensors, table: Table, model: Model) -> set[str]:
    """Returns the dtypes of all tensors, in a time that doesn't depend on how many layers config.json claims.

    UserError where the tensors are not exactly the model's, or one has another shape, or a dtype not in STORED.
    """
    parts, dtypes = {part.name: part for part in table.parts}, set()
    if _is_tied(table):
        parts[table.head] = parts[table.token]
    what = f"{table.kind} of {model.layers} layers"
    for name in found.where:
        part = _part(name, parts)
        if part is None:
            raise UserError(f"{shown(folder)}: the tensor {quoted(name[:80])} is none of {what}")
        shape, stored = found.header(name)
        if shape != part.shape:
            turned = len(shape) > 1 and shape == part.shape[::-1] and bool(part.counts)
            advice = (": as GPT-2 stores it" if part.turned else LINEAR) if turned else ""
            raise UserError(
                f"{shown(folder)}: the tensor {name} is {list(shape)}, and {list(part.shape)} by {CONFIG}{advice}"
            )
        if stored not in STORED:
            raise UserError(
                f"{shown(folder)}: the tensor {name} is of type {shown(stored)}; {', '.join(STORED)} can be read"
            )
        dtypes.add(stored)
    extra = _is_tied(table) and table.head in found.where
    if len(found.where) - extra != sum(math.prod(part.counts) for part in table.parts):
        names = itertools.chain.from_iterable(part.names() for part in table.parts)
        missing = next(name for name, _ in names if name not in found.where)
        raise UserError(f"{shown(folder)}: the tensor {missing} is missing, which {what} has")
    return dtypes


def _part(name: str, parts: dict[str, Part]) -> Part | None:
    """Returns the part with this name; None where the model has no such tensor."""
    numbers = [int(number) for number in NUMBERS.findall(name)]
    part = parts.get(NUMBERS.sub(NUMBER, name))
    if part is None or len(numbers) != len(part.counts):
        return None
    return part if all(number < count for number, count in zip(numbers, part.counts, strict=True)) else None


def _load(folder: Path, found: Tensors, table: Table, model: Model, dtype: np.dtype) -> Params:
    """Returns the weights. UserError where a tied model has a head that is not its token table."""
    if _is_tied(table) and table.head in found.where:
        head, token = (found.read(name).astype(dtype, copy=False) for name in (table.head, table.token))
        if head.tobytes() != token.tobytes():
            raise UserError(f"{shown(folder)}: {table.head} differs from {table.token}, and by {CONFIG} both are one")
    return filled(table, model, dtype, found.read)


def filled(table: Table, model: Model, dtype: np.dtype, read: Callable[[str], np.ndarray]) -> Params:
    """Returns a model's parameters, stacked; `read` gives a tensor of theirs by its name, one at a time."""
    shapes = jax.eval_shape(lambda: family(model).init(model, jax.random.key(0)))

    def one(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        array = tensors.zeros(like.shape, dtype)  # what no part fills is the padding of a table
        for part in table.parts:
            if part.ours == _path(path):
                for name, numbers in part.names():
                    part.of(array, numbers)[...] = read(name)
        return array

    return jax.tree_util.tree_map_with_path(one, shapes)


def _path(path: tuple[Any, ...]) -> str:
    return ".".join(key.name for key in path)


# Writing


def check(model: Model) -> None:
    """Raises a UserError for a model that transformers can't compute."""
    huggingface_config.content_of(model, "float32", {})


def write_folder(
    folder: Path,
    params: Params,
    model: Model,
    dtype: str,
    tokenizer: Tokenizer | None,
    shard_bytes: int,
    template: Template | None = None,
) -> None:
    """Fills an empty folder with a model, its stacked NumPy arrays in a dtype that is a key of `tensors.DTYPES`.

    In the place of an array may be a function that reads it: of such arrays one is in memory at a time. A safetensors
    file has `shard_bytes` at most, but for a tensor that alone is larger. UserError for a number beyond what the dtype
    can hold.
    """
    ids = huggingface_config.special_ids(tokenizer)
    write_json(folder / CONFIG, huggingface_config.content_of(model, dtype, ids))
    ends = huggingface_chat.end_ids(template, tokenizer) if template and tokenizer else []
    write_json(folder / "generation_config.json", ids | ({"eos_token_id": ends} if ends else {}))
    if tokenizer:
        contents = huggingface_tokenizer.files_of(tokenizer, model)
        if template and contents:
            contents[huggingface_chat.FILE] = huggingface_chat.source_of(template, contents)
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
    write(folder, named(params, model), tensors.DTYPES[dtype], shard_bytes)


def named(params: Params, model: Model) -> Iterator[Named]:
    """Yields the tensors by their names at Hugging Face; they are views of ours."""
    table = table_of(model)
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    held: dict[str, Any] = {}

    def read(part: Part, numbers: tuple[int, ...]) -> np.ndarray:
        if part.ours not in held:  # the parts of one of our arrays follow one another
            held.clear()
            leaf = leaves[part.ours]
            held[part.ours] = leaf() if callable(leaf) else leaf
        return part.of(held[part.ours], numbers)

    for part in table.parts:
        prefix = "" if part.name == table.head else table.prefix
        for name, numbers in part.names():
            yield Named(prefix + name, math.prod(part.shape), functools.partial(read, part, numbers))
