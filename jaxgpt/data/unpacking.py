"""Files of text: what they are by their first bytes, and their content, unpacked from .gz, .bz2, .xz or .zst."""

import bz2
import contextlib
import gzip
import importlib
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxgpt import files
from jaxgpt.errors import UserError, reason
from jaxgpt.foreign_text import shown

HEAD_BYTES = 1024  # first bytes of a file, by which it is recognised
AT_ONCE = 1 << 16  # bytes that are unpacked at a time
STREAM_BYTES = 1 << 13  # read of a file at a time; small, since the bytes behind each short stream are copied
ZSTD_WINDOW = 31  # logarithm of the largest window that zstd packs with: 2 GiB, with --long=31

# The libraries' errors. zstd's error derives from Exception alone, and is added where that library is loaded.
_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)

_UTF_16 = "UTF-16 text, as Windows writes it; convert it by: iconv -f UTF-16 -t UTF-8 OLD > NEW"
_KINDS = (
    (files.GIT_LFS, "a git-lfs pointer, which stands for a file that is not here yet; fetch it by: git lfs pull"),
    (b"\x1f\x8b", "packed with gzip; give it a name that ends in .gz"),
    (b"BZh", "packed with bzip2; give it a name that ends in .bz2"),
    (b"\xfd7zXZ\0", "packed with xz; give it a name that ends in .xz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; give it a name that ends in .zst"),
    (b"PK\x03\x04", "a ZIP archive, as .docx, .epub and .npz are; unpack it, or export its text"),
    (b"%PDF-", "a PDF; export its text first, for example by: pdftotext OLD.pdf NEW.txt"),
    (b"PAR1", "a Parquet file; give it a name that ends in .parquet"),
    (b"ARROW1", "an Arrow file; write it as Parquet or JSON lines"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program"),
    (b"\xff\xfe\0\0", "UTF-32 text; convert it by: iconv -f UTF-32 -t UTF-8 OLD > NEW"),
    (b"\xff\xfe", _UTF_16),
    (b"\xfe\xff", _UTF_16),
)


def known(head: bytes) -> str:
    """Says in words what a file with these first bytes is, and what to do with it; empty where it may be text."""
    tar = "a tar archive; unpack it, and name the folder" if head[257:262] == b"ustar" else ""
    return next((about for signature, about in _KINDS if head.startswith(signature)), tar)


def check_text(path: Path, head: bytes) -> None:
    """Raises a UserError for a file whose first bytes can't be those of a text."""
    about, packed = known(head), path.suffix.lower()
    if about.endswith(f"ends in {packed}"):
        raise UserError(f"{shown(path)} is packed twice, one {packed} within another; unpack it once")
    if about:
        raise UserError(f"{shown(path)} is {about}")
    if packed == ".bin" and b"\0" in head:
        raise UserError(
            f"{shown(path)} is no text. If it has tokens, as nanoGPT's and llm.c's .bin files have, nothing is to be "
            f"prepared: train on it by --data.text {shown(path)}"
        )
    if head.count(0) * 4 > len(head):
        raise UserError(f"{shown(path)} is no UTF-8 text, for it has many zero bytes: UTF-16 perhaps, or a binary file")


class Reader:
    """Reads a file's unpacked bytes from the beginning on; `offset` is how many of them were read."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self.path, self.offset, self.raw = path, 0, raw
        self._errors = _ERRORS
        match path.suffix.lower():
            case ".gz":
                self._stream: Any = gzip.GzipFile(fileobj=raw)
            case ".bz2":
                self._stream = _Streams(raw, bz2.BZ2Decompressor)
            case ".xz":
                self._stream = _Streams(raw, lzma.LZMADecompressor)
            case ".zst":
                library = extra("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
                window = {library.DecompressionParameter.window_log_max: ZSTD_WINDOW}
                self._stream = library.ZstdFile(raw, options=window)
                self._errors = (*_ERRORS, library.ZstdError)
            case _:
                self._stream = raw

    def read(self, count: int) -> bytes:
        """Returns the next `count` bytes, fewer only at the end. UserError where the file is damaged."""
        parts = []
        while count:
            try:
                part = self._stream.read(min(count, AT_ONCE))  # small reads, so that `offset` is near the damage
            except self._errors as error:
                raise self._damaged(error) from None
            if not part:
                break
            parts.append(part)
            self.offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, count: int) -> None:
        """Passes over `count` bytes."""
        if self._stream is self.raw:
            self.raw.seek(count, 1)
            self.offset += count
            return
        while count and (skipped := len(self.read(min(count, AT_ONCE)))):
            count -= skipped

    def _damaged(self, error: Exception) -> UserError:
        why = shown(reason(error))
        if self._stream is self.raw:
            return UserError(f"cannot read {shown(self.path)} at byte offset {self.offset:,}: {why}")
        where = f"after {self.offset:,} bytes of what is packed in it, before byte {self.raw.tell():,} of the file"
        self.raw.seek(0)
        about = known(self.raw.read(HEAD_BYTES))
        if about and not self.offset and f"ends in {self.path.suffix.lower()}" not in about:
            why += f"; it is {about}"
        return UserError(f"cannot read {shown(self.path)}: damaged {where} ({why}). Restore it from a copy")


class _Streams:
    """Unpacks a file of several streams in a row, as parallel packers write it.

    bz2.BZ2File and lzma.LZMAFile can't be used: they end without an error before a stream whose beginning is damaged.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._new, self._stream, self._rest = raw, new, new(), b""

    def read(self, count: int) -> bytes:
        """Returns up to `count` bytes, none only at the end. For damage it raises the library's errors, and EOFError.

        Zeros behind a stream are passed over: tapes have them, and xz pads to a multiple of four bytes.
        """
        while True:
            if self._stream.eof:
                self._rest = (self._stream.unused_data or self._rest).lstrip(b"\0")
                while not self._rest and (data := self._raw.read(STREAM_BYTES)):
                    self._rest = data.lstrip(b"\0")
                if not self._rest:
                    return b""
                self._stream = self._new()
            if not self._rest and self._stream.needs_input:
                self._rest = self._raw.read(STREAM_BYTES)
                if not self._rest:
                    raise EOFError("the file ends before what is packed in it does")
            data, self._rest = self._stream.decompress(self._rest, count), b""
            if data:
                return data


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Opens a file and yields its reader. UserError as `files.open_file`, and where a package is missing."""
    with files.open_file(path) as raw:
        yield Reader(path, raw)


def extra(module: str) -> Any:
    """Returns a module of the extra `data`. UserError where it isn't installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs the package {module}, of the extra `data`: make env EXTRAS=data") from None
