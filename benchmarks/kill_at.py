"""A process that ends itself with SIGKILL just before its n-th operation on the files of a folder.

Python tells audit hooks of each file that it opens, renames or deletes; flushing is counted too. What orbax's C++ code
writes lies between two of these.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def arm(number: int, folder: Path) -> Callable[[], int]:
    """Kills this process before operation `number`, counted from 1. Returns how many there have been."""
    counter, lock, seen = itertools.count(1), threading.Lock(), 0

    def count() -> None:
        nonlocal seen
        with lock:
            seen = next(counter)
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and _writes(event, arguments) and _is_in(arguments, folder):
            count()

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    fsync = os.fsync
    os.fsync = counted_fsync
    sys.addaudithook(hook)
    return lambda: seen


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _is_in(arguments: tuple[Any, ...], folder: Path) -> bool:
    """Returns whether an operation concerns the folder; deleting a tree gives names that are relative to its
    folders."""
    name = arguments[0]
    return isinstance(name, str | os.PathLike) and (not os.path.isabs(name) or Path(name).is_relative_to(folder))


def run(number: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
    """Does the work, and is killed during it."""
    arm(number, folder)
    work(*arguments)
