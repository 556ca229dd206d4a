"""Recognises files that are neither text nor tokens, but are often given for them, by their first bytes."""

from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown

HEAD_BYTES = 1024  # first bytes of a file, by which it is recognised

GIT_LFS = b"version https://git-lfs.github.com/spec/"
_UTF_16 = "UTF-16 text, as Windows writes it; convert it by: iconv -f UTF-16 -t UTF-8 OLD > NEW"
_KINDS = (
    (GIT_LFS, "a git-lfs pointer, which stands for a file that is not here yet; fetch it by: git lfs pull"),
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
    for signature, about in _KINDS:
        if head.startswith(signature):
            return about
    return "a tar archive; unpack it, and name the folder" if head[257:262] == b"ustar" else ""


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
