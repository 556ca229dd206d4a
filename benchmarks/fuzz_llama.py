"""Fuzzed readers of Llama's formats: GGUF, llama2.c's files, and Llama 3's tokenizer.model."""

import base64
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_readers import Input, Reader, written
from jaxgpt.data import encodings, llama3
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.interop import gguf, llama2c

TEXT = "to be, or nöt: 123 <s></s>\n"
C, F, L, H, K, V, T = 32, 32, 1, 2, 1, 263, 4
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "o", "to"]


def gguf_files() -> list[Input]:
    """Returns files with either kind of tokenizer, several types of tensors, experts, and divisors of frequencies."""
    types = [2, 3, 3, *[6] * 256, *[1] * 4]
    pieces = {
        "model": "llama",
        "tokens": PIECES,
        "scores": [-float(i) for i in range(V)],
        "token_type": types,
        "bos_token_id": 1,
    }
    words = [*encodings.CHARACTER_OF, "th", "the", "<s>", "</s>", "<a>", "<b>", "<c>"]
    level = {"model": "gpt2", "pre": "llama-bpe", "tokens": words, "merges": ["t h", "th e"], "eos_token_id": 258}
    return [
        {"m.gguf": gguf_file("F32", pieces)},
        {"m.gguf": gguf_file("Q8_0", level, experts=2)},
        {"m.gguf": gguf_file("BF16", pieces, architecture="qwen3")},
        {"m.gguf": gguf_file("Q4_0", {})},
    ]


def gguf_file(kind: str, tokenizer: dict[str, Any], *, architecture: str = "llama", experts: int = 0) -> bytes:
    """Returns the bytes of a small file that the package gguf writes."""
    import gguf as package

    forms, types = package.GGMLQuantizationType, package.GGUFValueType
    D, generator = C // H, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (V, C), "output_norm": (C,), "blk.0.attn_norm": (C,)}
    shapes |= {"blk.0.attn_q": (H * D, C), "blk.0.attn_k": (K * D, C), "blk.0.attn_v": (K * D, C)}
    shapes |= {"blk.0.attn_output": (C, H * D), "blk.0.ffn_norm": (C,)}
    mlp = {"ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}
    if experts:
        shapes |= {f"blk.0.{name}_exps": (experts, *shape) for name, shape in mlp.items()}
        shapes |= {"blk.0.ffn_gate_inp": (experts, C)}
    else:
        shapes |= {f"blk.0.{name}": shape for name, shape in mlp.items()}
    if architecture == "qwen3":
        shapes |= {"blk.0.attn_q_norm": (D,), "blk.0.attn_k_norm": (D,)}
    keys: dict[str, Any] = {"context_length": T, "embedding_length": C, "block_count": L, "feed_forward_length": F}
    keys |= {"attention.head_count": [H], "attention.head_count_kv": K, "rope.freq_base": 10_000.0}
    keys |= {"expert_count": experts, "expert_used_count": 1} if experts else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        writer = package.GGUFWriter(path, architecture)
        kinds = {int: types.UINT32, float: types.FLOAT32, str: types.STRING}
        named = {f"{architecture}.{key}": value for key, value in keys.items()}
        for key, value in (named | {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}).items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, kinds[type(value)])
        for name, shape in shapes.items():
            form = forms[kind if len(shape) > 1 else "F32"]
            array = generator.normal(size=shape).astype(np.float32)
            writer.add_tensor(f"{name}.weight", package.quantize(array, form), raw_dtype=form)
        writer.add_tensor("rope_freqs.weight", np.ones(D // 2, np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path.read_bytes()


def read_gguf(folder: Path) -> None:
    source = gguf.open_model(folder / "m.gguf")
    use(source.tokenizer)
    source.load()


def use(tokenizer: Tokenizer | None) -> None:
    """Encodes a text and decodes tokens."""
    if tokenizer:
        tokenizer.decode(tokenizer.begin(tokenizer.encode(TEXT * 10)))
        tokenizer.join(range(min(300, tokenizer.vocabulary_size)))


def llama2c_models() -> list[Input]:
    def made(vocabulary_size: int) -> bytes:
        width, forward, heads = 8, 12, 2
        sizes = (width, forward, 2, heads, 1, vocabulary_size, T)
        V, D = abs(vocabulary_size), width // heads
        count = V * width * (1 + (vocabulary_size < 0)) + 2 * (2 * width + 2 * width**2 + 2 * D * width)
        count += 2 * 3 * width * forward + width + T * D
        return struct.pack("<7i", *sizes) + np.random.default_rng(0).normal(size=count).astype("<f4").tobytes()

    return [{"m.bin": made(V), "tokenizer.bin": llama2c_tokenizer()}, {"m.bin": made(-40)}]


def llama2c_tokenizer() -> bytes:
    texts = [piece.replace("▁", " ").encode() for piece in PIECES]
    rows = [struct.pack("<fi", -float(i), len(text)) + text for i, text in enumerate(texts)]
    return struct.pack("<i", 6) + b"".join(rows)


def read_llama2c(folder: Path) -> None:
    source = llama2c.open_model(folder / "m.bin")
    use(source.tokenizer)
    source.load()


def rank_files() -> list[Input]:
    tokens = [b"!", *(bytes([byte]) for byte in range(256) if byte != ord("!")), b"th", b"the", b" the", b"12"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]

    return [written(lambda folder: (folder / "tokenizer.model").write_bytes(b"".join(lines)))]


def read_ranks(folder: Path) -> None:
    tokens = llama3.read(folder / "tokenizer.model", count=260)
    use(HuggingFace(json.dumps(llama3.tokenizer_json(tokens)), 261, 260))


READERS = [
    Reader("GGUF file", gguf_files, read_gguf),
    Reader("llama2.c model", llama2c_models, read_llama2c),
    Reader(
        "llama2.c tokenizer",
        lambda: [{"t.bin": llama2c_tokenizer()}],
        lambda folder: use(llama2c.read_tokenizer(folder / "t.bin", V)),
    ),
    Reader("Llama 3 tokenizer", rank_files, read_ranks),
]
