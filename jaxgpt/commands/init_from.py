"""`--init-from`: a run that begins with weights from elsewhere.

The model's shape and the tokenizer are those of the weights. Where the user names them too, in a --config or on the
command line, they must agree.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxgpt.commands.convert import describe
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import NAMES, Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import detect_format
from jaxgpt.interop.tensors import WeightSource
from jaxgpt.options import settings
from jaxgpt.options.config import Config, Model
from jaxgpt.runs import checkpoints
from jaxgpt.runs.folder import will_resume


def with_shape(config: Config, given: set[str]) -> Config:
    """Returns the configuration with the shape and tokenizer of the weights `training.init_from`.

    A resumed run keeps what it had; the weights that it began with need not exist any more.

    Args:
        config: The options.
        given: The options that the user named, as "section.key".

    Raises:
        UserError: The weights can't be read, or one of the `given` options differs from theirs.
    """
    named = {key: value for key, value in asdict(config.model).items() if f"model.{key}" in given and value}
    if will_resume(config):  # resuming refuses other options itself
        saved = settings.read_trained(Path(config.run.folder) / config.run.name)
        model, tokenizer = replace(saved.model, **named), saved.data.tokenizer
    else:
        source = detect_format.open_weights(config.training.init_from)
        model, tokenizer = source.model, source.tokenizer.name if source.tokenizer else config.data.tokenizer
        _check_shape(config.training.init_from, model, named)
        if "data.tokenizer" in given and source.tokenizer:
            _check_tokenizer(config.training.init_from, tokenizer, config.data.tokenizer)
    if "data.tokenizer" not in given and tokenizer in NAMES:  # else token files bring it along
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    return replace(config, model=model)


def tokenizer(config: Config) -> Tokenizer | None:
    """Returns the tokenizer of the weights `training.init_from` if it is a tokenizer.json, and else None.

    Such a tokenizer cuts the run's text into tokens; the options can name any other. A resumed run has it in its
    checkpoint.
    """
    if not config.training.init_from:
        return None
    if will_resume(config):
        folder = Path(config.run.folder) / config.run.name / "checkpoints"
        found = checkpoints.tokenizer_of(checkpoints.find(folder, ("about",)))
    else:
        found = detect_format.open_weights(config.training.init_from).tokenizer
    return found if isinstance(found, HuggingFace) else None


def weights(config: Config, tokenizer: Tokenizer) -> WeightSource | None:
    """Returns the weights `training.init_from`, to be loaded when there is a place for them; None for no weights.

    Raises:
        UserError: They have another shape than this configuration, or another tokenizer than the run.
    """
    name = config.training.init_from
    if not name or will_resume(config):
        return None
    run = Path(config.run.folder) / config.run.name
    if run.resolve() in (Path(name).resolve(), *Path(name).resolve().parents):
        raise UserError(f"--init-from {name}: in the folder that this run would replace. Give another --run.name")
    source = detect_format.open_weights(name)
    _check_shape(name, source.model, asdict(config.model))
    V, Vp, has = config.model.vocabulary_size, config.model.padded_vocabulary_size, tokenizer.vocabulary_size
    if source.tokenizer:
        _check_tokenizer(name, source.tokenizer.name, tokenizer.name)
        if source.tokenizer.state() != tokenizer.state():
            raise UserError(_other_tokens(name, source.tokenizer, tokenizer))
    if has > V or (source.tokenizer is None and has <= Vp - 128):  # a vocabulary may have been padded
        raise UserError(
            f"--init-from {name}: these weights are of a vocabulary of {V:,} tokens, and the tokenizer "
            f"{tokenizer.name} has {has:,} (--data.tokenizer)"
        )
    return source


def lines(source: WeightSource) -> list[str]:
    """Returns the lines to print about the weights at the start of a run."""
    return [f"weights   from {source.where}: {describe(source)}", *(f"          {note}" for note in source.notes)]


def _check_tokenizer(name: str, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise UserError(
            f"--init-from {name}: these weights are of the tokenizer {theirs}, and --data.tokenizer is {ours}"
        )


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _other_tokens(name: str, theirs: Tokenizer, ours: Tokenizer) -> str:
    """Returns the message about tokenizers of one kind that differ."""
    advice = f". Prepare the text with --tokenizer {shown(name)}" if isinstance(theirs, HuggingFace) else ""
    if isinstance(theirs, HuggingFace) and isinstance(ours, HuggingFace) and theirs.text == ours.text:
        return (
            f"--init-from {shown(name)}: with these weights token {theirs.end_of_text} ends a text, and in the token "
            f"files {'none' if ours.end_of_text is None else f'token {ours.end_of_text}'} does, though all others are "
            f"the same{advice}"
        )
    return (
        f"--init-from {shown(name)}: these weights are of the tokenizer {theirs.name} with other tokens, as of another "
        f"text's characters{advice}"
    )


def _check_shape(name: str, found: Model, asked: dict[str, Any]) -> None:
    different = [
        f"{settings.option('model', key)} is {_shown(value)} and they have {_shown(asdict(found)[key])}"
        for key, value in asked.items()
        if value != asdict(found)[key] and key != "document_start"  # no weight depends on it
    ]
    if different:
        raise UserError(
            f"--init-from {name}: these weights are of another shape: {'; '.join(different)}. Leave these options away "
            "(and --config, where they stand there), and the shape is that of the weights"
        )
