"""Opens the token files that a run trains on: a prepared folder, llm.c's own files, or a pattern of them.

data/notes   data/fineweb10B/   'shards/edu_fineweb_*.bin'   fineweb-10B
"""

import bisect
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.data import corpora, manifest, progress, sources, token_files
from jaxgpt.data.manifest import Manifest
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown


class Shards:
    """Token files one after another as one read-only, 1-D array of tokens, which can be sliced.

    A slice is read from the disk when it is taken. Indices may exceed 32 bits.
    """

    def __init__(self, paths: Sequence[Path], within: Path | None = None) -> None:
        self.paths = tuple(paths)
        self._files = [token_files.open(path, within) for path in paths]
        self._ends = list(itertools.accumulate(len(file) for file in self._files))
        types = {file.dtype for file in self._files}
        if len(types) > 1:
            raise UserError(
                f"{shown(paths[0].parent)} has token files of {' and '.join(sorted(map(str, types)))}: give those of "
                "one tokenizer"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        pieces = []
        number = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[number] - len(self._files[number])
            end = min(stop, self._ends[number])
            pieces.append(self._files[number][start - begin : end - begin])
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint16)])


class TokenSet(NamedTuple):
    train: Shards
    validation: Shards
    manifest: Manifest | None  # None for files that other programs made


def find(name: str) -> TokenSet | None:
    """Returns the token files called `name`; None where the name doesn't stand for token files.

    Args:
        name: A data set by name, a folder, a .bin file, or a pattern of files.

    Raises:
        UserError: The token files are missing or damaged.
    """
    if name in sources.DATA_SETS and name not in corpora.NAMES:
        folder = sources.data_folder() / name
        if not folder.is_dir():
            raise UserError(
                f"--data.text {name}: these {sources.DATA_SETS[name].about} are not in {folder} yet. Get them there "
                f"by: python run.py prepare {name}"
            )
        return _in_folder(folder, f"prepare {name}")
    path = Path(name)
    try:
        if path.is_dir():
            return _in_folder(path, f"prepare {name} --output data/{path.resolve().name}")
        if path.suffix == ".bin" or (re.search(r"[*?\[]", name) and not path.exists()):
            return _matching(name)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UserError(f"cannot read {quoted(name)}: {getattr(error, 'strerror', None) or error}") from None
    return None


def _in_folder(folder: Path, command: str) -> TokenSet:
    if os.path.lexists(folder / manifest.NAME):
        return _by_manifest(folder, manifest.read(folder))
    if os.path.lexists(folder / progress.NAME):
        raise UserError(
            f"{shown(folder)} is not prepared to its end: the command that began it goes on where it stopped"
        )
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        raise UserError(
            f"{shown(folder)} is a folder, and has no token files (.bin). Make some of the text in it by: python "
            f"run.py {shown(command)}"
        )
    return _by_names(paths)


def _matching(pattern: str) -> TokenSet:
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    if not paths:
        raise UserError(
            f"--data.text {shown(pattern)}: there are no such files. python run.py prepare makes token files of text"
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
                "names, as llm.c's. python run.py prepare makes both of text"
            )
    return TokenSet(Shards(of["train"]), Shards(of["val"]), None)


def _by_manifest(folder: Path, found: Manifest) -> TokenSet:
    """Opens the files that the manifest names. UserError unless each has as many tokens as the manifest says."""
    for shard in found.shards:
        path = folder / shard.file
        count = len(token_files.open(path, folder))
        if count != shard.tokens:
            raise UserError(
                f"{shown(path)} is not what was prepared: it has {count:,} tokens, and {manifest.NAME} says "
                f"{shard.tokens:,}; restore it from a copy, or prepare it anew"
            )
    train, validation = (
        [folder / shard.file for shard in found.shards if shard.split == split] for split in ("train", "val")
    )
    if not (train and validation):
        raise UserError(f"{shown(folder / manifest.NAME)} names no files to train on, or none to validate on")
    return TokenSet(Shards(train, folder), Shards(validation, folder), found)
