"""Rotary positions in a config.json: `rope_parameters` as transformers 5 writes them, or `rope_theta`, `rope_scaling`.

    default    base^(-2i/D)
    linear     all frequencies divided by the factor
    llama3     Llama 3.1's: only the slow ones

Scalings of another kind (dynamic, yarn, longrope, ...) are refused by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import config_json
from jaxgpt.options.config import Model

NEW, OLD = "rope_parameters", "rope_scaling"
FACTORS = {"rope_low_frequency": "low_freq_factor", "rope_high_frequency": "high_freq_factor"}
ORIGINAL = "original_max_position_embeddings"
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
WITHIN = {"rope_type", "type", "rope_theta", "factor", ORIGINAL, *FACTORS.values()}  # keys within the dictionary
# Turning a part of a head only, in another order, or with a context that transformers takes from elsewhere.
FIXED = {"partial_rotary_factor": (None, 1.0), "rope_interleaved": (False, None), ORIGINAL: (None,)}
KEYS = (NEW, OLD, "rope_theta", *FIXED)


def options_of(path: Path, config: Mapping[str, Any], base: float, context: int) -> dict[str, Any]:
    """Returns the options of the rotary positions. UserError where this project hasn't got them.

    `base` and `context` are those of a file that doesn't say.
    """
    config_json.check_fixed(path, config, FIXED, "rotary positions")
    name, given = _given(path, config)
    base = config_json.number(path, config, "rope_theta", base)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(f"{shown(path)}: {name} is of type {quoted(kind)}; this version has {', '.join(SCALINGS)}")
    rest = {key: value for key, value in given.items() if key not in WITHIN}
    config_json.check_fixed(path, rest, {"partial_rotary_factor": (1.0, None)}, "rotary positions")
    if rest.keys() - FIXED.keys():
        key = min(rest.keys() - FIXED.keys())
        raise UserError(f"{shown(path)}: {name} has {quoted(key)}, which this version doesn't know")
    where = f"{path}: {name}"
    options: dict[str, Any] = {"rope_base": config_json.number(where, given, "rope_theta", base)}
    if SCALINGS[kind] != "none":
        for key in ("factor", *(FACTORS.values() if kind == "llama3" else ())):
            if key not in given:
                raise UserError(f"{shown(where)}: {key} is missing, which the type {kind} has")
        options |= {"rope_scaling": kind, "rope_factor": config_json.number(where, given, "factor", 1.0)}
    if kind == "llama3":
        options |= {option: config_json.number(where, given, key, 1.0) for option, key in FACTORS.items()}
        options["rope_original_context"] = config_json.size(where, given, (ORIGINAL,), context)
        low, high = (options[option] for option in FACTORS)
        if low >= high:
            raise UserError(f"{shown(where)}: high_freq_factor is {high}, and must be above low_freq_factor, {low}")
    return options


def _given(path: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Returns the dictionary that the file has, and its name. UserError where it is none, or two that differ."""
    found = {name: config[name] for name in (NEW, OLD) if config.get(name) not in (None, {})}
    for name, value in found.items():
        if not isinstance(value, dict):
            raise UserError(f"{shown(path)}: {name} is {quoted(value)}, and must be an object of JSON")
    if len(found) == 2 and found[NEW] != found[OLD]:
        raise UserError(f"{shown(path)}: {NEW} and {OLD} differ, and are two names of one thing: take one of them out")
    return next(iter(found.items()), (OLD, {}))


def content_of(model: Model) -> dict[str, object]:
    """Returns the keys of config.json, as all versions of transformers read them."""
    kind = {ours: theirs for theirs, ours in SCALINGS.items()}[model.rope_scaling]
    scaling: dict[str, object] | None = None
    if model.rope_scaling != "none":
        scaling = {"rope_type": kind, "type": kind, "factor": model.rope_factor}
    if scaling and kind == "llama3":
        scaling |= {key: getattr(model, option) for option, key in FACTORS.items()}
        scaling[ORIGINAL] = model.rope_original_context
    return {"rope_theta": model.rope_base, OLD: scaling}
