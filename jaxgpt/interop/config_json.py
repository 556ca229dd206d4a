"""Reads the values of a config.json, whose every key of consequence is in a table of its family's."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.checks import LARGEST

# Keys of every model with their values here; any other value would make another model. A missing key has transformers'
# default, which is the first value.
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "auto_map": (None, {}),  # code that the model's makers ship along computes something else
}
# Keys of every model that change no logit at inference: the file's origin, other tasks, the choice of outputs, and
# defaults of generation.
WITHOUT_EFFECT = """
_attn_implementation_autoset _name_or_path _num_labels add_bos_token architectures attn_implementation bos_token_id
chunk_size_feed_forward dtype eos_token_id finetuning_task gradient_checkpointing id2label initializer_range is_decoder
label2id model_type num_labels output_attentions output_hidden_states output_past pad_token_id prefix problem_type
return_dict return_dict_in_generate sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
transformers_version use_bfloat16 use_cache bad_words_ids begin_suppress_tokens cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
repetition_penalty suppress_tokens temperature tf_legacy_loss tie_encoder_decoder top_k top_p typical_p
"""


def size(path: Path | str, config: Mapping[str, Any], keys: tuple[str, ...], default: int) -> int:
    """Returns the size that is stored by any of its keys. UserError where it is invalid, or two keys disagree."""
    given = {name: config[name] for name in keys if name in config}
    for name, value in given.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise UserError(f"{shown(path)}: {name} is {quoted(value)}, and must be a whole number from 1 to {LARGEST}")
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name} is {value}" for name, value in given.items())
        raise UserError(f"{shown(path)}: {both}, which are names of one size: take one of them out")
    return next(iter(given.values()), default)


def number(path: Path | str, config: Mapping[str, Any], key: str, default: float, *, zero: bool = False) -> float:
    """Returns a number above 0, with `zero` 0 too. UserError where it is none."""
    value = config.get(key, default)
    if type(value) in (int, float) and (0 < value <= 1e30 or (zero and value == 0)):
        return float(value)
    wanted = "0 or a positive number" if zero else "a positive number"
    raise UserError(f"{shown(path)}: {key} is {quoted(value)}, and must be {wanted}")


def flag(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Returns true or false. UserError where it is neither."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise UserError(f"{shown(path)}: {key} is {quoted(value)}, and must be true or false")
    return value


def check_fixed(path: Path, config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], model: str) -> None:
    """Raises a UserError for a key whose value would make another model than this project's `model`."""
    for key, allowed in fixed.items():
        value = config.get(key, allowed[0])
        if not any(value == other and _kind(value) == _kind(other) for other in allowed):
            raise UserError(f"{shown(path)}: {key} is {shown(value)}; this project's {model} has {shown(allowed[0])}")


def check_architectures(path: Path, config: Mapping[str, Any], beginning: str, architecture: str) -> None:
    """Raises a UserError where the file names another architecture than those that begin so."""
    names = config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) and name.startswith(beginning) for name in names)):
        value = names[0] if isinstance(names, list) and len(names) == 1 else names
        raise UserError(f"{shown(path)}: architectures is {quoted(value)}; this version reads {architecture}")


def unknown(config: Mapping[str, Any], known: Iterable[str], model: str) -> tuple[str, ...]:
    """Returns a note that names the keys in no table."""
    others = sorted(config.keys() - set(known))
    if not others:
        return ()
    more = f" and {len(others) - 8:,} more" if len(others) > 8 else ""
    names = ", ".join(shown(key, 40) for key in others[:8])
    return (f"config.json has keys that transformers' {model} doesn't know, and that are passed over: {names}{more}",)


def _kind(value: Any) -> type:
    """Returns the type of a JSON value. All numbers have the type float, and true is not a number."""
    return float if type(value) is int else type(value)
