"""The config.json of a Hugging Face GPT-2: written, read, and refused where it describes another model.

Every key of `transformers.GPT2Config` is in one of the tables here. A key that changes the mathematics is honoured or
refused. A key that is in no table is named in a note.
"""

from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import config_json
from jaxgpt.options.config import Model

KIND, NAME = "gpt2", "GPT-2"
# Sizes by GPT-2's own keys, each with its other keys and transformers' default.
SIZES: dict[str, tuple[tuple[str, ...], int]] = {
    "n_layer": (("num_hidden_layers",), 12),
    "n_head": (("num_attention_heads",), 12),
    "n_embd": (("hidden_size",), 768),
    "n_positions": (("max_position_embeddings", "n_ctx"), 1024),
    "vocab_size": ((), 50257),
}
# All names of GELU stand for its approximation with tanh.
FIXED = config_json.FIXED | {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
# Dropout, heads of other models, and the precision of attention's sums (ours are float32).
WITHOUT_EFFECT = (
    config_json.WITHOUT_EFFECT
    + """
attn_pdrop embd_pdrop n_inner reorder_and_upcast_attn resid_pdrop summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj
"""
)
_ALIASES = {alias for aliases, _ in SIZES.values() for alias in aliases}
KNOWN = _ALIASES | SIZES.keys() | FIXED.keys() | set(WITHOUT_EFFECT.split())


def model_of(path: Path, config: dict[str, Any]) -> Model:
    """Returns the model that a config.json describes. UserError, with the key, where it isn't this project's GPT-2."""
    sizes = {key: config_json.size(path, config, (key, *aliases), size) for key, (aliases, size) in SIZES.items()}
    config_json.check_fixed(path, config, FIXED, NAME)
    inner = config.get("n_inner")
    if inner is not None and (type(inner) is not int or inner != 4 * sizes["n_embd"]):
        raise UserError(f"{shown(path)}: n_inner is {shown(inner)}; this project's GPT-2 has four times n_embd")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(
            f"{shown(path)}: n_embd is {sizes['n_embd']}, and {sizes['n_head']} heads (n_head) don't divide it"
        )
    config_json.check_architectures(path, config, "GPT2", "GPT2LMHeadModel")
    return Model(
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        width=sizes["n_embd"],
        context=sizes["n_positions"],
        vocabulary_size=sizes["vocab_size"],
    )


def content_of(model: Model) -> dict[str, object]:
    """Returns the keys of config.json that are GPT-2's own. Dropout is off, as it was in training."""
    sizes = {"vocab_size": model.vocabulary_size, "n_positions": model.context, "n_ctx": model.context}
    sizes |= {"n_embd": model.width, "n_layer": model.layers, "n_head": model.heads, "n_inner": None}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": KIND,
        **sizes,
        **{key: FIXED[key][0] for key in ("activation_function", "layer_norm_epsilon")},
        "initializer_range": 0.02,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **{key: FIXED[key][0] for key in ("scale_attn_weights", "tie_word_embeddings")},
    }
