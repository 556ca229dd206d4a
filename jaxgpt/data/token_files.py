"""llm.c's token files: a header of 256 int32 and then the tokens, little-endian.

    magic       version   tokens
    20240520    1         uint16    GPT-2's, and any vocabulary of up to 65,536 tokens
    20240801    7         uint32    Llama 3's, and any larger vocabulary

The header's third number is the count of tokens. 32 bits don't hold more than 4,294,967,295 of them, so the count is
taken from the file's size, and the header has to agree with its low 32 bits: a file that was cut off never does.
"""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxgpt.errors import UserError

HEADER_BYTES = 1024


class Format(NamedTuple):
    magic: int
    version: int
    dtype: np.dtype


GPT2 = Format(20240520, 1, np.dtype("<u2"))
LLAMA3 = Format(20240801, 7, np.dtype("<u4"))
FORMATS = {form.magic: form for form in (GPT2, LLAMA3)}


def format_for(vocabulary_size: int) -> Format:
    """The narrower format that holds every token."""
    return GPT2 if vocabulary_size <= 1 << 16 else LLAMA3


def open(path: Path | str) -> np.ndarray:
    """The tokens of a file, 1-D, uint16 or uint32, as a read-only memory map: nothing is read but the header.

    UserError where the file can't be read, is no token file, or has not the size that its header says.
    """
    path = Path(path)
    try:
        size, header = _size_and_header(path)
        form, count = _check(path, size, header)
        return np.memmap(path, form.dtype, "r", offset=HEADER_BYTES, shape=(count,))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path, or what shrank since it was checked
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the token file {path}: {reason}") from None


def refuse_special(path: Path) -> None:
    """UserError for a pipe or a device, which may never end. OSError, ValueError where the path can't be looked at."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, where a file is expected")


def _size_and_header(path: Path) -> tuple[int, bytes]:
    refuse_special(path)
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size, file.read(HEADER_BYTES)


def _check(path: Path, size: int, header: bytes) -> tuple[Format, int]:
    """The format, and the count of the tokens that are really there."""
    if len(header) < HEADER_BYTES:
        raise UserError(
            f"{path} is no token file: it ends at byte offset {len(header)}, within the header of {HEADER_BYTES} bytes"
        )
    magic, version, stated = (int(number) for number in np.frombuffer(header, "<u4", 3))
    form = FORMATS.get(magic)
    if form is None:
        raise UserError(
            f"{path} is no token file: the magic number at byte offset 0 is {magic}, and should be {GPT2.magic} "
            f"(uint16) or {LLAMA3.magic} (uint32)"
        )
    if version != form.version:
        raise UserError(
            f"{path}: the version at byte offset 4 is {version}, and token files of magic number {magic} have version "
            f"{form.version}: it was written by another program, or is damaged"
        )
    count, rest = divmod(size - HEADER_BYTES, form.dtype.itemsize)
    if rest or count & 0xFFFFFFFF != stated:
        raise UserError(
            f"{path} is damaged: its header promises {stated:,} tokens, that is {_bytes(form, stated):,} bytes, and it "
            f"has {size:,}; restore it from a copy, or prepare it anew"
        )
    if not count:
        raise UserError(f"{path} has no tokens")
    return form, count


def _bytes(form: Format, count: int) -> int:
    return HEADER_BYTES + count * form.dtype.itemsize


def header(form: Format, count: int) -> bytes:
    """The first 1024 bytes of a file of `count` tokens."""
    numbers = np.zeros(HEADER_BYTES // 4, "<u4")
    numbers[:3] = form.magic, form.version, count & 0xFFFFFFFF
    return numbers.tobytes()


class Writer:
    """A token file that grows by `write`; it is there, whole, after `close`, and not at all after `discard`.

    Until then it has the name `path`.part. OSError as the disk raises it; ValueError for tokens that don't fit.
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
        with contextlib.suppress(OSError):  # what can't be written any more need not be
            self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink()


def write(path: Path, tokens: np.ndarray, form: Format) -> None:
    """A whole file at once, or none."""
    writer = Writer(path, form)
    try:
        writer.write(tokens)
        writer.close()
    except BaseException:
        writer.discard()
        raise
