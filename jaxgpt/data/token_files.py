"""llm.c's token files: a header of 256 int32 and then the tokens, all little-endian.

    magic       version   tokens
    20240520    1         uint16    GPT-2's, and any vocabulary of up to 65,536 tokens
    20240801    7         uint32    Llama 3's, and any larger vocabulary

Marks of conversations (`packing.py`) are such a file too, 20261128 and 1, of a byte for each token.

The header's third number is the count of tokens. 32 bits can't hold a count above 4,294,967,295, so the count is taken
from the file's size, and the header must agree with its low 32 bits. The header of a file that was cut off doesn't.
"""

import bisect
import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxgpt import files
from jaxgpt.data import unpacking
from jaxgpt.errors import UserError, reason
from jaxgpt.foreign_text import shown
from jaxgpt.terminal import command

HEADER_BYTES = 1024


class Format(NamedTuple):
    magic: int
    version: int
    dtype: np.dtype


GPT2 = Format(20240520, 1, np.dtype("<u2"))
LLAMA3 = Format(20240801, 7, np.dtype("<u4"))
MARKS = Format(20261128, 1, np.dtype("u1"))
FORMATS = {form.magic: form for form in (GPT2, LLAMA3)}


def format_for(vocabulary_size: int) -> Format:
    """Returns the narrowest format that holds every token of the vocabulary."""
    return GPT2 if vocabulary_size <= 1 << 16 else LLAMA3


def tokens_of(path: Path | str, within: Path | None = None, *, marks: bool = False) -> np.ndarray:
    """Returns the tokens of a file, 1-D, uint16 or uint32, as a read-only memory map; only the header is read.

    With `marks` the file is one of marks, uint8. UserError where it can't be read, is no token file, doesn't have the
    size that its header states, or a link leads out of `within`.
    """
    path = Path(path)
    # Tokens are mapped, and read where they are needed; marks are all read.
    with files.open_file(path, within, holes=not marks) as file:
        try:
            header = file.read(HEADER_BYTES)
            form, count = _check(path, os.fstat(file.fileno()).st_size, header, marks)
            return np.memmap(file, form.dtype, "r", offset=HEADER_BYTES, shape=(count,))  # type: ignore[arg-type]
        except (OSError, ValueError) as error:  # ValueError: the file shrank since it was checked
            raise UserError(f"cannot read the token file {shown(path)}: {reason(error)}") from None


def _check(path: Path, size: int, header: bytes, marks: bool) -> tuple[Format, int]:
    """Returns the format, and the count of tokens by the file's size. UserError where the header doesn't agree."""
    formats = {MARKS.magic: MARKS} if marks else FORMATS
    magic = int.from_bytes(header[:4], "little")
    if magic not in formats and (about := unpacking.known(header)):
        raise UserError(f"{shown(path)} is no token file, but {about}")
    if magic not in formats and path.name in ("train.bin", "val.bin") and size and size % 2 == 0:
        new = shown(path.with_name(f"tokens_{path.name}"))
        raise UserError(
            f"{shown(path)} has no header, as nanoGPT's train.bin and val.bin have none. Write a token file with one, "
            "and move the old one away: python -c 'import numpy, pathlib; from jaxgpt.data import token_files as t; "
            f't.write(pathlib.Path("{new}"), numpy.memmap("{shown(path)}", "<u2"), t.GPT2)\'; or make it of the text '
            f"by: {command('prepare', 'SOURCE')}"
        )
    if len(header) < HEADER_BYTES:
        raise UserError(
            f"{shown(path)} is no token file: it ends at byte offset {len(header)}, within the header of "
            f"{HEADER_BYTES} bytes"
        )
    magic, version, stated = (int(number) for number in np.frombuffer(header, "<u4", 3))
    form = formats.get(magic)
    if form is None:
        known = " or ".join(f"{form.magic} ({form.dtype})" for form in formats.values())
        raise UserError(
            f"{shown(path)} is no token file: the magic number at byte offset 0 is {magic}, and should be {known}"
        )
    if version != form.version:
        raise UserError(
            f"{shown(path)}: the version at byte offset 4 is {version}, and token files of magic number {magic} have "
            f"version {form.version}: it was written by another program, or is damaged"
        )
    count, rest = divmod(size - HEADER_BYTES, form.dtype.itemsize)
    if rest or count & 0xFFFFFFFF != stated:
        promised = HEADER_BYTES + stated * form.dtype.itemsize
        raise UserError(
            f"{shown(path)} is damaged: its header promises {stated:,} tokens, that is {promised:,} bytes, and "
            f"it has {size:,}; restore it from a copy, or prepare it anew"
        )
    if not count:
        raise UserError(f"{shown(path)} has no tokens")
    return form, count


class Shards:
    """Token files one after another as one read-only, 1-D array of tokens, which can be sliced.

    A slice is read from the disk when it is taken. Indices may exceed 32 bits.
    """

    def __init__(self, paths: Sequence[Path], within: Path | None = None, *, marks: bool = False) -> None:
        self.paths = tuple(paths)
        self._files = [tokens_of(path, within, marks=marks) for path in paths]
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


def header(form: Format, count: int) -> bytes:
    """Returns the header, 1024 bytes, of a file of `count` tokens."""
    numbers = np.zeros(HEADER_BYTES // 4, "<u4")
    numbers[:3] = form.magic, form.version, count & 0xFFFFFFFF
    return numbers.tobytes()


class Writer:
    """Writes a token file piece by piece, as `path`.part until `close` gives it its name or `discard` deletes it.

    Methods raise the disk's OSError, and `write` raises a ValueError for tokens that the format can't hold.
    """

    def __init__(self, path: Path, form: Format) -> None:
        self.path, self.form, self.count = path, form, 0
        self._part = path.with_name(f"{path.name}.part")
        self._file: BinaryIO = self._part.open("wb")
        self._file.write(header(form, 0))

    def write(self, tokens: np.ndarray) -> None:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(self.form.dtype).max:
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} in a file of {self.form.dtype}")
        self._file.write(tokens.astype(self.form.dtype, copy=False).data)
        self.count += tokens.size

    def close(self) -> None:
        with self._file as file:
            file.seek(0)
            file.write(header(self.form, self.count))
            file.flush()
            os.fsync(file.fileno())
        self._part.replace(self.path)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a failure to flush doesn't matter here
            self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink()


def write(path: Path, tokens: np.ndarray, form: Format) -> None:
    """Writes a token file atomically: whole or not at all. Raises as `Writer`."""
    writer = Writer(path, form)
    try:
        writer.write(tokens)
        writer.close()
    except BaseException:
        writer.discard()
        raise
