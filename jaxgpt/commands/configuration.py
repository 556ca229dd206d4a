"""Completes the options that a user gives to a configuration in which nothing is left open, the same in all processes.

1. The model's shape and the tokenizer come from the weights that a run begins with (`--init-from`), and the
   adapters' rank, alpha and targets from those that are trained on (`--lora.adapters`): `with_weights`. Where the user
   names them too, in a --config or on the command line, they must agree.
2. The vocabulary's size and the token between documents come from the tokenizer, the sequences' length from the model:
   `complete` with the text, `without_text` where only the sizes are wanted.
3. What each machine decides for itself comes last: the attention kernel (`with_attention`), and the recompute level
   (`training/memory_plan.py`, which compiles the train step to know it). A run's config.toml keeps what was asked for.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jaxgpt
from jaxgpt.commands.convert import describe
from jaxgpt.data import chat_templates, corpus, fingerprint, tokenizers
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.corpus import Corpus, Described
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import detect_format, loading
from jaxgpt.interop.llama_tables import shortest
from jaxgpt.interop.tensors import AdapterSource, WeightSource
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.models import family, lora
from jaxgpt.options import settings
from jaxgpt.options.config import IN_DATA, Config, Model
from jaxgpt.parallel import processes
from jaxgpt.runs import checkpoints
from jaxgpt.runs.about import lora_of
from jaxgpt.runs.folder import will_resume

FOLLOWING = ("vocabulary_size", "kv_heads", "head_width", "feed_forward")  # where they are 0, from others
WITHOUT_WEIGHTS = ("document_start", "router_balance", "router_z", "dropout")  # options that no weight depends on
NAMED = 3  # files, at most, in the message about other code


def complete(config: Config, own: Tokenizer | None = None) -> tuple[Corpus, Config]:
    """Returns the text, and the configuration with the sizes that follow from it. UserError as the text raises it.

    With `own`, a tokenizer that came with weights, the tokenizer that the options name is not used.
    """
    sources = corpus.open_sources(config, own)
    config = resolve(config, next(iter(sources.values())).tokenizer, corpus.has_conversations(sources))
    return corpus.put_together(sources, config), config


def without_text(config: Config) -> Config:
    """Returns the configuration with its sizes, reading the text only where the tokenizer depends on it."""
    if config.data.tokenizer == "characters":
        return resolve(config, next(iter(corpus.open_sources(config).values())).tokenizer)
    return resolve(config, tokenizers.make(config.data.tokenizer, ""))


def resolve(config: Config, tokenizer: Tokenizer, conversations: bool | None = None) -> Config:
    """Returns the vocabulary size from the tokenizer and the sequence length from the context, where they are 0.

    `conversations` says whether the data are conversations; None where the data are not known.
    """
    document_start = config.model.document_start
    if conversations is not None and (conversations or document_start == IN_DATA):
        document_start = IN_DATA if conversations else -1
    if config.data.document_mask and conversations:
        raise UserError("--data.document-mask: leave it away, since conversations are kept apart without it")
    if config.data.document_mask:
        if tokenizer.document_start is None:
            raise UserError(
                f"--data.document-mask: the tokenizer {tokenizer.name} has no token that stands before a document; "
                "gpt2 has one, and so have most"
            )
        document_start = tokenizer.document_start
    size = config.model.vocabulary_size or tokenizer.vocabulary_size
    model = replace(config.model, vocabulary_size=size, document_start=document_start)
    family(model).check(model)
    if config.lora.rank:
        lora.check(model, config.lora)
    length = config.training.sequence_length or config.model.context
    return settings.changed(config, model=model, training={"sequence_length": length})


def with_attention(config: Config) -> tuple[Config, str]:
    """Returns the configuration with the attention that runs on this machine, and a line that describes it."""
    compute, words = choose_attention(config.model, config.compute, config.training.sequence_length)
    return replace(config, compute=compute), words


# Weights to begin with


def with_weights(config: Config, given: set[str]) -> Config:
    """Returns the configuration with what follows from the adapters and the weights that the run begins with.

    UserError as `_with_adapters` and `_with_shape` raise it.
    """
    if config.lora.adapters:
        config = _with_adapters(config, given)
    return _with_shape(config, given) if config.training.init_from else config


def _with_adapters(config: Config, given: set[str]) -> Config:
    """Returns the configuration with the options and the base of the adapters `lora.adapters`.

    A resumed run keeps what it had. UserError where they can't be read, or differ in an option that the user has given.
    """
    if will_resume(config):
        folder = Path(config.run.folder) / config.run.name / "checkpoints"
        about = checkpoints.find(folder, ("about",)).about
        theirs, base = lora_of(about), about["base"].get("name", "")
    else:
        source = adapters(config)
        theirs, base = source.options, source.base
    for key in ("rank", "alpha", "targets"):
        found, asked = getattr(theirs, key), getattr(config.lora, key)
        if f"lora.{key}" in given and asked != found:
            raise UserError(
                f"--lora.adapters {shown(config.lora.adapters)}: {key} of these adapters is {shown(found)}, and "
                f"{settings.option('lora', key)} is {shown(asked)}: leave it away"
            )
    options = {"rank": theirs.rank, "alpha": theirs.alpha, "targets": theirs.targets}
    return settings.changed(config, lora=options, training={"init_from": config.training.init_from or base})


def adapters(config: Config) -> AdapterSource:
    """Returns the adapters `lora.adapters`. UserError where there are none, or none beside the base that is given."""
    name, base = config.lora.adapters, config.training.init_from
    source = detect_format.open_adapters(name, base)
    if not source.adapters:
        raise UserError(f"--lora.adapters {shown(name)}: has whole weights: give them by --init-from")
    return source.adapters


def _with_shape(config: Config, given: set[str]) -> Config:
    """Returns the configuration with the shape and tokenizer of the weights `training.init_from`.

    A resumed run keeps what it had; the weights that it began with need not exist any more. UserError where the weights
    can't be read, or differ in one of the options that the user has given, "section.key".
    """
    named = {key: value for key, value in asdict(config.model).items() if f"model.{key}" in given}
    named = {key: value for key, value in named.items() if value != 0 or key not in FOLLOWING}
    if will_resume(config):  # resuming refuses other options itself
        saved = settings.read_trained(Path(config.run.folder) / config.run.name)
        model, tokenizer = replace(saved.model, **named), saved.data.tokenizer
    else:
        source = detect_format.open_weights(config.training.init_from)
        model, tokenizer = source.model, source.tokenizer.name if source.tokenizer else config.data.tokenizer
        _check_shape(config.training.init_from, model, named)
        model = replace(model, **{key: value for key, value in named.items() if key in WITHOUT_WEIGHTS})
        model = replace(model, dropout=config.model.dropout)  # of this training, whatever theirs was with
        if "data.tokenizer" in given and source.tokenizer:
            _check_tokenizer(config.training.init_from, tokenizer, config.data.tokenizer)
    if "data.tokenizer" not in given and tokenizer in tokenizers.NAMES:  # else token files bring it along
        config = settings.changed(config, data={"tokenizer": tokenizer})
    return replace(config, model=model)


def tokenizer_of_weights(config: Config) -> Tokenizer | None:
    """Returns the tokenizer of the weights `training.init_from`; None where there are none, or they don't say.

    A resumed run has it in its checkpoint.
    """
    if not config.training.init_from:
        return None
    if will_resume(config):
        folder = Path(config.run.folder) / config.run.name / "checkpoints"
        return checkpoints.tokenizer_of(checkpoints.find(folder, ("about",)))
    return detect_format.open_weights(config.training.init_from).tokenizer


def template_of_weights(config: Config) -> dict[str, Any]:
    """Returns the state of the chat template of the weights `training.init_from`; {} where there is none.

    A resumed run has it in its checkpoint.
    """
    if will_resume(config):
        folder = Path(config.run.folder) / config.run.name / "checkpoints"
        return checkpoints.find(folder, ("about",)).about["template"]
    return loading.template_of(detect_format.open_weights(config.training.init_from))


def language(config: Config) -> tuple[Tokenizer, Template, list[str]]:
    """Returns the tokenizer and the template of the weights to begin with, and lines about them to print."""
    name = config.training.init_from
    tokenizer = tokenizer_of_weights(config)
    if tokenizer is None:
        if config.data.tokenizer == "characters":
            raise UserError(f"--init-from {shown(name)} names no tokenizer: name it with --data.tokenizer")
        tokenizer = tokenizers.make(config.data.tokenizer, "")
    if state := template_of_weights(config):
        return tokenizer, chat_templates.from_state(state), []
    note = f"{name} has no chat template: its texts are written in ChatML"
    return tokenizer, chat_templates.built_in("chatml"), [note]


def weights(config: Config, tokenizer: Tokenizer) -> WeightSource | None:
    """Returns the weights `training.init_from`, to be loaded when there is a place for them; None for no weights.

    A resumed run has its own, but for the frozen base of its adapters. UserError where they have another shape than
    this configuration, or another tokenizer than the run.
    """
    name = config.training.init_from
    if not name or (will_resume(config) and not config.lora.rank):
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


def about_weights(source: WeightSource) -> list[str]:
    """Returns the lines to print about the weights at the start of a run."""
    return [f"weights   from {source.where}: {describe(source)}", *(f"          {note}" for note in source.notes)]


def _check_tokenizer(name: str, theirs: str, ours: str) -> None:
    if theirs != ours:
        wrong = f"these weights are of the tokenizer {theirs}, and --data.tokenizer is {ours}"
        raise UserError(f"--init-from {name}: {wrong}")


def _other_tokens(name: str, theirs: Tokenizer, ours: Tokenizer) -> str:
    """Returns the message about tokenizers of one kind that differ."""
    advice = f". Prepare the text with --tokenizer {shown(name)}" if isinstance(theirs, HuggingFace) else ""
    if isinstance(theirs, HuggingFace) and isinstance(ours, HuggingFace) and theirs.text == ours.text:
        if theirs.end_of_text == ours.end_of_text:
            return (
                f"--init-from {shown(name)}: with these weights a text begins with token {theirs.begin_of_text}, and "
                f"in the token files with {ours.begin_of_text}, though all others are the same{advice}"
            )
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
    def written(value: object) -> str:
        return f"{value:,}" if type(value) is int else str(value)

    wanted = replace(found, **asked)
    different = [
        f"{other.option} is {written(other.asked)} and they have {written(other.saved)}"
        for other in settings.model_differences(asdict(found), wanted)
        if other.key not in WITHOUT_WEIGHTS
        and getattr(shortest(found), other.key) != getattr(shortest(wanted), other.key)
    ]
    if different:
        raise UserError(
            f"--init-from {name}: these weights are of another shape: {'; '.join(different)}. Leave these options away "
            "(and --config, where they stand there), and the shape is that of the weights"
        )


# Processes: they would wait for each other for ever, or compute wrong numbers, if each trained another run


def check_processes(config: Config, data: Described) -> None:
    """Raises a UserError that names the difference, where process 0 has other options, text, versions or code."""
    if processes.count() == 1:
        return
    own = {
        "options": asdict(config),
        "text": data.fingerprint,
        "versions": settings.versions(),
        "code": sources(Path(jaxgpt.__file__).parent),
    }
    own = json.loads(json.dumps(own))  # tuples become lists, as they do on the way
    first = processes.talk.broadcast(lambda: own)
    different = [
        f"{found.option} is {found.saved} there and {found.asked} here"
        for found in settings.differences(first["options"], config)
    ]
    different += [
        f"{name} is {first['versions'].get(name)} there and {version} here"
        for name, version in own["versions"].items()
        if first["versions"].get(name) != version
    ]
    other = sorted({name for name, _ in first["code"].items() ^ own["code"].items()})
    if other:
        names = ", ".join(other[:NAMED]) + (" and more" if len(other) > NAMED else "")
        different.append(f"the code is not the same in {names}")
    change = fingerprint.difference(first["text"], own["text"])
    if change:
        different.append(f"--data.text {config.data.text} is another text: {change}")
    if different:
        raise UserError(f"process {processes.index()} is to train other than process 0: {'; '.join(different)}")


def sources(package: Path) -> dict[str, str]:
    """Returns a hash of each of the package's Python files, an editor's hidden ones excepted."""
    names = [path.relative_to(package.parent) for path in sorted(package.rglob("*.py")) if path.is_file()]
    return {
        name.as_posix(): hashlib.sha256((package.parent / name).read_bytes()).hexdigest()[:16]
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    }
