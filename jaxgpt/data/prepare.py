"""`run.py prepare`: turns text of any size into token files, on all cores.

    files → pieces of a megabyte → tokens, in several processes → token files, in the order of the text

A piece's tokens don't depend on the process that makes them, and token files are written in order. So the output has
the same bytes with any number of processes. At most a few pieces for each process are in memory. After each token file,
its checksum and the place where the next one begins are written to progress.json. After an interruption at any moment,
the same command goes on from there.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from jaxgpt import __version__, writing
from jaxgpt.data import chunks, documents, manifest, progress, sources, token_files, tokenizers, workers
from jaxgpt.data.documents import Chunk, Position, TextLayout
from jaxgpt.data.manifest import Manifest, Split
from jaxgpt.data.workers import Pool, Tokenized
from jaxgpt.errors import Interrupted, RunError, UserError
from jaxgpt.foreign_text import shown

PIECES = 2  # version of the cutting into pieces; an unfinished folder of another version can't be continued
SAMPLED_FILES = 8  # of each kind, whose tokens per byte are measured
SAMPLED_PIECES = 4  # of the files of one kind, though at least two of each file


@dataclass(frozen=True)
class PrepareSettings:
    """Options that the output depends on, beside the files."""

    name: str
    sources: tuple[str, ...]
    validation: tuple[str, ...]  # sources; empty: the first tokens of `sources` are for validation
    validation_tokens: int  # 0: about a tenth, and at most one token file
    shard_tokens: int
    tokenizer: str
    vocabulary_size: int  # of a BPE to be trained
    layout: TextLayout
    tokenizer_sha256: str = ""  # of the state of a tokenizer that came from a file


class Part(NamedTuple):
    """Files that are read one after another for one split; None: first validation, then training."""

    split: Split | None
    files: list[sources.File]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def prepare(
    settings: PrepareSettings,
    folder: Path,
    processes: int,
    skip_bad: int = 0,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Manifest:
    """Makes the token files of `settings` in `folder`, or resumes making them, and writes the manifest.

    Up to `skip_bad` bad rows are passed over. `tokenizer` is one that came from a file; without it one is made by name.

    Raises:
        UserError: The sources can't be read, or the output folder can't be used.
        RunError: A process or the disk failed.
        Interrupted: Ctrl-C was pressed.
    """
    if tokenizer:
        state = json.dumps(tokenizer.state())
        if len(state) > manifest.LARGEST_BYTES // 2:  # the other half is room for the other fields
            raise UserError(
                f"--tokenizer: of {len(state):,} bytes, where the {manifest.NAME} that keeps it has room for "
                f"{manifest.LARGEST_BYTES // 2:,}"
            )
        settings = replace(
            settings,
            tokenizer_sha256=hashlib.sha256(state.encode()).hexdigest(),
            layout=settings.layout._replace(whole=tokenizer.whole_documents),
        )
    if (folder / manifest.NAME).exists():
        raise UserError(
            f"{shown(folder)} is prepared already (it has a {manifest.NAME}). Name another --output, or delete it first"
        )
    parts = [Part("train" if settings.validation else None, sources.find(settings.sources))]
    if settings.validation:
        parts.insert(0, Part("val", sources.find(settings.validation)))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {shown(folder)} is a file, where a folder is to be made. Give another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {shown(folder)}: can't be made ({error.strerror}). Give another name") from None
    try:
        with writing.lock(folder, "is preparing it"), progress.Bar(sum(part.size for part in parts)) as bar:
            for name in (progress.NAME, manifest.NAME):
                writing.clear(folder / name)
            return _Shards(settings, parts, folder, bar, skip_bad).make(processes, tokenizer)
    except BrokenProcessPool:
        raise RunError(
            "a process that tokenizes was killed, as it happens where memory is short: give fewer with --processes. "
            "The same command goes on where it stopped"
        ) from None
    except OSError as error:
        raise progress.failure(folder, error, "goes on where it stopped") from None
    except KeyboardInterrupt:
        raise Interrupted("stopped with Ctrl-C; the same command goes on after the last whole shard") from None


def _ending(file: sources.File) -> str:
    """Returns the suffixes of a file's name, by its kind and how it is packed."""
    path = Path(file.name)
    return documents.unpacked_name(path).suffix + path.suffix


class _Shards:
    """Writes the token files of one command one after another."""

    def __init__(
        self, settings: PrepareSettings, parts: list[Part], folder: Path, bar: progress.Bar, skip_bad: int
    ) -> None:
        self.settings, self.parts, self.folder, self.bar, self.skip_bad = settings, parts, folder, bar, skip_bad
        inputs = [[file.name, file.size, file.modified] for part in parts for file in part.files]
        self.made_from = {
            "pieces": PIECES,
            "settings": asdict(settings) | {"layout": settings.layout._asdict()},
            "inputs": inputs,
        }
        self.state = progress.load(folder, self.made_from)  # as of the last whole token file
        self.documents = self.state.documents
        self.rows = documents.Rows(self.state.empty, self.state.bad)
        self.writer: token_files.Writer | None = None
        self.split: Split = "val"
        self.room = 0  # tokens that fit into the token file that is being written

    def make(self, processes: int, given: tokenizers.Tokenizer | None) -> Manifest:
        tokenizer = self._tokenizer(processes, given)
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

    def _tokenizer(self, processes: int, given: tokenizers.Tokenizer | None) -> tokenizers.Tokenizer:
        if self.state.tokenizer is None:
            settings = self.settings
            if given:
                made = workers.Made(given)
            else:
                self.bar.begin("reading for the vocabulary")
                texts = (piece for part in self.parts for piece in self._pieces(part, Position()))
                name, size = settings.tokenizer, settings.vocabulary_size
                made = workers.make_tokenizer(name, size, texts, processes, self.skip_bad)
            if made.left_out:
                self.bar.say(
                    f"{made.left_out:,} characters in words of more than {workers.LONGEST_WORD:,} were left out of the "
                    "tokenizer's training"
                )
            validation = settings.validation_tokens
            if not settings.validation and not validation:
                validation = self._validation_tokens(made.tokenizer)
            self.state = self.state._replace(tokenizer=made.tokenizer.state(), validation_tokens=validation)
            progress.save(self.folder, self.made_from, self.state)
        return tokenizers.from_state(self.state.tokenizer or {})

    def _validation_tokens(self, tokenizer: tokenizers.Tokenizer) -> int:
        """Returns about a tenth of the text's tokens, and at most those of one token file.

        The tokens per byte on the disk are measured on the beginnings of some files of each kind. A text of a few
        megabytes is counted whole.
        """
        (part,) = self.parts
        total, alike = 0, itertools.groupby(sorted(part.files, key=_ending), _ending)
        for files in (list(group) for _, group in alike):
            local = [file for file in files if isinstance(file.place, Path)]
            chosen = local[:: -(-len(local) // SAMPLED_FILES)] if local else files[:1]  # at most one download
            pieces_each = max(2, SAMPLED_PIECES // len(chosen))
            tokens = sum(self._token_count(file, pieces_each, tokenizer) for file in chosen)
            total += tokens * sum(file.size for file in files) // max(sum(file.size for file in chosen), 1)
        return max(1, min(total // 10, self.settings.shard_tokens))

    def _token_count(self, file: sources.File, most: int, tokenizer: tokenizers.Tokenizer) -> int:
        """Returns how many tokens a file has: counted where it has at most `most` pieces, else estimated.

        A packed file is read further than the piece that comes out of it, because of buffers. So the estimate divides
        the tokens of all pieces but the first by the bytes that were read between the first and the last.
        """
        counts, reads = [], []
        found = chunks.cut(file.here(), self.settings.layout, Position())
        for piece in found:
            counts.append(len(workers.tokenize_with(tokenizer, piece).tokens))
            reads.append(piece.read)
            if len(counts) >= most and (reads[-1] > reads[0] or len(counts) >= 4 * SAMPLED_PIECES):
                break
        if next(found, None) is None:
            return sum(counts)
        if reads[-1] > reads[0]:
            return sum(counts[1:]) * file.size // (reads[-1] - reads[0])
        return sum(counts) * file.size // max(reads[-1], 1)

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

    def _pieces(self, part: Part, start: Position) -> Iterator[Chunk]:
        """Yields the pieces of a part's files from `start` on. While one file is read, the next one is downloaded."""
        self.bar.skip(sum(file.size for file in part.files[: start.file]))
        for number, path in enumerate(sources.here(part.files[start.file :]), start.file):
            beginning = start if number == start.file else Position(number)
            yield from self.bar.watch(chunks.cut(path, self.settings.layout, beginning), part.files[number].size)

    def _add(self, number: int, piece: Chunk, result: Tokenized, skip: int) -> None:
        """Writes a piece's tokens but for the first `skip`, which earlier token files have."""
        rows = replace(self.rows)
        rows.add(result.rows)
        rows.check(self.skip_bad)
        place = skip
        while place < len(result.tokens):
            writer = self.writer or self._begin_shard(self.parts[number].split)
            tokens = result.tokens[place : place + self.room - writer.count]
            writer.write(tokens)
            place += len(tokens)
            if writer.count == self.room:
                self._end_shard(number, piece.position, place)
        self.documents += result.documents
        self.rows = rows

    def _begin_shard(self, split: Split | None) -> token_files.Writer:
        room = self.settings.shard_tokens
        if split is None:
            validation = sum(shard.tokens for shard in self.state.shards if shard.split == "val")
            left = self.state.validation_tokens - validation
            split, room = ("val", min(room, left)) if left else ("train", room)
        name = f"{self.settings.name}_{split}_{len(self.state.shards):06}.bin"
        self.split, self.room = split, room
        self.writer = token_files.Writer(self.folder / name, self.form)
        return self.writer

    def _end_shard(self, part: int, position: Position, tokens: int) -> None:
        """Closes the token file that is being written, if there is one, and saves where the next one begins.

        That is in the piece at `position` of the part, `tokens` of whose tokens are in this and earlier token files.
        """
        shards = self.state.shards
        if self.writer is not None:
            self.writer.close()
            shards = (*shards, manifest.describe(self.writer.path, self.split))
            self.writer = None
        self.state = self.state._replace(part=part, position=position, tokens=tokens, shards=shards)
        self.state = self.state._replace(documents=self.documents, empty=self.rows.empty, bad=self.rows.bad)
        progress.save(self.folder, self.made_from, self.state)

    def _conclude(self, tokenizer: tokenizers.Tokenizer) -> Manifest:
        packages = ["tiktoken", *(["tokenizers"] if tokenizer.name in ("bpe", "huggingface") else [])]
        made = Manifest(
            name=self.settings.name,
            tokenizer=tokenizer.state(),
            vocabulary_size=tokenizer.vocabulary_size,
            end_of_text=tokenizer.end_of_text,
            documents=self.state.documents,
            empty_rows=self.rows.empty,
            bad_rows=self.rows.bad,
            settings=self.made_from["settings"],
            versions={"jaxgpt": __version__} | {name: version(name) for name in packages},
            shards=self.state.shards,
        )
        self._check_tokens(made)
        manifest.write(self.folder, made)
        (self.folder / progress.NAME).unlink()
        return made

    def _check_tokens(self, made: Manifest) -> None:
        """Raises a UserError where there is nothing to train on."""
        names = [file.name for part in self.parts for file in part.files]
        where = shown(names[0]) if len(names) == 1 else f"{shown(names[0])} and {len(names) - 1:,} other files"
        if not made.tokens("train") and not made.tokens("val"):
            rows = made.empty_rows + made.bad_rows
            why = f"none of {rows:,} rows has text in the field '{shown(self.settings.layout.field)}'"
            raise UserError(
                f"{where}: {why if rows else 'empty'}. Name a file with text in it{', or its --field' if rows else ''}"
            )
        if not made.tokens("train"):
            raise UserError(
                f"the text has {made.tokens('val'):,} tokens, and all of them are for validation: give more text, or "
                "fewer --validation-tokens"
            )
