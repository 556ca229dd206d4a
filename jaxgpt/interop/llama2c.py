"""Reads llama2.c's files: models of version 0, the legacy export, and tokenizers.

    model      7 int32: width C, feed-forward F, layers L, heads H, key and value heads K, vocabulary V, context T;
               V is negative where the head is a table of its own
               float32: token table (V, C), attention norms (L, C), queries (L, C, C), keys and values (L, KD, C),
               attention's output (L, C, C), MLP norms (L, C), gates (L, F, C), down (L, C, F), up (L, F, C), the final
               norm (C), cosines and sines of the rotary positions (T, D/2), and the head (V, C) where it is its own
    tokenizer  int32: length of the longest token; for each token a float32 score, its length in int32, its bytes

All numbers are little-endian and matrices (out, in). Rotary pairs are neighbours, with the base 10,000; here they are
half a head apart. There is no magic number: a file is one of these where its size is what its header says. Ids of the
tokenizer: 0 unknown, 1 what stands before each text, 2 the end, 3 to 258 the bytes, and then pieces by SentencePiece.
"""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np

from jaxgpt import files
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import huggingface, llama_tables, sentencepiece_bpe, tensors
from jaxgpt.interop.gguf import halves
from jaxgpt.interop.llama_tables import shortest
from jaxgpt.interop.llmc import check_size, memory_map
from jaxgpt.interop.tensors import Part, WeightSource
from jaxgpt.models.blocks import Params
from jaxgpt.options.checks import LARGEST
from jaxgpt.options.config import Model

HEADER = struct.Struct("<7i")
TOKENIZER = "tokenizer.bin"  # beside the model
MAGIC = b"24ka"  # versions 1 and 2 begin with 0x616b3432, "ak42"
ORDER = (  # by the names at Hugging Face
    llama_tables.TOKEN, "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj", "norm.weight",
    llama_tables.HEAD,
)  # fmt: skip
UNKNOWN, BEGIN, END, FIRST_BYTE = 0, 1, 2, 3
NAMES = {UNKNOWN: "<unk>", BEGIN: "<s>", END: "</s>"}
LONGEST_TOKEN = 1 << 10  # bytes
LARGEST_TOKENIZER = 1 << 26


def _shape(path: Path) -> tuple[Model, bool] | None:
    """Returns the model by a file's header, and whether the head is its own; None where it isn't such a file."""
    with files.open_file(path) as file:
        beginning, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    if len(beginning) < HEADER.size:
        return None
    C, F, L, H, K, V, T = HEADER.unpack(beginning)
    if not all(1 <= number <= LARGEST for number in (C, F, L, H, K, abs(V), T)):
        return None
    if C % H or H % K or C // H % 2:
        return None
    model = Model(
        family="llama", layers=L, heads=H, kv_heads=K, width=C, feed_forward=F, context=T, vocabulary_size=abs(V),
        tied=V > 0,
    )  # fmt: skip
    return (shortest(model), V < 0) if size >= HEADER.size + 4 * abs(V) * C else None


def is_model(path: Path) -> bool:
    """Returns whether a file begins as a model of llama2.c does, and has at least its token table."""
    return _shape(path) is not None


def refuse_newer(path: Path, beginning: bytes) -> None:
    """Raises a UserError for a file of version 1 or 2."""
    if beginning[:4] == MAGIC:
        raise UserError(f"{shown(path)}: a llama2.c model of version 1 or 2; export it with --version 0")


def open_model(path: Path) -> WeightSource:
    """Opens a model file, and the tokenizer.bin beside it. UserError where it is none, or has another size."""
    files.refuse_pointer(path)
    found = _shape(path)
    if found is None:
        raise UserError(
            f"{shown(path)}: not a llama2.c model of version 0: its first 7 numbers can't be a model's sizes"
        )
    model, _ = found
    places, expected = _places(model)
    check_size(path, files.size(path), expected, "a llama2.c model of this shape")
    tokenizer, notes = None, ()
    beside = path.with_name(TOKENIZER)
    if files.is_file(beside):
        try:
            tokenizer = read_tokenizer(beside, model.vocabulary_size)
        except UserError as error:
            notes = (f"its tokenizer can't be read: {error}",)
    return WeightSource(
        where=str(path),
        kind="a llama2.c model file, version 0",
        model=model,
        dtype="float32",
        tokenizer=tokenizer,
        load=lambda: _load(path, model, places),
        notes=notes,
        unreadable_tokenizer=bool(notes),
    )


def _places(model: Model) -> tuple[dict[str, tuple[Part, int]], int]:
    """Returns each tensor's part and its byte offset in the file, by its name at Hugging Face, and the file's size."""
    parts = {_within(part.name): part for part in llama_tables.table(model).parts}
    offset, places = HEADER.size, {}
    for name in ORDER:
        if name == llama_tables.HEAD:
            offset += 4 * model.context * model.width_per_head  # cosines and sines
        if name in parts:
            places[name] = parts[name], offset
            offset += 4 * math.prod(parts[name].counts) * math.prod(parts[name].shape)
    return places, offset


def _within(name: str) -> str:
    """Returns a name without its layer, as ORDER has it."""
    return name.split(".", 2)[2].removesuffix(".weight") if name.startswith("layers.") else name


def _load(path: Path, model: Model, places: dict[str, tuple[Part, int]]) -> Params:
    mapped = memory_map(path, np.uint8)

    def read(name: str) -> np.ndarray:
        part, offset = places[_within(name)]
        size = 4 * math.prod(part.shape)
        offset += size * int(name.split(".")[1]) if part.counts else 0
        array = mapped[offset : offset + size].view("<f4").reshape(part.shape)
        if ".q_proj." in name:
            return halves(array, model.heads)
        return halves(array, model.key_value_heads) if ".k_proj." in name else array

    return huggingface.filled(llama_tables.table(model), model, tensors.DTYPES["float32"], read)


# The tokenizer


def is_tokenizer(path: Path) -> bool:
    """Returns whether a file begins as a tokenizer.bin does: with <unk> behind its score and its length."""
    with files.open_file(path) as file:
        return file.read(17)[8:] == struct.pack("<i", 5) + b"<unk>"


def read_tokenizer(path: Path, count: int | None = None) -> Tokenizer:
    """Reads a tokenizer.bin of so many tokens, or of as many as the file has. UserError where it is none."""
    files.refuse_pointer(path)
    data = files.read_bytes(path, LARGEST_TOKENIZER)
    place, pieces, scores = 4, [], []
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place) if place + 8 <= len(data) else (0.0, -1)
        end = place + 8 + length
        if not 0 <= length <= LONGEST_TOKEN or end > len(data):
            raise UserError(f"{shown(path)}: token {len(pieces):,}, at byte {place:,}, is cut off or damaged")
        pieces.append(data[place + 8 : end])
        scores.append(score if math.isfinite(score) else 0.0)
        place = end
    if count is not None and len(pieces) != count:
        raise UserError(f"{shown(path)}: {len(pieces):,} tokens, and the model has {count:,}")
    return _tokenizer(path, pieces, scores)


def _tokenizer(path: Path, pieces: list[bytes], scores: list[float]) -> Tokenizer:
    try:
        texts = [NAMES.get(i) or piece.decode().replace(" ", sentencepiece_bpe.SPACE) for i, piece in enumerate(pieces)]
    except UnicodeDecodeError:
        raise UserError(f"{shown(path)}: a token is not UTF-8") from None
    expected = [f"<0x{byte:02X}>" for byte in range(256)]
    if texts[FIRST_BYTE : FIRST_BYTE + 256] != expected:
        raise UserError(f"{shown(path)}: tokens 3 to 258 are not the bytes, <0x00> to <0xFF>, as llama2.c has them")
    special: dict[int, bool] = dict.fromkeys((UNKNOWN, BEGIN, END), True)
    content = sentencepiece_bpe.tokenizer_json(texts, scores, special, unknown=UNKNOWN, begin=BEGIN)
    # llama2.c trains with token 1 alone between texts, and ends a text where it is drawn.
    return HuggingFace(json.dumps(content, ensure_ascii=False), BEGIN, BEGIN)
