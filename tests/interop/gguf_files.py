"""GGUF files that the package gguf writes: small models of each architecture, with tensors of any type.

The names and the order of queries' and keys' rows are llama.cpp's, of its convert_hf_to_gguf.py.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt.options.config import Model

gguf = pytest.importorskip("gguf", reason="writes GGUF files, with the package of the extra gguf")

KEYS: dict[str, Callable[[Model], Any]] = {
    "context_length": lambda m: m.context,
    "embedding_length": lambda m: m.width,
    "block_count": lambda m: m.layers,
    "feed_forward_length": lambda m: m.feed_forward,
    "attention.head_count": lambda m: m.heads,
    "attention.head_count_kv": lambda m: m.key_value_heads,
    "attention.key_length": lambda m: m.width_per_head,
    "attention.value_length": lambda m: m.width_per_head,
    "attention.layer_norm_rms_epsilon": lambda m: float(m.norm_epsilon),
    "rope.dimension_count": lambda m: m.width_per_head,
    "rope.freq_base": lambda m: float(m.rope_base),
    "vocab_size": lambda m: m.vocabulary_size,
}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += ["▁", "t", "h", "e", "▁t", "he", "▁the", "a", "▁a", "é", "th", "o", "g", "og", "▁d", "d", "<tool>"]


def state(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise for each tensor, (out, in), by GGUF's names and in Hugging Face's order of rows."""
    C, F, V, D = model.width, model.feed_forward, model.vocabulary_size, model.width_per_head
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (V, C), "output_norm": (C,)}
    if not model.tied:
        shapes["output"] = (V, C)
    for i in range(model.layers):
        layer = {"attn_norm": (C,), "ffn_norm": (C,), "attn_q": (model.heads * D, C)}
        layer |= dict.fromkeys(("attn_k", "attn_v"), (model.key_value_heads * D, C))
        layer |= {"attn_output": (C, model.heads * D)}
        if model.query_key_norm:
            layer |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (D,))
        mlp = {"ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}
        if model.experts:
            layer |= {"ffn_gate_inp": (model.experts, C)}
            layer |= {f"{name}_exps": (model.experts, *shape) for name, shape in mlp.items()}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (layer if model.experts else layer | mlp).items()}
    made = {name: generator.normal(0.05, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return {f"{name}.weight": array for name, array in made.items()}


def as_llamacpp(name: str, array: np.ndarray, model: Model) -> np.ndarray:
    """Queries and keys with neighbours as rotary pairs, as llama.cpp's architecture llama has them."""
    heads = {"attn_q": model.heads, "attn_k": model.key_value_heads}.get(name.split(".")[-2])
    if heads is None or array.ndim == 1:
        return array
    return array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def write(
    path: Path,
    model: Model,
    arrays: Mapping[str, np.ndarray],
    *,
    kind: str = "F32",
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    template: str = "",
) -> None:
    """Writes a file whose matrices are of a type; `keys` are added, and left away where they are None."""
    writer = gguf.GGUFWriter(path, architecture)
    found = {name: make(model) for name, make in KEYS.items()}
    if model.experts:
        found |= {"expert_count": model.experts, "expert_used_count": model.experts_per_token}
    if model.window:
        found["attention.sliding_window"] = model.window
    for name, value in (found | dict(keys or {})).items():
        _add(writer, f"{architecture}.{name}", value)
    for name, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.ggml.{name}", value)
    _add(writer, "tokenizer.chat_template", template or None)
    for name, array in arrays.items():
        laid = as_llamacpp(name, array, model) if architecture == "llama" else array
        form = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(laid), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    types = gguf.GGUFValueType
    if isinstance(value, list | tuple):
        writer.add_array(key, value)
    elif value is not None:
        kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
        writer.add_key_value(key, value, kinds[type(value)])


def sentencepiece(pieces: Sequence[str] = PIECES, **changed: Any) -> dict[str, Any]:
    """The keys of Llama 2's kind of tokenizer: pieces, whose scores fall, and their types."""
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 260), 4]
    scores = [0.0] * 259 + [-float(number) for number in range(len(pieces) - 259)]
    return {
        "model": "llama", "pre": "default", "tokens": list(pieces), "scores": scores, "token_type": types,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **changed,
    }  # fmt: skip


def byte_level(pre: str = "llama-bpe", **changed: Any) -> dict[str, Any]:
    """The keys of a byte-level tokenizer with special tokens, which stands before a text its first."""
    from jaxgpt.data.encodings import CHARACTER_OF

    merges = ["t h", "th e", "Ġ the", "Ġ d", "o g", "1 2"]
    words = [*CHARACTER_OF, *(merge.replace(" ", "") for merge in merges)]
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<think>"]
    types = [1] * len(words) + [3, 3, 3, 4]
    return {
        "model": "gpt2", "pre": pre, "tokens": [*words, *special], "merges": merges, "token_type": types,
        "bos_token_id": len(words), "eos_token_id": len(words) + 1, "add_bos_token": True, **changed,
    }  # fmt: skip
