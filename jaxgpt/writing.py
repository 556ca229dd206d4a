"""Writing files and folders that are on the disk whole, under their name, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.errors import RunError, UserError


def check_free(path: Path, *, overwrite: bool) -> None:
    """UserError where something is there that is not to be replaced, or is not of our making."""
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise UserError(f"{path} exists and is left as it is. Give another name, or replace it with --overwrite")
    if path.is_symlink():
        raise UserError(f"{path} is a link, and is not replaced. Give another name")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "config.toml")):
        raise UserError(f"{path} is a folder without a model (config.json or config.toml), and is not replaced")


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields where to write; when the block ends the file is on the disk under its name, and if it fails there is none.

    UserError as `check_free` raises it, RunError where writing fails.
    """
    check_free(path, overwrite=overwrite)
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a file is to be written. Give another name")
    temporary = _beside(path, "new")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The same for a folder, which is there and empty when it is yielded."""
    check_free(path, overwrite=overwrite)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, where a folder is to be written. Give another name")
    new, old = _beside(path, "new"), _beside(path, "old")
    with _writing(path):
        try:
            new.mkdir(parents=True)
            yield new
            for file in [*new.rglob("*"), new]:
                _sync(file)
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file that takes its place when the block ends, and is then on the disk.

    What was there stays until then, and stays if the block fails. A link is replaced, and not followed. OSError where
    writing fails.
    """
    temporary = _beside(path, "new")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path, word: str) -> Path:
    path = path.absolute()  # "." has no name
    return path.with_name(f".{path.name}.{word}-{os.getpid()}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: writing failed ({error.strerror or error}). Is the disk full?") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
