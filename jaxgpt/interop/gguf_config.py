"""The model that a GGUF file's keys describe; refused where this project can't compute it.

llama.cpp's architecture "llama" is Llama, Mistral, SmolLM2 and, with experts, Mixtral; its keys begin with the
architecture's name. A key that changes the mathematics is honoured or refused by name; unknown ones are named in a
note. Llama 3.1's scaling of rotary frequencies stands in no key: a tensor has the divisor of each frequency.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop.gguf_header import Header
from jaxgpt.interop.llama_tables import shortest
from jaxgpt.layers.rotary import Frequencies
from jaxgpt.models import family
from jaxgpt.options.checks import LARGEST
from jaxgpt.options.config import Model

ARCHITECTURE = "general.architecture"
KNOWN = ("llama", "qwen3")
SIZES = {
    "layers": "block_count", "width": "embedding_length", "feed_forward": "feed_forward_length",
    "context": "context_length", "heads": "attention.head_count",
}  # fmt: skip
OPTIONAL = {"kv_heads": "attention.head_count_kv", "head_width": "attention.key_length"}
EXPERTS = {"experts": "expert_count", "experts_per_token": "expert_used_count"}
# Keys with the values that describe our models; any other value would make another. "none" stands for a missing key.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "expert_gating_func": (0, 1),  # not said, softmax
    "expert_weights_scale": (0.0, 1.0),
    "expert_weights_norm": (True,),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
    "nextn_predict_layers": (0,),
}
OTHERS = {
    *("vocab_size", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "final_logit_softcapping", "tensor_data_layout"),
    *("expert_feed_forward_length", "attention.layer_norm_epsilon", "pooling_type", "attention.layer_indices"),
}
SCALINGS = ("none", "linear")
PERMUTED = "llama"  # the architecture whose queries and keys have neighbours as rotary pairs
FACTORS = "rope_freqs.weight"
ORIGINAL_CONTEXT = 8192  # of all of Llama 3
LARGEST_FLOAT = 1e30
TOLERANCE = 1e-4  # of the divisors, which are computed in float32


class Keys:
    """The keys of the file's architecture. UserError, with the key, for a value that can't be."""

    def __init__(self, path: Path, header: Header):
        self.path, self.header = path, header
        name = header.values.get(ARCHITECTURE)
        self.architecture = name.decode("utf-8", "replace") if isinstance(name, bytes) else ""
        if self.architecture not in KNOWN:
            raise UserError(
                f"{shown(path)}: {ARCHITECTURE} is {quoted(self.architecture)}; this version reads {', '.join(KNOWN)}"
            )
        if self._plain("split.count", 0) not in (0, 1):
            raise UserError(f"{shown(path)}: a part of a split model. Merge the parts: llama-gguf-split --merge")

    def error(self, key: str, problem: str) -> UserError:
        return UserError(f"{shown(self.path)}: {self.architecture}.{key} {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a number, also of a list that has one and the same for each layer."""
        return self._plain(f"{self.architecture}.{key}", default)

    def _plain(self, key: str, default: Any) -> Any:
        value = self.header.values.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, list | np.ndarray):
            raise UserError(f"{shown(self.path)}: {shown(key)} differs from layer to layer; here all layers are alike")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.error(key, f"is {shown(value)}, and must be a whole number from 1 to {LARGEST}")
        return value

    def number(self, key: str, default: float) -> float:
        """Returns a finite number, at least 0, as people write it: it has been rounded to float32.

        UserError for 0, too, where that isn't the default.
        """
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < LARGEST_FLOAT or (value == 0 and default != 0):
            raise self.error(key, f"is {shown(value)}, and must be a number above 0")
        return float(np.format_float_positional(np.float32(value))) if type(value) is float else float(value)

    def unknown(self) -> list[str]:
        """Returns the keys that are in no table."""
        known = {*SIZES.values(), *OPTIONAL.values(), *EXPERTS.values(), *FIXED, *OTHERS}
        prefix = f"{self.architecture}."
        named = [key.removeprefix(prefix) for key in self.header.values if key.startswith(prefix)]
        return sorted(key for key in named if key not in known)


def model_of(keys: Keys, vocabulary_size: int, tied: bool, factors: np.ndarray | None) -> Model:
    """Returns the model. UserError where the keys contradict each other, or describe another kind of model.

    `factors` are the divisors of the rotary frequencies, where the file has such a tensor.
    """
    for key, allowed in FIXED.items():
        value = keys.get(key, allowed[0])
        if not any(value == other and (type(value) is bool) == (type(other) is bool) for other in allowed):
            raise keys.error(key, f"is {shown(value)}; this project's models have {shown(allowed[0])}")
    sizes = {option: keys.size(key) for option, key in SIZES.items()}
    sizes |= {option: keys.size(key) for option, key in OPTIONAL.items() if keys.get(key) is not None}
    if keys.get("vocab_size") not in (None, vocabulary_size):
        raise keys.error("vocab_size", f"is {shown(keys.get('vocab_size'))}, and there are {vocabulary_size:,} rows")
    experts = {option: keys.size(key) for option, key in EXPERTS.items()} if keys.get("expert_count", 0) else {}
    model = Model(
        family="mixtral" if experts else "llama",
        **sizes,  # type: ignore[arg-type]  # of these keys are all whole numbers
        **experts,
        vocabulary_size=vocabulary_size,
        tied=tied,
        window=keys.size("attention.sliding_window") if keys.get("attention.sliding_window", 0) else 0,
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        query_key_norm=keys.architecture == "qwen3",
        logit_soft_cap=keys.number("final_logit_softcapping", 0.0),
        rope_base=keys.number("rope.freq_base", 10_000.0),
    )
    _check_heads(keys, model)
    model = shortest(_with_scaling(keys, model, factors))
    family(model).check(model)
    return model


def _check_heads(keys: Keys, model: Model) -> None:
    H, K, D = model.heads, model.key_value_heads, model.width_per_head
    if not model.head_width and model.width % H:
        raise keys.error("embedding_length", f"is {model.width}, and {H} heads (attention.head_count) don't divide it")
    if H % K:
        raise keys.error("attention.head_count_kv", f"is {K}, and doesn't divide {H} (attention.head_count)")
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.get(key, D) != D:
            raise keys.error(key, f"is {shown(keys.get(key))}, and a head is {D} wide: this project has no such heads")
    if D % 2:
        raise keys.error("attention.key_length", f"is {D}, and must be even")
    if model.experts and model.experts_per_token > model.experts:
        raise keys.error("expert_used_count", f"is {model.experts_per_token}, of {model.experts} experts")


def _with_scaling(keys: Keys, model: Model, factors: np.ndarray | None) -> Model:
    """Returns the model with the scaling of its rotary frequencies. UserError for one that this project hasn't got."""
    named = keys.get("rope.scaling.type", b"none")
    kind = named.decode("utf-8", "replace") if isinstance(named, bytes) else str(named)
    if kind not in SCALINGS:
        raise keys.error("rope.scaling.type", f"is {quoted(kind)}; this version has {', '.join(SCALINGS)} and llama3's")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    linear = factor if kind == "linear" or keys.get("rope.scale_linear") else 1.0
    if factors is None:
        return _replace(model, "linear", linear) if linear != 1.0 else model
    D = model.width_per_head
    if factors.shape != (D // 2,) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise UserError(
            f"{shown(keys.path)}: {FACTORS} is no list of {D // 2} positive numbers, one for each frequency"
        )
    if linear == 1.0 and np.allclose(factors, factors[0], rtol=TOLERANCE):
        return model if np.isclose(factors[0], 1.0, rtol=TOLERANCE) else _replace(model, "linear", float(factors[0]))
    original = keys.size("rope.scaling.original_context_length", ORIGINAL_CONTEXT)
    plain = Frequencies(base=model.rope_base).values(D)
    for largest in {factor, float(factors.max())}:
        scaled = Frequencies(base=model.rope_base, factor=largest, original_context=original).values(D)
        if linear == 1.0 and np.allclose(plain / scaled, factors, rtol=TOLERANCE):
            return _replace(model, "llama3", round(largest, 4), original)
    raise UserError(f"{shown(keys.path)}: {FACTORS} is a scaling of rotary frequencies that this version doesn't know")


def _replace(model: Model, kind: str, factor: float, original: int = ORIGINAL_CONTEXT) -> Model:
    return dataclasses.replace(model, rope_scaling=kind, rope_factor=factor, rope_original_context=original)
