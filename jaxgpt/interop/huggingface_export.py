"""Writes Hugging Face's GPT-2 folders, which `transformers.GPT2LMHeadModel.from_pretrained` and `pipeline` load."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.interop import huggingface, huggingface_tokenizer, tensors
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model


def config(model: Model, dtype: str, end_of_text: int | None) -> dict[str, object]:
    """Returns the content of config.json. Dropout is off, as it was in training."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocabulary_size,
        "n_positions": model.context,
        "n_ctx": model.context,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
    }


def write(
    folder: Path, params: Params, model: Model, dtype: str, tokenizer: Tokenizer | None, shard_bytes: int
) -> None:
    """Fills an empty folder with a model.

    Args:
        folder: The folder.
        params: Stacked NumPy arrays.
        model: The model's shape.
        dtype: The dtype that is written, a key of `tensors.DTYPES`.
        tokenizer: The tokenizer; None writes none.
        shard_bytes: The largest size of a safetensors file, but for a tensor that alone is larger.

    Raises:
        UserError: A number is beyond what the dtype can hold.
    """
    end_of_text = tokenizer.end_of_text if tokenizer else None
    _write_json(folder / huggingface.CONFIG, config(model, dtype, end_of_text))
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    _write_json(folder / "generation_config.json", generation)
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
        file = huggingface.WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        contiguous = {name: np.ascontiguousarray(tensors.cast(array, dtype, name)) for name, array in shard}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / huggingface.CONFIG, folder / file)  # safetensors makes it readable by its owner alone
        where |= dict.fromkeys(contiguous, file)
    if len(shards) > 1:
        _write_json(folder / huggingface.INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _named(params: Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors' names at Hugging Face, and their arrays, which are views of ours."""
    for tensor, array in tensors.paired(params):
        if tensor.stacked:
            for layer in range(model.layers):
                yield f"{huggingface.PREFIX}h.{layer}.{tensor.huggingface}", array[layer]
        elif tensor.huggingface == "wte.weight":
            yield huggingface.PREFIX + tensor.huggingface, array[: model.vocabulary_size]
        else:
            yield huggingface.PREFIX + tensor.huggingface, array
