"""`run.py prepare --chat`: makes token files of conversations, each with a file of marks (`packing.py`).

The output depends on the files and the options alone. Every tenth conversation is for validation, where no files are
named for it. A conversation is never in two token files. The manifest is written last, so a folder without one is not
whole, and the same command begins it anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from jaxgpt import __version__, writing
from jaxgpt.data import chat_templates, conversations, manifest, progress, sources, token_files
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.documents import Rows
from jaxgpt.data.manifest import Manifest, Shard, Split
from jaxgpt.data.packing import BEGINS, TRAINED
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

VALIDATE_ON = 10  # every so many conversations one is for validation


@dataclass(frozen=True)
class ChatSettings:
    """Options that the output depends on, beside the files."""

    name: str
    sources: tuple[str, ...]
    validation: tuple[str, ...]  # sources; empty: every tenth conversation is for validation
    shard_tokens: int


def prepare(
    settings: ChatSettings, folder: Path, tokenizer: Tokenizer, template: Template, skip_bad: int = 0
) -> Manifest:
    """Makes the token files and their marks in `folder`, and writes the manifest.

    Up to `skip_bad` bad lines are passed over. UserError where the sources can't be read, or the folder can't be used.
    """
    for name in (manifest.NAME, progress.NAME):
        if (folder / name).exists():
            raise UserError(f"{shown(folder)} is prepared already (it has a {name}). Name another --output")
    rows = Rows()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing.lock(folder, "is preparing it"):
            made = _Files(settings, folder, tokenizer, template)
            try:
                for split, where, found in _splits(settings, rows, skip_bad):
                    try:
                        made.add(split, found)
                    except UserError as error:
                        rows.add_bad(where, error, skip_bad)
                return made.conclude(rows)
            finally:
                made.discard()
    except OSError as error:
        raise progress.failure(folder, error, "begins anew") from None


def _splits(
    settings: ChatSettings, rows: Rows, skip_bad: int
) -> Iterator[tuple[Split, str, conversations.Conversation]]:
    """Yields each conversation with its split and its place."""
    for number, (where, found) in enumerate(conversations.read(_paths(settings.sources), rows, skip_bad)):
        validates = not settings.validation and number % VALIDATE_ON == VALIDATE_ON - 1
        yield "val" if validates else "train", where, found
    if settings.validation:
        for where, found in conversations.read(_paths(settings.validation), rows, skip_bad):
            yield "val", where, found


def _paths(names: Sequence[str]) -> Iterator[Path]:
    return sources.here(sources.find(tuple(names)))


class _Files:
    """Writes token files and their marks, one pair of each split at a time."""

    def __init__(self, settings: ChatSettings, folder: Path, tokenizer: Tokenizer, template: Template) -> None:
        self.settings, self.folder, self.tokenizer, self.template = settings, folder, tokenizer, template
        self.form = token_files.format_for(tokenizer.vocabulary_size)
        self.open: dict[Split, tuple[token_files.Writer, token_files.Writer]] = {}
        self.closed: list[tuple[Shard, Shard]] = []
        self.count = 0
        self.numbers = 0

    def add(self, split: Split, found: conversations.Conversation) -> None:
        """Writes a conversation. UserError where the template or the tokenizer can't express it."""
        ids, mask = chat_templates.encode(found.messages, self.template, self.tokenizer, tools=found.tools)
        if not mask[1:].any():
            raise UserError("none of its tokens is the assistant's")
        marks = mask * np.uint8(TRAINED)
        marks[0] |= BEGINS
        if split in self.open and self.open[split][0].count + len(ids) > self.settings.shard_tokens:
            self._close(split)
        tokens, written = self.open.get(split) or self._begin(split)
        tokens.write(ids)
        written.write(marks)
        self.count += 1

    def _begin(self, split: Split) -> tuple[token_files.Writer, token_files.Writer]:
        path = self.folder / f"{self.settings.name}_{split}_{self.numbers:06}.bin"
        self.numbers += 1
        self.open[split] = (
            token_files.Writer(path, self.form),
            token_files.Writer(path.with_suffix(".marks"), token_files.MARKS),
        )
        return self.open[split]

    def _close(self, split: Split) -> None:
        tokens, marks = self.open.pop(split)
        tokens.close()
        marks.close()
        self.closed.append((manifest.describe(tokens.path, split), manifest.describe(marks.path, split, marks=True)))

    def discard(self) -> None:
        """Deletes the files that are not closed."""
        for writers in self.open.values():
            for writer in writers:
                writer.discard()

    def conclude(self, rows: Rows) -> Manifest:
        """Closes all files and writes the manifest. UserError where a split has no conversation."""
        missing = [split for split in ("train", "val") if split not in [*self.open, *(s.split for s, _ in self.closed)]]
        if missing:
            raise UserError(
                f"{self.count:,} conversations, and none of them to "
                f"{'train' if missing[0] == 'train' else 'validate'} on: give at least {VALIDATE_ON}, or files of "
                "others with --validation"
            )
        for split in tuple(self.open):
            self._close(split)
        pairs = sorted(self.closed, key=lambda pair: pair[0].file)
        packages = ["tiktoken", *(["tokenizers"] if self.tokenizer.name in ("bpe", "huggingface") else [])]
        made = Manifest(
            name=self.settings.name,
            tokenizer=self.tokenizer.state(),
            vocabulary_size=self.tokenizer.vocabulary_size,
            end_of_text=self.tokenizer.end_of_text,
            documents=self.count,
            empty_rows=rows.empty,
            bad_rows=rows.bad,
            settings={"chat": True, "sources": [*self.settings.sources], "validation": [*self.settings.validation]},
            versions={"jaxgpt": __version__} | {name: version(name) for name in packages},
            shards=tuple(shard for shard, _ in pairs),
            marks=tuple(marks for _, marks in pairs),
            template=self.template.state(),
        )
        manifest.write(self.folder, made)
        return made
