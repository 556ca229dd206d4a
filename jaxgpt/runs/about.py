"""A checkpoint's metadata, read as data that may be wrong.

`checkpoints/STEP/about/metadata` is JSON that `resuming.about`, `interop.runs.write` or anybody else has written. It
is read here alone: every field has its type and its bounds, and a field that an older version didn't write has a
default.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from jaxgpt import __version__, files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.models import family, lora
from jaxgpt.options import checks, settings
from jaxgpt.options.command_line import types_of
from jaxgpt.options.config import Config, Lora, Model, Objective, Training

FILE = Path("about", "metadata")  # within a checkpoint, as orbax names it
OF_ONE_START = {"parallel", "evaluation", "sampling", "checkpoint", "run"}  # sections that change no training
MOST_SHARES = 1 << 16  # sources of a mixture
SMALLEST = 1 << 26  # bytes of parameters, up to which the size of their files isn't checked
COMPRESSED = 16  # bytes of parameters per byte of their files: random numbers hardly shrink


class About(TypedDict):
    """The fields of a checkpoint's about/metadata."""

    step: int
    configuration: dict[str, dict[str, Any]]  # options by section, as they were saved
    tokenizer: dict[str, Any]  # as `tokenizers.from_state` takes it
    template: dict[str, Any]  # as `chat_templates.from_state` takes it; empty where it was trained on no conversations
    versions: dict[str, str]  # this package's, and those of what numbers depend on
    sequences_per_step: int  # 0 where the configuration doesn't say either
    text: dict[str, Any]  # the data's fingerprint; empty where it isn't known
    lengths: dict[str, int]  # bytes that the run's files had
    base: dict[str, str]  # of adapters, as `about_base` has it; else empty
    best: dict[str, Any]  # the fields of `best.Best`; empty where nothing was evaluated
    kept: dict[str, Any]  # what the objective keeps beside the state, often nothing
    converted_from: str  # the source of weights that were not trained here, else empty


def read_about(checkpoint: Path) -> About:
    """Returns a checkpoint's metadata.

    UserError, with the file and the field, where it is no JSON, a field has another type or is out of its bounds, or
    this version doesn't know an option.
    """
    path = checkpoint / FILE
    values = files.read_json(path, within=checkpoint)
    where = shown(path)

    def field(name: str, valid: Callable[[Any], bool], default: Any) -> Any:
        return _field(where, values, name, valid, default)

    versions = field("versions", _is_table_of(_is_text), {})
    try:
        configuration = _configuration(where, field("configuration", _is_table_of(_is_table), None))
    except UserError as error:
        wrote = versions.get("jaxgpt", __version__)
        other = f" It was written by jaxgpt {shown(wrote)}, and this is {__version__}." if wrote != __version__ else ""
        raise UserError(f"{error}{'' if str(error).endswith(('.', '?')) else '.'}{other}") from None
    training = Training(**configuration.get("training", {}))
    number = int(checkpoint.name) if checkpoint.name.isdecimal() and len(checkpoint.name) < 10 else 0
    return About(
        step=field("step", _is_size, number),
        configuration=configuration,
        tokenizer=field("tokenizer", _is_table, {}),
        template=field("template", _is_table, {}),
        versions=versions,
        sequences_per_step=field("sequences_per_step", _is_size, training.batch_size * training.micro_batches),
        text=field("text", _is_fingerprint, {}),
        lengths=field("lengths", _is_table_of(_is_bytes), {}),
        base=field("base", _is_table_of(_is_text), {}),
        best=field("best", _is_best, {}),
        kept=field("kept", _is_table, {}),
        converted_from=field("converted_from", _is_text, ""),
    )


def model_of(about: About) -> Model:
    """Returns the shape of a checkpoint's model."""
    return Model(**about["configuration"]["model"])


def lora_of(about: About) -> Lora:
    """Returns the options of a checkpoint's adapters; of rank 0 where it has whole parameters."""
    return settings.section("", "lora", Lora, about["configuration"].get("lora", {}))


def objective_of(about: About) -> Objective:
    """Returns the objective that a checkpoint was trained with; the next token where it doesn't say."""
    return settings.section("", "objective", Objective, about["configuration"].get("objective", {}))


def about_base(name: str, fingerprint: str) -> dict[str, str]:
    """Returns what a checkpoint of adapters says of its base, by whose `name` the user gave it."""
    return {"name": name, "path": str(Path(name).resolve()) if Path(name).exists() else "", "sha256": fingerprint}


def check_size(checkpoint: Path, about: About) -> None:
    """Raises a UserError where the files are far too small for the parameters that the metadata states.

    The memory for the parameters is allocated before any of them is read.
    """
    model, options = model_of(about), lora_of(about)
    stated = 4 * (lora.parameter_count(model, options) if options.rank else family(model).parameter_count(model))
    there = sum(path.stat().st_size for path in (checkpoint / "params").rglob("*") if path.is_file())
    if stated > SMALLEST and stated > COMPRESSED * there:
        raise UserError(
            f"{shown(checkpoint)}: this checkpoint can't be read (its parameters have {there:,} bytes on the disk, and "
            f"{shown(FILE)} says that they are {stated:,}). Restore it from a copy, or train anew"
        )


def _configuration(where: str, saved: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the saved options by section. UserError for an unknown one, except in the sections `OF_ONE_START`."""
    kinds = types_of(Config)
    if "model" not in saved:
        raise UserError(f"{where}: configuration doesn't say of which model it is")
    known = {}
    for name, table in saved.items():
        if name not in kinds:
            raise UserError(f"{where}: unknown options [{shown(name)}] in configuration")
        if name in OF_ONE_START:
            table = {key: value for key, value in table.items() if key in types_of(kinds[name])}
        options = settings.section(where, name, kinds[name], table)
        if name == "model":
            _check_model(where, options)
        if name == "lora":
            _check_lora(where, saved, options)
        known[name] = table
    return known


def _check_lora(where: str, saved: dict[str, dict[str, Any]], options: Lora) -> None:
    """Raises a UserError for adapters that the model can't have."""
    try:
        checks.check_lora(options)
        if options.rank:
            lora.check(settings.section(where, "model", Model, saved["model"]), options)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('--')}") from None


def _check_model(where: str, model: Model) -> None:
    try:
        checks.check_model(model)
        if not model.vocabulary_size:
            raise UserError("--model.vocabulary-size is 0, and must be greater than 0")
        family(model).check(model)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('--')}") from None


def _field(where: str, values: dict[str, Any], name: str, valid: Callable[[Any], bool], default: Any) -> Any:
    """Returns a field's value, or its default where it is missing. Without a default it must not be missing."""
    if name not in values and default is not None:
        return default
    if name not in values or not valid(values[name]):
        wrong = f"can't be {quoted(values[name])}" if name in values else "is missing"
        raise UserError(f"{where}: {name} {wrong}. Restore the file from a copy, or take another checkpoint")
    return values[name]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= checks.LARGEST


def _is_bytes(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_table_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns a test of whether a value is an object whose values all pass a test."""
    return lambda value: isinstance(value, dict) and all(map(valid, value.values()))


def _is_best(value: Any) -> bool:
    """Returns whether a value has the fields of `best.Best`, or none."""
    sizes = ("step", "since", "evaluated")
    return value == {} or (
        isinstance(value, dict)
        and all(_is_size(value.get(key)) for key in sizes)
        and type(value.get("loss")) is float
        and math.isfinite(value["loss"])
    )


def _is_fingerprint(value: Any) -> bool:
    """Returns whether a value has the form of `fingerprint.of`, of `fingerprint.of_files` or of a mixture of them."""
    if not isinstance(value, dict):
        return False
    if "quotas" in value:
        quotas, sources = value["quotas"], value.get("sources")
        return (
            isinstance(quotas, list)
            and isinstance(sources, list)
            and len(quotas) == len(sources) <= MOST_SHARES
            and all(_is_size(quota) for quota in quotas)
            and all(_is_fingerprint(source) and "quotas" not in source for source in sources)
        )
    return _is_table_of(_is_file)(value["files"]) if "files" in value else _is_file(value)


def _is_file(value: Any) -> bool:
    """Returns whether a value is the fingerprint of one file or of one text."""
    return (
        isinstance(value, dict)
        and _is_bytes(value.get("bytes"))
        and isinstance(value.get("sha256", ""), str)
        and any(isinstance(value.get(key), list) for key in ("hashes", "samples"))
        and all(isinstance(item, str) for key in ("hashes", "samples") for item in value.get(key) or [])
    )
