"""manifest.json: lists the token files in a folder, and says how they were made.

It is data from outside, so each name in it must be the plain name of a file in the same folder, or it is refused.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from jaxgpt import files, writing
from jaxgpt.data import token_files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown

NAME = "manifest.json"
FORMAT = 1
LARGEST_BYTES = 128 << 20  # room for a tokenizer.json that is a string within the JSON
Split = Literal["train", "val"]


@dataclass(frozen=True)
class Shard:
    file: str
    split: Split
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    name: str
    tokenizer: dict[str, Any]  # as `tokenizers.from_state` takes it
    vocabulary_size: int
    end_of_text: int | None  # the token before each document; None where the tokenizer has none
    documents: int  # 0 where they were not counted
    empty_rows: int  # rows of JSON and Parquet without text, which were left out
    bad_rows: int  # damaged rows, and rows with something other than text, which were left out
    settings: dict[str, Any]  # options of the command that made the files
    versions: dict[str, str]
    shards: tuple[Shard, ...]
    # Of conversations alone:
    marks: tuple[Shard, ...] = ()  # a file of marks for each of `shards`, in their order
    template: dict[str, Any] = field(default_factory=dict)  # as `chat_templates.from_state` takes it

    def tokens(self, split: Split) -> int:
        """Returns the number of tokens in a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)


def describe(path: Path, split: Split, *, marks: bool = False) -> Shard:
    """Returns the manifest's entry for an existing token file, or of marks; all of it is read for its SHA-256."""
    tokens = token_files.tokens_of(path, path.parent, marks=marks)
    with files.open_file(path, path.parent) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        size = os.fstat(file.fileno()).st_size
    return Shard(path.name, split, len(tokens), size, digest)


def write(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically: whole or not at all."""
    totals = {"tokens": {split: manifest.tokens(split) for split in get_args(Split)}}
    write_json(folder / NAME, {"format": FORMAT} | asdict(manifest) | totals)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically: whole or not at all, even where the power fails."""
    with writing.replacing(path) as new:
        new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Reads a folder's manifest, but not the files it names. UserError where it is missing or damaged."""
    path = folder / NAME
    fields = files.read_json(path, LARGEST_BYTES, folder)
    if fields.get("format") != FORMAT:
        raise UserError(
            f"{shown(path)} is not a manifest of format {FORMAT}, which this version of jaxgpt writes and reads"
        )
    shards = fields.get("shards")
    if not isinstance(shards, list):
        raise UserError(f"{shown(path)} is damaged: it has no list of shards")
    found = tuple(shard(path, entry) for entry in shards)
    marks = fields.get("marks", [])
    if not isinstance(marks, list) or len(marks) not in (0, len(found)):
        raise UserError(f"{shown(path)} is damaged: its token files and its marks are not as many")
    found_marks = tuple(shard(path, entry) for entry in marks)
    if len({entry.file for entry in (*found, *found_marks)}) < len(found) + len(found_marks):
        raise UserError(f"{shown(path)} is damaged: it names one file twice")
    fields = {"empty_rows": 0, "bad_rows": 0, "template": {}} | fields
    kinds = dict.fromkeys(("tokenizer", "settings", "versions", "template"), dict) | {
        "name": str,
        "vocabulary_size": int,
    }
    kinds |= dict.fromkeys(("documents", "empty_rows", "bad_rows"), int)
    end_of_text = None if fields.get("end_of_text") is None else _field(path, fields, "end_of_text", int)
    typed = {key: _field(path, fields, key, kind) for key, kind in kinds.items()}
    return Manifest(shards=found, marks=found_marks, end_of_text=end_of_text, **typed)


def shard(path: Path, entry: Any) -> Shard:
    """Parses a token file's entry in the JSON file `path`. UserError where the entry is damaged."""
    if not isinstance(entry, dict):
        raise UserError(f"{shown(path)} is damaged: a shard in it is {quoted(entry)}")
    file, split = _field(path, entry, "file", str), _field(path, entry, "split", str)
    if split not in get_args(Split):
        raise UserError(f"{shown(path)} is damaged: the split of {shown(file)} is {quoted(split)}")
    if file != Path(file).name or file in ("", ".", "..") or any(character in file for character in "/\\:\0"):
        raise UserError(
            f"{shown(path)} names the shard {quoted(file)}, which is not the name of a file in the same folder"
        )
    tokens, size = _field(path, entry, "tokens", int), _field(path, entry, "bytes", int)
    return Shard(file, split, tokens, size, _field(path, entry, "sha256", str))


def _field(path: Path, fields: dict[str, Any], key: str, kind: type) -> Any:
    value = fields.get(key)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise UserError(f"{shown(path)} is damaged: {key} is {quoted(value)}, and should be of type {kind.__name__}")
    return value


def verify(folder: Path) -> Manifest:
    """Reads every token file whole and returns the manifest. UserError for a file that is missing or has changed."""
    found = read(folder)
    for expected in (*found.shards, *found.marks):
        path = folder / expected.file
        now = describe(path, expected.split, marks=expected in found.marks)
        if now != expected:
            raise UserError(
                f"{shown(path)} is not what was written: it has {now.tokens:,} tokens and SHA-256 {now.sha256}, and "
                f"{NAME} says {expected.tokens:,} and {shown(expected.sha256)}; restore it from a copy, or prepare "
                "it anew"
            )
    return found
