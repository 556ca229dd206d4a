"""`run.py prepare`: text of any size to token files, on all cores.

    files → pieces of a megabyte → tokens, in as many processes as there are → shards, in the files' order

A piece's tokens don't depend on who makes them, and shards are written in order, so the output has the same bytes on
any number of processes. At most a few pieces for each process are in memory. After each shard its checksum, and the
place where the next begins, go to progress.json: killed at any moment, the same command goes on from there.
"""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jaxgpt import __version__, writing
from jaxgpt.data import manifest, pieces, progress, sources, token_files, tokenizers, workers
from jaxgpt.data.manifest import Manifest, Split
from jaxgpt.data.pieces import Layout, Piece, Position
from jaxgpt.data.workers import Pool, Tokenized
from jaxgpt.errors import Interrupted, RunError, UserError


@dataclass(frozen=True)
class Settings:
    """What the output depends on, beside the files."""

    name: str
    sources: tuple[str, ...]
    validation: tuple[str, ...]  # sources; where there are none, the first tokens are for validation
    validation_tokens: int
    shard_tokens: int
    tokenizer: str
    vocabulary_size: int  # of a BPE that is to be trained
    layout: Layout


class Part(NamedTuple):
    """Files that are read one after another, and what they are for; None: first validation, then training."""

    split: Split | None
    files: list[sources.File]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def prepare(settings: Settings, folder: Path, processes: int) -> Manifest:
    """Makes the token files of `settings` in `folder`, or goes on making them, and writes the manifest.

    UserError for what can't be read, RunError where a process or the disk fails, Interrupted after Ctrl-C.
    """
    if (folder / manifest.NAME).exists():
        raise UserError(
            f"{folder} is prepared already (it has a {manifest.NAME}). Name another --output, or delete it first"
        )
    parts = [Part("train" if settings.validation else None, sources.find(settings.sources))]
    if settings.validation:
        parts.insert(0, Part("val", sources.find(settings.validation)))
    elif not settings.validation_tokens:
        settings = replace(settings, validation_tokens=_validation_tokens(settings, parts[0].size))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file, where a folder is to be made. Give another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing.lock(folder, "is preparing it"), progress.Bar(sum(part.size for part in parts)) as bar:
            return _Shards(settings, parts, folder, bar).make(processes)
    except BrokenProcessPool:
        raise RunError(
            "a process that tokenizes was killed, as it happens where memory is short: give fewer with --processes. "
            "The same command goes on where it stopped"
        ) from None
    except OSError as error:
        raise RunError(f"{folder}: writing failed ({error.strerror}). Is the disk full?") from None
    except KeyboardInterrupt:
        raise Interrupted("stopped with Ctrl-C; the same command goes on after the last whole shard") from None


def _validation_tokens(settings: Settings, size: int) -> int:
    """About a tenth of the text, by its size on the disk, and at most one shard."""
    bytes_per_token = 1 if settings.tokenizer in ("bytes", "characters") else 4
    return max(1, min(size // (10 * bytes_per_token), settings.shard_tokens))


class _Shards:
    """The shards of one command, written one after another."""

    def __init__(self, settings: Settings, parts: list[Part], folder: Path, bar: progress.Bar) -> None:
        self.settings, self.parts, self.folder, self.bar = settings, parts, folder, bar
        inputs = [[file.name, file.size, file.modified] for part in parts for file in part.files]
        self.made_from = {"settings": asdict(settings) | {"layout": settings.layout._asdict()}, "inputs": inputs}
        self.state = progress.load(folder, self.made_from)  # as of the last whole shard
        self.documents = self.state.documents
        self.writer: token_files.Writer | None = None
        self.split: Split = "val"
        self.room = 0  # how many tokens the shard that is being written takes

    def make(self, processes: int) -> Manifest:
        tokenizer = self._tokenizer(processes)
        self.form = token_files.format_for(tokenizer.vocabulary_size)
        self.bar.begin("tokenizing")
        try:
            with Pool(processes, tokenizer.state()) as pool:
                for number in range(len(self.parts)):
                    self._make_part(number, pool)
        finally:
            if self.writer is not None:
                self.writer.discard()
        return self._conclude(tokenizer)

    def _tokenizer(self, processes: int) -> tokenizers.Tokenizer:
        if self.state.tokenizer is None:
            self.bar.begin("reading for the vocabulary")
            texts = (piece for part in self.parts for piece in self._pieces(part, Position()))
            settings = self.settings
            made = workers.make_tokenizer(settings.tokenizer, settings.vocabulary_size, texts, processes)
            self.state = self.state._replace(tokenizer=made.state())
            progress.save(self.folder, self.made_from, self.state)
        return tokenizers.from_state(self.state.tokenizer or {})

    def _make_part(self, number: int, pool: Pool) -> None:
        part, state = self.parts[number], self.state
        if number < state.part:
            self.bar.skip(part.size)
            return
        start, skip = (state.position, state.tokens) if number == state.part else (Position(), 0)
        for piece, result in pool.map(workers.tokenize, self._pieces(part, start)):
            self._add(number, piece, result, skip)
            skip = 0
        self._end_shard(number + 1, Position(), 0)

    def _pieces(self, part: Part, start: Position) -> Iterator[Piece]:
        """The pieces of a part's files in order, from `start` on. While one file is read, the next is downloaded."""
        self.bar.skip(sum(file.size for file in part.files[: start.file]))
        for number, path in enumerate(sources.here(part.files[start.file :]), start.file):
            beginning = start if number == start.file else Position(number)
            yield from self.bar.watch(pieces.cut(path, self.settings.layout, beginning), part.files[number].size)

    def _add(self, number: int, piece: Piece, result: Tokenized, skip: int) -> None:
        """Writes the piece's tokens behind the first `skip`, which earlier shards have."""
        place = skip
        while place < len(result.tokens):
            writer = self.writer or self._begin_shard(self.parts[number].split)
            tokens = result.tokens[place : place + self.room - writer.count]
            writer.write(tokens)
            place += len(tokens)
            if writer.count == self.room:
                self._end_shard(number, piece.position, place)
        self.documents += result.documents

    def _begin_shard(self, split: Split | None) -> token_files.Writer:
        room = self.settings.shard_tokens
        if split is None:
            validation = sum(shard.tokens for shard in self.state.shards if shard.split == "val")
            left = self.settings.validation_tokens - validation
            split, room = ("val", min(room, left)) if left else ("train", room)
        name = f"{self.settings.name}_{split}_{len(self.state.shards):06}.bin"
        self.split, self.room = split, room
        self.writer = token_files.Writer(self.folder / name, self.form)
        return self.writer

    def _end_shard(self, part: int, position: Position, tokens: int) -> None:
        """Closes the shard, if there is one, and notes where the next begins."""
        shards = self.state.shards
        if self.writer is not None:
            self.writer.close()
            shards = (*shards, manifest.describe(self.writer.path, self.split))
            self.writer = None
        self.state = progress.State(self.state.tokenizer, part, position, tokens, self.documents, shards)
        progress.save(self.folder, self.made_from, self.state)

    def _conclude(self, tokenizer: tokenizers.Tokenizer) -> Manifest:
        made = Manifest(
            name=self.settings.name,
            tokenizer=tokenizer.state(),
            vocabulary_size=tokenizer.vocabulary_size,
            end_of_text=tokenizer.end_of_text,
            documents=self.state.documents,
            settings=self.made_from["settings"],
            versions={"jaxgpt": __version__, **workers.versions(self.settings.tokenizer)},
            shards=self.state.shards,
        )
        if not made.tokens("train"):
            raise UserError(
                f"the text has {made.tokens('val'):,} tokens, and all of them are for validation: give more text, or "
                "fewer --validation-tokens"
            )
        manifest.write(self.folder, made)
        progress.delete(self.folder)
        return made
