"""`run.py prepare`: token files, from the options to the report of what was made."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt import writing
from jaxgpt.data import documents, hub, manifest, sources, token_files, tokenizers
from jaxgpt.data.documents import TextLayout
from jaxgpt.data.manifest import Manifest, Shard
from jaxgpt.data.prepare import PrepareSettings, prepare
from jaxgpt.data.prepare_conversations import ChatSettings
from jaxgpt.data.prepare_conversations import prepare as prepare_chats
from jaxgpt.data.sources import DATA_SETS, SHARD_TOKENS
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import detect_format, huggingface_chat
from jaxgpt.options import checks, command_line, settings
from jaxgpt.options.command_line import nearest
from jaxgpt.terminal import command, say

MOST_PROCESSES = 1024
LONGEST_NAME_BYTES = 200  # most systems allow 255 bytes in a file's name, and this is its beginning


@dataclass(frozen=True)
class Prepare:
    """Makes token files of text: plain, JSON or Parquet, packed (.gz, .bz2, .xz, .zst) or not."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, folders, patterns such as 'notes/*.jsonl.gz', hf:owner/name (any data set on the Hugging Face hub, with
    /folder and :split where it has several), or one of the data sets that are known by name."""
    output: str = ""
    """Folder to write; empty takes the data's name in $JAXGPT_DATA, or in data/ where that is not set."""
    name: str = ""
    """Beginning of the files' names; empty takes it from the first source."""
    tokenizer: str = "gpt2"
    """Tokenizer of the text: gpt2, cl100k, o200k, llama3, bytes, characters; bpe, which is trained on the first
    gigabyte of the text itself; or the path of a tokenizer.json, of a folder that has one, of Llama 3's
    tokenizer.model, or of weights in a GGUF or llama2.c file."""
    vocabulary_size: int = 8192
    """Number of tokens in the vocabulary of bpe."""
    field: str = "text"
    """Field of a JSON object, or column of a Parquet file, that has the text."""
    skip_bad: int = 0
    """Number of JSON rows that may be left out because they are damaged, or have something else than text there. Empty
    rows (null or "") are always left out."""
    separator: str = ""
    """Text between the documents of a text file, with \\n for a line break, which matches \\r\\n too; empty: each file
    is one document."""
    validation: tuple[str, ...] = ()
    """Sources to validate on; without them, the first tokens of the text."""
    validation_tokens: int = 0
    """Number of tokens to validate on; 0 takes about a tenth of all, and at most one shard."""
    shard_tokens: int = SHARD_TOKENS
    """Number of tokens in a file."""
    processes: int = 0
    """Number of processes that tokenize; 0 takes one for each core. The output is the same."""
    chat: bool = False
    """Read conversations: lines of JSON (messages, ShareGPT's, Alpaca's, prompt and response), of which only the
    assistant's tokens are trained on."""
    template: str = ""
    """Chat template: chatml, llama3, mistral, or the path of a Hugging Face folder or of its chat_template.jinja; empty
    takes the one of the folder that --tokenizer names, and else chatml."""
    ready_made: bool = False
    """Download token files that others have made of the data set, where there are some, rather than the text."""
    verify: bool = False
    """Prepare nothing: read every byte of the folder that is named, and compare it with its manifest."""


def run(words: list[str]) -> int:
    """Makes token files, and prints what was made and how to train on it."""
    known = "\n".join(f"  {name:18}{data_set.about}" for name, data_set in DATA_SETS.items())
    description = f"{Prepare.__doc__}\n\nData sets by name:\n{known}"
    options = command_line.read(Prepare, words, "prepare", description=description)
    checks.check_own(options, ("vocabulary_size", "shard_tokens"), ("validation_tokens", "processes", "skip_bad"))
    if options.processes > MOST_PROCESSES:
        raise UserError(f"--processes is {options.processes:,}, and may be {MOST_PROCESSES:,} at most: a core has one")
    if not options.sources:
        raise UserError(f"name what to prepare: files, folders, or one of {', '.join(DATA_SETS)}")
    if options.verify:
        return _verify([Path(source) for source in options.sources])
    data_set = DATA_SETS.get(options.sources[0]) if len(options.sources) == 1 else None
    name = options.name or _name(options.sources[0])
    if not re.fullmatch(r"[\w.-]+", name) or len(os.fsencode(name)) > LONGEST_NAME_BYTES:
        raise UserError(
            f"--name {shown(name)}: letters, digits and . _ - make names that every system takes, of up to "
            f"{LONGEST_NAME_BYTES} bytes"
        )
    folder = Path(options.output) if options.output else sources.data_folder() / name
    started = time.perf_counter()
    if options.template and not options.chat:
        raise UserError("--template is of conversations: give --chat too, or leave it away")
    if options.chat:
        made = _chat(options, name, folder)
    elif options.ready_made:
        made = ready_made(options, data_set, name, folder)
    else:
        own = _tokenizer_of(options.tokenizer)
        asked = _settings(options, data_set, name)
        made = prepare(asked, folder, options.processes or cores(), options.skip_bad, own)
    _report(made, folder, time.perf_counter() - started)
    return 0


def _chat(options: Prepare, name: str, folder: Path) -> Manifest:
    """Makes token files of conversations. UserError for an option that they don't have."""
    for key in ("validation_tokens", "separator", "ready_made", "processes"):
        if getattr(options, key):
            raise UserError(f"{settings.option('', key)} is of plain text: leave it away with --chat")
    own = _tokenizer_of(options.tokenizer)
    if own is None and options.tokenizer in ("characters", "bpe"):
        raise UserError(
            f"--tokenizer {options.tokenizer} is made of a text: with --chat, name the one of the model that is to be "
            "trained on, such as the folder of its run"
        )
    tokenizer = own or tokenizers.make(options.tokenizer, "")
    path = Path(options.tokenizer)
    template = huggingface_chat.template_of(path) if not options.template and path.is_dir() else None
    template = template or huggingface_chat.named(options.template or "chatml")
    asked = ChatSettings(name, options.sources, options.validation, options.shard_tokens)
    return prepare_chats(asked, folder, tokenizer, template, options.skip_bad)


def _tokenizer_of(name: str) -> tokenizers.Tokenizer | None:
    """Returns the tokenizer of a file or folder; None for one that has a name. UserError where it is neither."""
    names = (*tokenizers.NAMES, "bpe")
    if name in names:
        return None
    path = Path(name)
    if name and (found := detect_format.tokenizer_of(path)):
        return found
    raise UserError(
        f"--tokenizer {shown(name)}: give {', '.join(names)}, or the path of {detect_format.TOKENIZERS}"
        f"{nearest(name, names)}"
    )


def _settings(options: Prepare, data_set: sources.DataSet | None, name: str) -> PrepareSettings:
    separator = options.separator.replace("\\n", "\n").replace("\\t", "\t")
    validation, validation_tokens, named = options.validation, options.validation_tokens, options.sources
    if data_set is not None:
        named, separator = (data_set.source,), separator or data_set.separator
        validation = validation or ((data_set.validation,) if data_set.validation else ())
        validation_tokens = validation_tokens or data_set.validation_tokens
    return PrepareSettings(
        name=name,
        sources=named,
        validation=validation,
        validation_tokens=validation_tokens,
        shard_tokens=options.shard_tokens,
        tokenizer=options.tokenizer,
        vocabulary_size=options.vocabulary_size if options.tokenizer == "bpe" else 0,
        layout=TextLayout(options.field, separator),
    )


def _name(source: str) -> str:
    """Returns a name for a source: notes for notes.jsonl.gz or notes/*.txt, name for hf:owner/name:split.

    Characters that some systems refuse in a file's name become "_".
    """
    if source.startswith(sources.HUB):
        parts = source.removeprefix(sources.HUB).partition(":")[0].split("/")
        name = "-".join(parts[1:])
    else:
        path = Path(source)
        while re.search(r"[*?\[]", path.name) and not os.path.exists(path):  # exists is false for too long a name
            path = path.parent
        name = path.resolve().name if os.path.isdir(path) else documents.unpacked_name(path).stem
    name = re.sub(r"[^\w.-]+", "_", name).strip("._-")
    return os.fsencode(name)[:LONGEST_NAME_BYTES].decode("utf-8", "ignore") or "data"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report(made: Manifest, folder: Path, seconds: float) -> None:
    of = "conversations" if made.marks else "documents"
    documents = f" of {made.documents:,} {of}" if made.documents else ""
    say(
        f"{made.tokens('train'):,} tokens to train on and {made.tokens('val'):,} to validate on{documents}, in "
        f"{len(made.shards) + len(made.marks)} files in {shown(folder)} ({seconds:.1f} s)"
    )
    if made.empty_rows or made.bad_rows:
        say(f"left out: {made.empty_rows:,} rows without text, and {made.bad_rows:,} bad ones")
    of_chat = ["--config", "sft_quickstart", "--init-from", "RUN"] if made.marks else []
    say(f"train on them: {command(*of_chat, '--data.text', folder)}")


def _verify(folders: list[Path]) -> int:
    for folder in folders:
        if not (folder / manifest.NAME).exists():
            raise UserError(
                f"{shown(folder)}: not a folder that run.py prepare made to its end (it has no {manifest.NAME})"
            )
        found = manifest.verify(folder)
        written = (*found.shards, *found.marks)
        size = sum(shard.bytes for shard in written)
        say(f"{shown(folder)}: all {len(written)} files are what was written, {size:,} bytes")
    return 0


def ready_made(options: Prepare, data_set: sources.DataSet | None, name: str, folder: Path) -> Manifest:
    """Downloads token files from the hub, checks each, and writes their manifest. Files that are there stay."""
    if data_set is None or not data_set.ready_made or options.tokenizer != "gpt2":
        have = ", ".join(known for known, other in DATA_SETS.items() if other.ready_made)
        raise UserError(f"--ready-made: there are such files with the tokenizer gpt2 only, and only of {have}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remotes = [r for r in hub.files(data_set.ready_made) if r.name.endswith(".bin") and "/" not in r.name]
        shards = []
        for number, remote in enumerate(remotes, 1):
            say(f"{number} of {len(remotes)}: {shown(remote.name)} ({remote.size / 1e6:,.0f} MB)", flush=True)
            path = hub.fetch(remote, folder=str(folder))
            tokens = len(token_files.tokens_of(path))
            shards.append(Shard(path.name, sources.split_of(path), tokens, remote.size, remote.sha256))
        tokenizer = tokenizers.make("gpt2", "")
        made = Manifest(
            name=name,
            tokenizer=tokenizer.state(),
            vocabulary_size=tokenizer.vocabulary_size,
            end_of_text=tokenizer.end_of_text,
            documents=0,
            empty_rows=0,
            bad_rows=0,
            settings={"ready_made": data_set.ready_made, "revision": remotes[0].revision if remotes else ""},
            versions={},
            shards=tuple(shards),
        )
        manifest.write(folder, made)
    except OSError as error:
        raise writing.failure(folder, error) from None
    return made
