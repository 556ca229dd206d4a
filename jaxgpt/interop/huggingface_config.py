"""The config.json of a Hugging Face GPT-2: written, read, and refused where it describes another model.

Every key of `transformers.GPT2Config` is in one of the tables here. A key that changes the mathematics is honoured or
refused. A key that is in no table is named in a note.
"""

from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.config import Model
from jaxgpt.options.settings import LARGEST

# Sizes by GPT-2's own keys, each with its other keys and transformers' default.
SIZES: dict[str, tuple[tuple[str, ...], int]] = {
    "n_layer": (("num_hidden_layers",), 12),
    "n_head": (("num_attention_heads",), 12),
    "n_embd": (("hidden_size",), 768),
    "n_positions": (("max_position_embeddings", "n_ctx"), 1024),
    "vocab_size": ((), 50257),
}
# Keys with the values that describe our GPT-2; any other value would make another model. A missing key has
# transformers' default, which is the first value. All names of GELU stand for its approximation with tanh.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "auto_map": (None, {}),  # code that the model's makers ship along computes something else
}
# Keys that change no logit of GPT2LMHeadModel at inference: initialisation, dropout, heads of other models, the choice
# of outputs, the precision of attention's sums (ours are float32), the file's origin, and defaults of generation.
WITHOUT_EFFECT = """
_attn_implementation_autoset _name_or_path _num_labels add_bos_token architectures attn_implementation attn_pdrop
bos_token_id chunk_size_feed_forward dtype embd_pdrop eos_token_id finetuning_task gradient_checkpointing id2label
initializer_range is_decoder label2id model_type n_inner num_labels output_attentions output_hidden_states
output_past pad_token_id prefix problem_type reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate
sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
task_specific_params tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache
bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
output_scores remove_invalid_values repetition_penalty suppress_tokens temperature tf_legacy_loss
tie_encoder_decoder top_k top_p typical_p
"""
_ALIASES = {alias for aliases, _ in SIZES.values() for alias in aliases}
KNOWN = _ALIASES | SIZES.keys() | FIXED.keys() | set(WITHOUT_EFFECT.split())


def model_of(path: Path, config: dict[str, Any]) -> Model:
    """Returns the model that a config.json describes. UserError, with the key, where it isn't this project's GPT-2."""
    kind = config.get("model_type", "gpt2")
    if kind != "gpt2":
        raise UserError(f"{shown(path)}: model_type is {quoted(kind)}; this version reads GPT-2 models")
    sizes = {key: _size(path, config, key) for key in SIZES}
    for key, allowed in FIXED.items():
        value = config.get(key, allowed[0])
        if not any(value == other and _kind(value) == _kind(other) for other in allowed):
            raise UserError(f"{shown(path)}: {key} is {shown(value)}; this project's GPT-2 has {shown(allowed[0])}")
    inner = config.get("n_inner")
    if inner is not None and (type(inner) is not int or inner != 4 * sizes["n_embd"]):
        raise UserError(f"{shown(path)}: n_inner is {shown(inner)}; this project's GPT-2 has four times n_embd")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(
            f"{shown(path)}: n_embd is {sizes['n_embd']}, and {sizes['n_head']} heads (n_head) don't divide it"
        )
    names = config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) and name.startswith("GPT2") for name in names)):
        value = names[0] if isinstance(names, list) and len(names) == 1 else names
        raise UserError(f"{shown(path)}: architectures is {quoted(value)}; this version reads GPT2LMHeadModel")
    return Model(
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        width=sizes["n_embd"],
        context=sizes["n_positions"],
        vocabulary_size=sizes["vocab_size"],
    )


def content_of(model: Model, dtype: str, end_of_text: int | None) -> dict[str, object]:
    """Returns the content of config.json. Dropout is off, as it was in training."""
    sizes = {"vocab_size": model.vocabulary_size, "n_positions": model.context, "n_ctx": model.context}
    sizes |= {"n_embd": model.width, "n_layer": model.layers, "n_head": model.heads, "n_inner": None}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **sizes,
        **{key: FIXED[key][0] for key in ("activation_function", "layer_norm_epsilon")},
        "initializer_range": 0.02,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **{key: FIXED[key][0] for key in ("scale_attn_weights", "tie_word_embeddings")},
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text),
        "torch_dtype": dtype,
    }


def notes(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns notes that name the keys in no table."""
    unknown = sorted(config.keys() - KNOWN)
    if not unknown:
        return ()
    more = f" and {len(unknown) - 8:,} more" if len(unknown) > 8 else ""
    names = ", ".join(shown(key, 40) for key in unknown[:8])
    return (f"config.json has keys that transformers' GPT-2 doesn't know, and that are passed over: {names}{more}",)


def end_of_text(config: dict[str, Any]) -> int | None:
    """Returns the id of the end of text by config.json, the first where it has several; None where it has none."""
    value = config.get("eos_token_id")
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int else None


def _size(path: Path, config: dict[str, Any], key: str) -> int:
    """Returns the size that is stored by any of its keys. UserError where it is invalid, or two keys disagree."""
    aliases, default = SIZES[key]
    given = {name: config[name] for name in (key, *aliases) if name in config}
    for name, value in given.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise UserError(f"{shown(path)}: {name} is {quoted(value)}, and must be a whole number from 1 to {LARGEST}")
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name} is {value}" for name, value in given.items())
        raise UserError(f"{shown(path)}: {both}, which are names of one size: take one of them out")
    return next(iter(given.values()), default)


def _kind(value: Any) -> type:
    """Returns the type of a JSON value. All numbers have the type float, and true is not a number."""
    return float if type(value) is int else type(value)
