"""Reads GGUF files, llama.cpp's format: Llama, Mistral, SmolLM2, Mixtral and Qwen3, quantised or not.

Tensors are mapped into memory and read one at a time. Quantised ones are dequantised to float32 by the package `gguf`:
a model of 8 billion parameters takes 32 GB then, whatever it took in the file. float16 and bfloat16 stay what they are.

Matrices are (out, in), as at Hugging Face, and llama.cpp's architecture "llama" has neighbours as rotary pairs in the
rows of queries and keys, where Hugging Face and this project have pairs half a head apart.
"""

from pathlib import Path

import numpy as np

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import gguf_config, gguf_header, gguf_tokenizer, huggingface, llama_tables, tensors
from jaxgpt.interop.gguf_config import FACTORS, Keys
from jaxgpt.interop.gguf_header import Header, Tensor
from jaxgpt.interop.llmc import memory_map
from jaxgpt.interop.tensors import Table, WeightSource
from jaxgpt.models.blocks import Params
from jaxgpt.options.config import Model

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKEN, HEAD = "token_embd.weight", "output.weight"
# Names within a layer, by those at Hugging Face.
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
EXPERTS = {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down"}
ENDS = {llama_tables.TOKEN: TOKEN, llama_tables.HEAD: HEAD, "norm.weight": "output_norm.weight"}
UNUSED = {FACTORS}


def open_model(path: Path) -> WeightSource:
    """Opens a file. UserError where it is damaged, its model isn't one of this project's, or `gguf` is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{shown(path)}: GGUF files need the package gguf: make env EXTRAS=gguf") from None
    header = gguf_header.read(path)
    keys = Keys(path, header)
    if TOKEN not in header.tensors:
        raise UserError(f"{shown(path)}: the tensor {TOKEN} is missing")
    factors = _read(path, header.tensors[FACTORS]).ravel() if FACTORS in header.tensors else None
    model = gguf_config.model_of(keys, header.tensors[TOKEN].shape[0], HEAD not in header.tensors, factors)
    table = llama_tables.table(model)
    names = _names(path, header, table, model)
    dtype = _dtype(path, header)
    tokenizer, notes = _tokenizer(path, header, model)
    kinds = sorted({tensor.type.name for tensor in header.tensors.values() if len(tensor.shape) > 1})
    unknown = keys.unknown()
    if unknown:
        notes = (*notes, f"keys that this version doesn't know are passed over: {', '.join(map(shown, unknown[:8]))}")
    if not set(kinds) <= STORED.keys():
        notes = (*notes, f"{', '.join(kind for kind in kinds if kind not in STORED)} is dequantised to float32")
    return WeightSource(
        where=str(path),
        kind=f"a GGUF file of {', '.join(kinds)}",
        model=model,
        dtype=dtype,
        tokenizer=tokenizer,
        load=lambda: _load(path, header, names, table, model, keys.architecture, tensors.DTYPES[dtype]),
        notes=notes,
        unreadable_tokenizer=tokenizer is None and bool(notes),
        template=gguf_tokenizer.template(header.values) if tokenizer else None,
    )


def _names(path: Path, header: Header, table: Table, model: Model) -> dict[str, tuple[str, int | None]]:
    """Returns the tensor, and the expert's number within it, by the names at Hugging Face.

    UserError where the tensors are not exactly the model's, or one has another shape.
    """
    merged = "blk.0.ffn_gate_exps.weight" in header.tensors
    layers, E = model.layers, model.experts
    expected = 3 - model.tied + layers * (9 + 2 * model.query_key_norm)
    if E:
        expected += layers * (1 + 3 * (1 if merged else E) - 3)
    found = header.tensors.keys() - UNUSED
    names: dict[str, tuple[str, int | None]] = {}
    if len(found) >= expected:  # else the file might claim layers without end
        for part in table.parts:
            for name, numbers in part.names():
                names[name] = theirs, expert = _name(name, numbers, merged)
                if theirs not in header.tensors:
                    raise UserError(f"{shown(path)}: the tensor {theirs} is missing")
                shape, wanted = header.tensors[theirs].shape, part.shape if expert is None else (E, *part.shape)
                if shape != wanted:
                    raise UserError(
                        f"{shown(path)}: the tensor {theirs} is {list(shape)}, and {list(wanted)} by its keys"
                    )
    extra = sorted(found - {theirs for theirs, _ in names.values()})
    if len(found) != expected or extra:
        which = f", of which {quoted(extra[0][:80])} is unknown" if names and extra else ""
        wanted = f"a {_called(model)} of {layers:,} layers has {expected:,}"
        raise UserError(f"{shown(path)}: {len(found):,} tensors{which}, and {wanted}")
    return names


def _called(model: Model) -> str:
    return "mixture of experts" if model.experts else "Qwen3" if model.query_key_norm else "Llama"


def _name(name: str, numbers: tuple[int, ...], merged: bool) -> tuple[str, int | None]:
    """Returns the name of a tensor in a GGUF file, and the number of the expert within it, by that at Hugging Face."""
    if name in ENDS:
        return ENDS[name], None
    within = name.split(".", 2)[2].removesuffix(".weight")
    if within in LAYER:
        return f"blk.{numbers[0]}.{LAYER[within]}.weight", None
    layer, expert = numbers
    kind = EXPERTS[within.rsplit(".", 1)[1]]
    return (f"blk.{layer}.{kind}_exps.weight", expert) if merged else (f"blk.{layer}.{kind}.{expert}.weight", None)


def _dtype(path: Path, header: Header) -> str:
    """Returns the type that holds every number of the file exactly, the narrowest."""
    kinds = {tensor.type.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if len(kinds) > 1 or not kinds <= STORED.keys():
        return "float32"
    name = STORED[kinds.pop()]
    for tensor in header.tensors.values():  # norms are float32 in all files
        if len(tensor.shape) == 1 and STORED.get(tensor.type.name) != name:
            values = _read(path, tensor)
            with np.errstate(over="ignore"):
                if not np.array_equal(values.astype(tensors.DTYPES[name]).astype(np.float32), values):
                    return "float32"
    return name


def _tokenizer(path: Path, header: Header, model: Model) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """Returns the tokenizer, or None and a note that says why there is none."""
    try:
        tokenizer = gguf_tokenizer.read(header.values)
    except UserError as error:
        return None, (f"its tokenizer can't be read: {error}",)
    if tokenizer and tokenizer.vocabulary_size > model.vocabulary_size:
        return None, (f"its tokenizer has {tokenizer.vocabulary_size} tokens, more than the model",)
    return tokenizer, ()


# Tensors


def _load(
    path: Path,
    header: Header,
    names: dict[str, tuple[str, int | None]],
    table: Table,
    model: Model,
    architecture: str,
    dtype: np.dtype,
) -> Params:
    def read(name: str) -> np.ndarray:
        theirs, expert = names[name]
        array = _read(path, header.tensors[theirs], expert)
        if architecture == gguf_config.PERMUTED and ".attn_q." in theirs:
            return halves(array, model.heads)
        if architecture == gguf_config.PERMUTED and ".attn_k." in theirs:
            return halves(array, model.key_value_heads)
        return array

    return huggingface.filled(table, model, dtype, read)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of queries or keys, whose rotary pairs are neighbours, with the pairs half a head apart."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _read(path: Path, tensor: Tensor, expert: int | None = None) -> np.ndarray:
    """Returns a tensor, or one expert's part of it, in the type of STORED that it has, or dequantised in float32."""
    count = tensor.shape[0] if expert is not None else 1
    shape = tensor.shape[1:] if expert is not None else tensor.shape
    size = tensor.bytes // count
    start = tensor.place + size * (expert or 0)
    mapped = memory_map(path, np.uint8)[start : start + size]
    if tensor.type.name in STORED:
        dtype = tensors.DTYPES[STORED[tensor.type.name]]
        return mapped.view(dtype.newbyteorder("<") if dtype.kind == "f" else dtype).reshape(shape)
    import gguf

    blocks = mapped.reshape(*shape[:-1], -1)
    with np.errstate(all="ignore"):  # a damaged file has scales that are not finite
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(tensor.code)).reshape(shape)
