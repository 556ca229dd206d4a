"""The corpus that the options name: tokens of one source or several, their tokenizer, and the two splits."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxgpt import files
from jaxgpt.data import (
    chat_templates,
    corpora,
    fingerprint,
    loader,
    manifest,
    progress,
    sources,
    token_files,
    tokenizers,
)
from jaxgpt.data.loader import Feeder, Tokens
from jaxgpt.data.manifest import Manifest
from jaxgpt.data.packing import Conversations, joined
from jaxgpt.data.token_files import Shards
from jaxgpt.errors import UserError, reason
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.config import Config
from jaxgpt.terminal import command

BEGINNING = 2000  # tokens of the validation split, among which a sentence is looked for


class Described(Protocol):
    """Data of any run, as they describe themselves."""

    @property
    def description(self) -> str: ...

    @property
    def tokenizer(self) -> tokenizers.Tokenizer: ...

    @property
    def prompt(self) -> np.ndarray | None:
        """Returns the tokens that the run's samples begin with; None where no text is drawn."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Returns the data's fingerprint, as `fingerprint.difference` compares it."""
        ...

    @property
    def template(self) -> dict[str, Any]:
        """Returns the state of the chat template; {} where there is none."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Returns lines to print."""
        ...


class Corpus(NamedTuple):
    description: str
    tokenizer: tokenizers.Tokenizer
    train: Tokens | loader.Mixture
    validation: Tokens
    prompt: np.ndarray  # tokens that the run's samples begin with
    fingerprint: dict[str, Any]  # of the data, as `fingerprint.difference` compares it
    template: dict[str, Any] = {}  # noqa: RUF012  # of conversations: the state of their chat template
    notes: tuple[str, ...] = ()  # lines to print


class TextSource(NamedTuple):
    """A text or a set of token files, with its tokenizer and its two splits."""

    description: str
    tokenizer: tokenizers.Tokenizer
    train: Tokens
    validation: Tokens
    fingerprint: dict[str, Any]
    template: dict[str, Any] = {}  # noqa: RUF012  # as the corpus's


class TokenSet(NamedTuple):
    train: Shards | Conversations
    validation: Shards | Conversations
    manifest: Manifest | None  # None for files that other programs made


def open_sources(config: Config, own: tokenizers.Tokenizer | None = None) -> dict[str, TextSource]:
    """Opens the sources that the options name, by name. UserError where there is no such text or no such token files.

    `own` is the tokenizer that came with weights; it replaces the one that the options name.
    """
    return {name: _source(name, config, own) for name in weights_of(config)}


def put_together(opened: dict[str, TextSource], config: Config) -> Corpus:
    """Returns the corpus of these sources, by the options with the sizes that follow from the sources filled in.

    UserError where a source is too short, has another tokenizer than the others, or tokens that the model hasn't.
    """
    tokenizer = next(iter(opened.values())).tokenizer
    for name, source in opened.items():
        _check(name, source, tokenizer, config)
    if len(opened) == 1:
        ((description, _, train, validation, made_of, _),) = opened.values()
    else:
        train = loader.mixture([source.train for source in opened.values()], list(weights_of(config).values()))
        splits = [source.validation for source in opened.values()]
        chats = [split for split in splits if isinstance(split, Conversations)]
        validation = joined(chats) if chats else np.concatenate([split[:] for split in splits])
        shares = zip(train.quotas, opened.values(), strict=True)
        description = " and ".join(f"{quota / loader.ROUND:.1%} {source.description}" for quota, source in shares)
        made_of = {"quotas": list(train.quotas), "sources": [source.fingerprint for source in opened.values()]}
    template = _template(opened)
    prompt = _prompt(config, tokenizer, validation, template)
    loader.check_vocabulary(prompt, config.model.vocabulary_size, "--run.prompt")
    length = config.training.sequence_length
    notes = tuple(
        f"{name}{what}: {line}"
        for name, source in opened.items()
        for split, what in ((source.train, ""), (source.validation, ", to validate on"))
        if isinstance(split, Conversations)
        for line in split.packed(length).words(length)
    )
    return Corpus(description, tokenizer, train, validation, prompt, made_of, template, notes)


def has_conversations(opened: dict[str, TextSource]) -> bool:
    """Returns whether a source is of conversations, which say themselves where each begins."""
    return any(isinstance(source.train, Conversations) for source in opened.values())


def _template(opened: dict[str, TextSource]) -> dict[str, Any]:
    """Returns the chat template of the conversations, {} for none. UserError where they have several."""
    found = [(name, source.template) for name, source in opened.items() if source.template]
    other = next((name for name, template in found if template != found[0][1]), None)
    if other is not None:
        raise UserError(
            f"--data.mixture: the conversations of {shown(other)} are in another chat template than those of "
            f"{shown(found[0][0])}: prepare them with the same --template"
        )
    return found[0][1] if found else {}


def weights_of(config: Config) -> dict[str, float]:
    """Returns the weight of each source by its name. UserError for an option `data.mixture` that can't be parsed."""
    if not config.data.mixture:
        return {config.data.text: 1.0}
    weights: dict[str, float] = {}
    for part in config.data.mixture.split(","):
        name, _, weight = part.strip().rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0.0
        if not name or not 0 < weights[name] < float("inf"):
            raise UserError(
                f"--data.mixture: {part.strip()!r} is not a source and its weight above 0; write it as "
                "data/web=0.8, data/books=0.2"
            )
    return weights


def feed(data: Corpus, config: Config, first: int, rows: Sequence[int]) -> Feeder:
    """Returns a feeder of a run's batches, which are made in the background.

    A token outside the model's vocabulary raises a UserError with the batch that contains it: tokens on the disk are
    not read earlier. The first batch is that of step `first`; `rows` is as in `loader.batch_at`.
    """
    sizes = ("micro_batches", "batch_size", "sequence_length", "seed")
    options: dict[str, int] = {name: getattr(config.training, name) for name in sizes}

    def make(step: int) -> loader.Batch:
        batch = loader.batch_at(data.train, step=step, rows=rows, **options)
        loader.check_batch(batch, config.model.vocabulary_size, f"the batch of step {step + 1}")
        return batch

    return Feeder(make, first)


def _source(name: str, config: Config, own: tokenizers.Tokenizer | None = None) -> TextSource:
    """Opens one source. UserError where there is no such text or no such token files."""
    if found := find_token_files(name):
        tokenizer = own if own and not found.manifest else _tokenizer_of(found, config)
        train, validation = found.train, found.validation
        listed = (*found.manifest.shards, *found.manifest.marks) if found.manifest else ()
        made_of = fingerprint.of_files([*train.paths, *validation.paths], {one.file: one.sha256 for one in listed})
        chats = isinstance(train, Conversations)
        parts = f"{train.count:,} conversations" if chats else f"{len(train.paths)} token files"
        template = found.manifest.template if found.manifest else {}
        return TextSource(f"{parts} of {name}", tokenizer, train, validation, made_of, template)
    text = corpora.load(name)
    tokenizer = own or tokenizers.make(config.data.tokenizer, text)
    train, validation = loader.split(tokenizer.encode(text), config.data.validation_fraction)
    return TextSource(corpora.describe(name), tokenizer, train, validation, fingerprint.of(text.encode()))


def _tokenizer_of(found: TokenSet, config: Config) -> tokenizers.Tokenizer:
    """Returns the manifest's tokenizer; for files without a manifest, the tokenizer that the options name."""
    if found.manifest:
        tokenizer, stated = tokenizers.from_state(found.manifest.tokenizer), found.manifest.vocabulary_size
        if tokenizer.vocabulary_size != stated:
            raise UserError(
                f"{found.train.paths[0].parent / manifest.NAME} is damaged: it says {stated:,} tokens, and its "
                f"tokenizer {tokenizer.name} has {tokenizer.vocabulary_size:,}; restore it from a copy, or prepare the "
                "data anew"
            )
        return tokenizer
    if config.data.tokenizer == "characters":
        raise UserError("--data.tokenizer characters: token files without a manifest don't say which characters")
    return tokenizers.make(config.data.tokenizer, "")


def _check(name: str, source: TextSource, tokenizer: tokenizers.Tokenizer, config: Config) -> None:
    """Raises a UserError where a source is too short, or is not made of this tokenizer's tokens."""
    where, size = f"--data.text {name}", config.model.vocabulary_size
    if source.tokenizer.state() != tokenizer.state():
        raise UserError(
            f"--data.mixture: {name} has {source.tokenizer.name} tokens, and others have {tokenizer.name} ones, or of "
            "another vocabulary; prepare them with the same tokenizer"
        )
    loader.sequences_per_epoch(source.train, config.training.sequence_length)  # raises for a short split
    loader.validation_batches(source.validation, batch_size=1, sequence_length=1)  # likewise
    loader.check_vocabulary(source.validation, size, where)
    if not isinstance(source.train, Shards):
        loader.check_vocabulary(source.train, size, where)


def _prompt(
    config: Config, tokenizer: tokenizers.Tokenizer, validation: Tokens, template: dict[str, Any]
) -> np.ndarray:
    """Returns the tokens of `run.prompt`, else the one that begins a text, else a sentence of the validation split.

    With a chat template they are of a question: of that prompt, or of the first conversation.
    """
    if template and config.run.prompt:
        messages = [{"role": "user", "content": config.run.prompt}]
        asked = chat_templates.from_state(template)
        return chat_templates.encode(messages, asked, tokenizer, add_generation_prompt=True).ids
    if isinstance(validation, Conversations):
        return validation.prompt()
    if config.run.prompt:
        return tokenizer.begin(tokenizer.encode(config.run.prompt))
    if tokenizer.document_start is not None:
        return np.array([tokenizer.document_start], np.int32)
    text = tokenizer.decode(validation[:BEGINNING])
    sentence = re.search(r"(?:[.!?]\s+|\n\s*)(?=[A-Z])(.+)", text)
    line = sentence[1] if sentence else next((line for line in files.text_lines(text)[1:] if line.strip()), text)
    return tokenizer.begin(tokenizer.encode(line)[: config.model.context // 4 + 1])


# Token files by name: a prepared folder, llm.c's own files, or a pattern of them


def find_token_files(name: str) -> TokenSet | None:
    """Returns the token files of a data set by name, a folder, a .bin file or a pattern; None for any other name.

    UserError where the token files are missing or damaged.
    """
    if name in sources.DATA_SETS and name not in corpora.NAMES:
        folder = sources.data_folder() / name
        if not folder.is_dir():
            raise UserError(
                f"--data.text {name}: these {sources.DATA_SETS[name].about} are not in {folder} yet. Get them there "
                f"by: {command('prepare', name)}"
            )
        return _in_folder(folder, "prepare", name)
    path = Path(name)
    try:
        if path.is_dir():
            return _in_folder(path, "prepare", name, "--output", f"data/{path.resolve().name}")
        if path.suffix == ".bin" or (re.search(r"[*?\[]", name) and not path.exists()):
            paths = sorted(Path(path) for path in glob.glob(name, recursive=True))
            if not paths:
                wanted = f"--data.text {shown(name)}: there are no such files"
                raise UserError(f"{wanted}. {command('prepare', 'SOURCE')} makes token files of text")
            return _by_names(paths)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UserError(f"cannot read {quoted(name)}: {reason(error)}") from None
    return None


def _in_folder(folder: Path, *words: str) -> TokenSet:
    """Opens a folder of token files, which the command of these words makes."""
    if os.path.lexists(folder / manifest.NAME):
        return _by_manifest(folder, manifest.read(folder))
    if os.path.lexists(folder / progress.NAME):
        raise UserError(
            f"{shown(folder)} is not prepared to its end: the command that began it goes on where it stopped"
        )
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        raise UserError(
            f"{shown(folder)} is a folder, and has no token files (.bin). Make some of the text in it by: "
            f"{command(*words)}"
        )
    return _by_names(paths)


def _by_names(paths: list[Path]) -> TokenSet:
    """Splits token files by their names. Without one for validation, those in the same folders are taken."""
    of = {split: [path for path in paths if sources.split_of(path) == split] for split in ("train", "val")}
    if not of["val"]:
        beside = sorted({other for folder in {path.parent for path in paths} for other in folder.glob("*.bin")})
        of["val"] = [path for path in beside if sources.split_of(path) == "val"]
    for split, found in of.items():
        if not found:
            raise UserError(
                f"{shown(paths[0])}: a .bin file is taken for tokens, and {shown(paths[0].resolve().parent)} has no "
                f"token files for {'training' if split == 'train' else 'validation'}: those have _{split}_ in their "
                f"names, as llm.c's. {command('prepare', 'SOURCE')} makes both of text"
            )
    return TokenSet(Shards(of["train"]), Shards(of["val"]), None)


def _by_manifest(folder: Path, found: Manifest) -> TokenSet:
    """Opens the files that the manifest names. UserError unless each has as many tokens as the manifest says."""
    for shard in (*found.shards, *found.marks):
        path = folder / shard.file
        count = len(token_files.tokens_of(path, folder, marks=shard in found.marks))
        if count != shard.tokens:
            raise UserError(
                f"{shown(path)} is not what was prepared: it has {count:,} tokens, and {manifest.NAME} says "
                f"{shard.tokens:,}; restore it from a copy, or prepare it anew"
            )

    def opened(split: str) -> Shards | Conversations:
        tokens, marks = (
            [folder / shard.file for shard in listed if shard.split == split] for listed in (found.shards, found.marks)
        )
        if not tokens:
            raise UserError(f"{shown(folder / manifest.NAME)} names no files to train on, or none to validate on")
        shards = Shards(tokens, folder)
        return Conversations(shards, Shards(marks, folder, marks=True), shown(folder)) if found.marks else shards

    return TokenSet(opened("train"), opened("val"), found)
