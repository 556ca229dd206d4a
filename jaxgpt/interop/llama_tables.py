"""Llama, Mistral, Mixtral and Qwen3 in Hugging Face's folders: config.json, and the tensors' names and layouts.

Every key of `transformers.LlamaConfig`, `MistralConfig`, `MixtralConfig` and `Qwen3Config` is in one of the tables
here. A key that changes the mathematics is honoured or refused. A key that is in no table is named in a note.

Their matrices are torch.nn.Linear's, (out, in), and ours (in, out). Queries, keys and values are one matrix here, and
so are the gate and the up projection of an MLP or of an expert. The rotary pairs are half a head apart in both.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import config_json, rope_config
from jaxgpt.interop.tensors import NUMBER, Part, Table
from jaxgpt.models import llama
from jaxgpt.options.config import Model

FIXED = config_json.FIXED | {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "compression_config": (None,),
}
# Dropout, the order of products, and losses that transformers adds while training.
WITHOUT_EFFECT = (
    config_json.WITHOUT_EFFECT
    + "attention_dropout pretraining_tp is_llama_config output_router_logits router_jitter_noise"
)
SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size"}
SIZES |= {"context": "max_position_embeddings", "vocabulary_size": "vocab_size", "feed_forward": "intermediate_size"}
FOLLOWING = {"kv_heads": "num_key_value_heads", "head_width": "head_dim"}  # null: they follow from the sizes
EXPERTS = {"experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
OTHERS = ("rms_norm_eps", "tie_word_embeddings", "layer_types", *rope_config.KEYS)
FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types


class Kind(NamedTuple):
    """One of transformers' models, with the defaults of its config.json."""

    name: str  # in the names of its classes
    sizes: dict[str, int | None]  # by their keys
    epsilon: float = 1e-6
    rope_base: float = 10_000.0
    window: int | None = None
    more: tuple[str, ...] = ()  # keys that the others haven't got

    @property
    def architecture(self) -> str:
        return f"{self.name}ForCausalLM"

    @property
    def known(self) -> set[str]:
        """Returns the keys that are honoured, refused, or without effect."""
        return self.sizes.keys() | FIXED.keys() | {*OTHERS, *self.more, *WITHOUT_EFFECT.split()}


def _sizes(**changed: int | None) -> dict[str, int | None]:
    llama_2 = dict.fromkeys(FOLLOWING.values()) | {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32}
    return {
        **llama_2,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        **changed,
    }


_MISTRAL = _sizes(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072)
_QWEN3 = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128}
KINDS = {  # by model_type
    "llama": Kind("Llama", _sizes()),
    "mistral": Kind("Mistral", _MISTRAL, window=4096, more=("sliding_window",)),
    "mixtral": Kind(
        "Mixtral",
        _MISTRAL | dict(zip(EXPERTS.values(), (8, 2), strict=True)),
        epsilon=1e-5,
        rope_base=1e6,
        more=("sliding_window", "num_experts", "router_aux_loss_coef"),
    ),
    "qwen3": Kind(
        "Qwen3",
        _sizes(**_QWEN3, max_position_embeddings=32768),
        window=4096,
        more=("sliding_window", "use_sliding_window", "max_window_layers"),
    ),
}


def model_of(path: Path, config: dict[str, Any], kind: Kind) -> Model:
    """Returns the model that a config.json describes. UserError, with the key, where this project can't compute it."""
    config_json.check_fixed(path, config, FIXED, kind.name)
    config_json.check_architectures(path, config, kind.name, kind.architecture)
    sizes = {option: _size(path, config, kind, key) for option, key in (SIZES | FOLLOWING).items()}
    model = Model(
        family="mixtral" if kind is KINDS["mixtral"] else "llama",
        **sizes,
        window=_window(path, config, kind, sizes["layers"]),
        tied=config_json.flag(path, config, "tie_word_embeddings", False),
        norm_epsilon=config_json.number(path, config, "rms_norm_eps", kind.epsilon),
        query_key_norm=kind is KINDS["qwen3"],
        **rope_config.options_of(path, config, kind.rope_base, sizes["context"]),
        **_mixture(path, config, kind),
    )
    _check_heads(path, model)
    return shortest(model)


def _size(path: Path, config: Mapping[str, Any], kind: Kind, key: str) -> int:
    """Returns a size, 0 for one that follows from the others."""
    default = kind.sizes[key]
    if key in FOLLOWING.values() and config.get(key, default) is None:
        return 0
    keys = (key, "num_experts") if key == EXPERTS["experts"] else (key,)
    return config_json.size(path, config, keys, default or 1)


def _check_heads(path: Path, model: Model) -> None:
    """Raises a UserError for heads that don't share the width, or the keys and values."""
    H, K = model.heads, model.key_value_heads
    if not model.head_width and model.width % H:
        raise UserError(
            f"{shown(path)}: hidden_size is {model.width}, {H} heads (num_attention_heads) don't divide it, and there "
            "is no head_dim"
        )
    if H % K:
        raise UserError(f"{shown(path)}: num_key_value_heads is {K}, and doesn't divide {H} (num_attention_heads)")
    if model.width_per_head % 2:
        raise UserError(f"{shown(path)}: a head is {model.width_per_head} wide (head_dim), and that must be even")


def _mixture(path: Path, config: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Returns the options of a mixture of experts; none for other models."""
    if kind is not KINDS["mixtral"]:
        return {}
    options = {option: _size(path, config, kind, key) for option, key in EXPERTS.items()}
    E, chosen = options.values()
    if chosen > E:
        raise UserError(f"{shown(path)}: num_experts_per_tok is {chosen}, of {E} experts (num_local_experts)")
    balance = config_json.number(path, config, "router_aux_loss_coef", 0.001, zero=True)
    return options | {"router_balance": balance}


def _window(path: Path, config: Mapping[str, Any], kind: Kind, layers: int) -> int:
    """Returns the width of the sliding window, 0 for none. UserError where some layers have one and others none."""
    asked = config.get("sliding_window", kind.window)
    used = "use_sliding_window" not in kind.more or config_json.flag(path, config, "use_sliding_window", False)
    window = 0
    if "sliding_window" in kind.more and used and asked is not None:
        window = config_json.size(path, config, ("sliding_window",), kind.window or 1)
    types = config.get("layer_types")
    if types is not None:
        kinds = {FULL, SLIDING} if window else {FULL}
        if not (isinstance(types, list) and all(isinstance(one, str) and one in kinds for one in types)):
            raise UserError(f"{shown(path)}: layer_types is {shown(types)}; this project's {kind.name} has {FULL}")
        if len(types) != layers:
            raise UserError(f"{shown(path)}: layer_types has {len(types)} layers, and num_hidden_layers is {layers}")
        sliding = types.count(SLIDING)
    else:
        first = _first_with_window(path, config) if "max_window_layers" in kind.more and window else 0
        sliding = max(layers - first, 0)
    if window and 0 < sliding < layers:
        raise UserError(
            f"{shown(path)}: {sliding} of {layers} layers have a sliding window (layer_types, max_window_layers); this "
            f"project's {kind.name} has one in all layers or in none"
        )
    return window if sliding else 0


def _first_with_window(path: Path, config: Mapping[str, Any]) -> int:
    """Returns the first layer with a window, which may be 0."""
    if config.get("max_window_layers") == 0:
        return 0
    return config_json.size(path, config, ("max_window_layers",), 28)


def shortest(model: Model) -> Model:
    """Returns the same model with 0 for the sizes that follow from others."""
    follows = {
        "kv_heads": model.kv_heads == model.heads,
        "head_width": model.head_width * model.heads == model.width,
        "feed_forward": model.feed_forward == llama.feed_forward(dataclasses.replace(model, feed_forward=0)),
    }
    return dataclasses.replace(model, **{option: 0 for option, there in follows.items() if there})


# Writing


def kind_of(model: Model) -> Kind:
    """Returns which of transformers' models computes this one.

    UserError where none does: they have no soft cap, norms of queries and keys only in Qwen3, which has no experts.
    """
    if model.logit_soft_cap:
        raise _not_written("--model.logit-soft-cap")
    if model.experts and model.query_key_norm:
        raise _not_written("--model.query-key-norm together with --model.experts")
    if model.experts and model.router_softmax != "after":
        raise _not_written(f"--model.router-softmax {model.router_softmax}")
    if model.experts:
        return KINDS["mixtral"]
    if model.query_key_norm:
        return KINDS["qwen3"]
    plain = not model.window and model.width % model.heads == 0  # what transformers' Llama can be
    return KINDS["llama" if plain else "mistral"]


def _not_written(option: str) -> UserError:
    return UserError(f"a model with {option} can't be written for transformers, which has no such model. Take --to run")


def content_of(model: Model) -> dict[str, object]:
    """Returns the keys of config.json that are a family's own. UserError where no architecture is this model."""
    kind = kind_of(model)
    values = dataclasses.replace(
        model,
        kv_heads=model.key_value_heads,
        head_width=model.width_per_head,
        feed_forward=llama.feed_forward(model),
    )
    content: dict[str, object] = {
        "architectures": [kind.architecture],
        "model_type": kind.name.lower(),
        **{key: getattr(values, option) for option, key in (SIZES | FOLLOWING).items()},
        "hidden_act": FIXED["hidden_act"][0],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied,
        **rope_config.content_of(model),
    }
    if kind is KINDS["llama"]:
        content["mlp_bias"] = False
    if "sliding_window" in kind.more:
        content["sliding_window"] = model.window or None
    if "use_sliding_window" in kind.more:
        content |= {"use_sliding_window": model.window > 0, "max_window_layers": 0 if model.window else model.layers}
    if kind is KINDS["mixtral"]:
        content |= {key: getattr(model, option) for option, key in EXPERTS.items()}
        content["router_aux_loss_coef"] = model.router_balance
    return content


# Tensors

TOKEN, HEAD = "embed_tokens.weight", "lm_head.weight"
LAYER = f"layers.{NUMBER}."


def table(model: Model) -> Table:
    """Returns the table of a Hugging Face folder."""
    L, C, V, D = model.layers, model.width, model.vocabulary_size, model.width_per_head
    queries, keys = model.heads * D, model.key_value_heads * D

    def norm(ours: str, theirs: str, width: int) -> Part:
        return Part(f"blocks.{ours}.scale", f"{LAYER}{theirs}.weight", (L,), (width,))

    def dense(ours: str, theirs: str, inputs: int, outputs: int, first: int = 0) -> Part:
        """A matrix, which takes the columns of ours from `first` on."""
        place = (slice(None), slice(first, first + outputs))
        return Part(f"blocks.{ours}.weight", f"{LAYER}{theirs}.weight", (L,), (outputs, inputs), place, turned=True)

    attention = [
        norm("attention_norm", "input_layernorm", C),
        dense("qkv", "self_attn.q_proj", C, queries),
        dense("qkv", "self_attn.k_proj", C, keys, queries),
        dense("qkv", "self_attn.v_proj", C, keys, queries + keys),
        dense("attention_out", "self_attn.o_proj", queries, C),
        norm("mlp_norm", "post_attention_layernorm", C),
    ]
    if model.query_key_norm:
        attention += [norm("query_norm", "self_attn.q_norm", D), norm("key_norm", "self_attn.k_norm", D)]
    if model.experts:
        mlp = [dense("experts.router", "block_sparse_moe.gate", C, model.experts), *_experts(model)]
    else:
        F = llama.feed_forward(model)
        mlp = [dense("mlp_in", "mlp.gate_proj", C, F), dense("mlp_in", "mlp.up_proj", C, F, F)]
        mlp += [dense("mlp_out", "mlp.down_proj", F, C)]
    ends = [Part("embedding.token", TOKEN, (), (V, C), (slice(V),)), Part("final_norm.scale", "norm.weight", (), (C,))]
    if not model.tied:
        ends += [Part("head.weight", HEAD, (), (V, C), (slice(V),))]
    return Table(
        kind=f"a {kind_of(model).name}",
        prefix="model.",
        token=TOKEN,
        head=HEAD,
        passed_over=r"layers\.\d{1,9}\.self_attn\.rotary_emb\.inv_freq",
        parts=(*ends, *attention, *mlp),
    )


def _experts(model: Model) -> list[Part]:
    """Returns the matrices of all experts: w1 is the gate, w3 the up projection, w2 the way back."""
    C, F, counts = model.width, llama.feed_forward(model), (model.layers, model.experts)

    def matrix(ours: str, theirs: str, inputs: int, outputs: int, first: int = 0) -> Part:
        name = f"{LAYER}block_sparse_moe.experts.{NUMBER}.{theirs}.weight"
        place = (slice(None), slice(first, first + outputs))
        return Part(f"blocks.experts.{ours}", name, counts, (outputs, inputs), place, turned=True)

    return [matrix("w_in", "w1", C, F), matrix("w_in", "w3", C, F, F), matrix("w_out", "w2", F, C)]
