"""The config.json of a Hugging Face folder, by the tables of its family."""

from pathlib import Path
from typing import Any

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import config_json, gpt2_tables, llama_tables
from jaxgpt.options.config import Model

KINDS = (gpt2_tables.KIND, *llama_tables.KINDS)  # model_type


def model_of(path: Path, config: dict[str, Any]) -> Model:
    """Returns the model that a config.json describes. UserError, with the key, where this project has no such model."""
    kind = config.get("model_type", gpt2_tables.KIND)
    if kind not in KINDS:
        names = f"{', '.join(KINDS[:-1])} and {KINDS[-1]}"
        raise UserError(f"{shown(path)}: model_type is {quoted(kind)}; this version reads models of {names}")
    if kind == gpt2_tables.KIND:
        return gpt2_tables.model_of(path, config)
    return llama_tables.model_of(path, config, llama_tables.KINDS[kind])


def content_of(model: Model, dtype: str, ids: dict[str, int | None]) -> dict[str, object]:
    """Returns the content of config.json, with the `ids` of special tokens.

    UserError for a model that no architecture of transformers computes.
    """
    module = gpt2_tables if model.family == gpt2_tables.KIND else llama_tables
    return {**module.content_of(model), **ids, "torch_dtype": dtype}


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Returns the ids of the tokens that begin and end a text, None where there are none.

    The end of a text stands before the next one too where no other token does.
    """
    end = tokenizer.end_of_text if tokenizer else None
    begin = tokenizer.begin_of_text if tokenizer and tokenizer.begin_of_text is not None else end
    return {"bos_token_id": begin, "eos_token_id": end}


def notes(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns notes that name the keys in no table, of a config.json that `model_of` has read."""
    kind = config.get("model_type", gpt2_tables.KIND)
    if kind == gpt2_tables.KIND:
        return config_json.unknown(config, gpt2_tables.KNOWN, gpt2_tables.NAME)
    return config_json.unknown(config, llama_tables.KINDS[kind].known, llama_tables.KINDS[kind].name)


def end_of_text(config: dict[str, Any]) -> int | None:
    """Returns the id of the end of text by config.json, the first where it has several; None where it has none."""
    value = config.get("eos_token_id")
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int else None
