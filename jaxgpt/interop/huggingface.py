"""Hugging Face's GPT-2 folders, read: config.json, and safetensors in one file or in several with an index.

Tensors are read by memory-mapping, one at a time, and never a pickle. What config.json says is checked against the
headers of the safetensors files before anything is allocated; safetensors itself checks a header against its file's
size.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgpt import files
from jaxgpt.config import Model
from jaxgpt.errors import UserError
from jaxgpt.interop import huggingface_tokenizer, tensors
from jaxgpt.interop.source import Source
from jaxgpt.models.blocks import Params
from jaxgpt.settings import LARGEST

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
HEAD = "lm_head.weight"
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# What our GPT-2 is, and another value would make another model. Absent ones have transformers' defaults, the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}  # and defaults

SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors")
BUFFER = re.compile(r"h\.\d{1,9}\.attn\.(bias|masked_bias)")  # the causal mask, which old files have
BLOCK = re.compile(r"h\.(0|[1-9]\d{0,8})\.(.+)", re.DOTALL)
OF_BLOCKS = {tensor.huggingface: tensor for tensor in tensors.TENSORS if tensor.stacked}
OF_ENDS = {tensor.huggingface: tensor for tensor in tensors.TENSORS if not tensor.stacked}


class _Tensors:
    """All tensors of a folder by their names, without the prefix."""

    def __init__(self, folder: Path):
        self.paths = _shards(folder)
        self.where: dict[str, tuple[Any, str]] = {}  # the open file, and the name in it
        for path in self.paths:
            file = _open(path)
            for stored in file.keys():  # noqa: SIM118  # it is no dict
                name = stored.removeprefix(PREFIX)
                if BUFFER.fullmatch(name):
                    continue
                if name in self.where:
                    raise UserError(f"{path}: the tensor {name} is there twice")
                self.where[name] = (file, stored)

    def header(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype, as safetensors names it."""
        file, stored = self.where[name]
        part = file.get_slice(stored)
        return part.get_shape(), part.get_dtype()

    def read(self, name: str) -> np.ndarray:
        file, stored = self.where[name]
        return file.get_tensor(stored)


def open_folder(folder: Path) -> Source:
    """UserError for a folder that isn't GPT-2's, whose files don't agree, or that hasn't got its weights."""
    model = model_of(folder / CONFIG, files.read_json(folder / CONFIG, 1 << 20))
    found = _Tensors(folder)
    dtypes = _check(folder, found, model)
    dtype = STORED[dtypes.pop()] if len(dtypes) == 1 else "float32"
    tokenizer, notes = huggingface_tokenizer.read(folder, model)
    return Source(
        where=str(folder),
        kind="a Hugging Face folder" + (f" of {len(found.paths)} files" if len(found.paths) > 1 else ""),
        model=model,
        dtype=dtype,
        tokenizer=tokenizer,
        load=lambda: _load(folder, found, model, tensors.DTYPES[dtype]),
        notes=notes,
    )


def model_of(path: Path, config: dict[str, Any]) -> Model:
    """The model that a config.json describes. UserError, naming the key, for one that our GPT-2 can't be."""
    kind = config.get("model_type", "gpt2")
    if kind != "gpt2":
        raise UserError(f"{path}: model_type is {kind!r}; this version reads GPT-2 models")
    sizes = {}
    for key, default in SIZES.items():
        value = config.get(key, default)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise UserError(f"{path}: {key} is {str(value)[:40]}, and must be a whole number from 1 to {LARGEST}")
        sizes[key] = value
    for key, allowed in FIXED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{path}: {key} is {str(value)[:40]}; this project's GPT-2 has {allowed[0]}")
    inner = config.get("n_inner")
    if inner is not None and inner != 4 * sizes["n_embd"]:
        raise UserError(f"{path}: n_inner is {str(inner)[:40]}; this project's GPT-2 has four times n_embd")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(f"{path}: n_embd is {sizes['n_embd']}, and {sizes['n_head']} heads (n_head) don't divide it")
    return Model(
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        width=sizes["n_embd"],
        context=sizes["n_positions"],
        vocabulary_size=sizes["vocab_size"],
    )


# Files


def _shards(folder: Path) -> list[Path]:
    """The safetensors files, each in the folder itself."""
    if (folder / WEIGHTS).exists():
        return [_inside(folder, WEIGHTS)]
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        advice = (
            f"{pickled[0]} is a pickle, which can run code and is not read: save the model again with transformers, "
            "which writes safetensors"
            if pickled
            else "give a folder that transformers' save_pretrained wrote"
        )
        raise UserError(f"{folder}: there is neither {WEIGHTS} nor {INDEX}; {advice}")
    return [_inside(folder, name) for name in shard_names(files.read_json(folder / INDEX), folder)]


def shard_names(index: dict[str, Any], folder: Path) -> list[str]:
    """The files that an index names. UserError for one that is not the plain name of a safetensors file."""
    weights = index.get("weight_map")
    if not (weights and isinstance(weights, dict) and all(isinstance(name, str) for name in weights.values())):
        raise UserError(f"{folder / INDEX}: there is no weight_map from tensors to files")
    names = sorted(set(weights.values()))
    for name in names:
        if not SHARD.fullmatch(name):
            raise UserError(
                f"{folder / INDEX}: the file {name[:80]!r} is refused: it must be the plain name of a .safetensors "
                "file in this folder"
            )
    return names


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder. UserError for a link that leads out of it; the hub's cache links into its own blobs."""
    path, allowed = folder / name, [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        allowed.append(folder.absolute().parent.parent.resolve() / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise UserError(f"{path}: can't be read ({error})") from None
    if target.parent not in allowed:
        raise UserError(f"{path} is a link out of its folder, to {target}, and is refused: copy the file itself there")
    files.size(path)
    return path


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}). Get it again from where it came") from None


# Tensors


def _expected(model: Model) -> Iterator[str]:
    yield from OF_ENDS
    for layer in range(model.layers):
        for name in OF_BLOCKS:
            yield f"h.{layer}.{name}"


def _check(folder: Path, found: _Tensors, model: Model) -> set[str]:
    """The dtypes of all tensors. UserError where there are others than the model's, or one of another shape or dtype.

    It takes as long as there are tensors, however many layers config.json claims.
    """
    dtypes = set()
    for name in found.where:
        tensor = _tensor(name, model)
        if tensor is None:
            raise UserError(f"{folder}: the tensor {name[:80]!r} is none of a GPT-2 of {model.layers} layers")
        shape, stored = found.header(name)
        expected = _stored_shape(tensor, model)
        if shape != expected:
            raise UserError(f"{folder}: the tensor {name} is {shape}, and {expected} by {CONFIG}")
        if stored not in STORED:
            raise UserError(f"{folder}: the tensor {name} is of type {stored}; {', '.join(STORED)} can be read")
        dtypes.add(stored)
    if len(found.where) - (HEAD in found.where) != len(OF_ENDS) + model.layers * len(OF_BLOCKS):
        missing = next(name for name in _expected(model) if name not in found.where)
        raise UserError(f"{folder}: the tensor {missing} is missing, which a GPT-2 of {model.layers} layers has")
    return dtypes


def _tensor(name: str, model: Model) -> tensors.Tensor | None:
    """What a tensor of that name is; the head is the token table. None where such a model has none."""
    if name == HEAD:
        return OF_ENDS["wte.weight"]
    of_block = BLOCK.fullmatch(name)
    if of_block:
        return OF_BLOCKS.get(of_block[2]) if int(of_block[1]) < model.layers else None
    return OF_ENDS.get(name)


def _stored_shape(tensor: tensors.Tensor, model: Model) -> list[int]:
    """Of one layer, without the token table's padding."""
    shape = list(tensors.shape(tensor, model))[tensor.stacked :]
    return [model.vocabulary_size, *shape[1:]] if tensor.huggingface == "wte.weight" else shape


def _load(folder: Path, found: _Tensors, model: Model, dtype: np.dtype) -> Params:
    arrays = {}
    for tensor in tensors.TENSORS:
        array = arrays[tensor.ours] = np.empty(tensors.shape(tensor, model), dtype)
        if tensor.stacked:
            for layer in range(model.layers):
                array[layer] = found.read(f"h.{layer}.{tensor.huggingface}")
        elif tensor.huggingface == "wte.weight":
            array[: model.vocabulary_size] = found.read(tensor.huggingface)
            array[model.vocabulary_size :] = 0
        else:
            array[...] = found.read(tensor.huggingface)
    if HEAD in found.where:
        _check_tied(folder, found, arrays["embedding.token"][: model.vocabulary_size])
    return tensors.from_named(arrays)


def _check_tied(folder: Path, found: _Tensors, token: np.ndarray) -> None:
    head = found.read(HEAD)
    if head.astype(token.dtype).tobytes() != token.tobytes():
        raise UserError(f"{folder}: {HEAD} differs from wte.weight, and in this project's GPT-2 both are one")
