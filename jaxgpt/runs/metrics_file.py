"""A run's metrics.jsonl: one JSON object a line, each with its step.

Lines are only added at the end while the run trains. When it is resumed the file is written anew, without what came
after the checkpoint.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxgpt import files, writing
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import parse_json

NAME = "metrics.jsonl"
DAMAGED = "metrics.damaged"  # lines that could not be read
LONGEST = 1 << 20  # bytes of a line: ours have hundreds
TRAINING = "is training this run"
_LATER = re.compile(rb"--- step [1-9]")
EVALUATE = "evaluate"  # marks the lines that `run.py evaluate` has added


def line(values: dict[str, Any]) -> bytes:
    """Returns a line of the file. NaN and infinity, which JSON hasn't got, become null."""
    lost = {key: None for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return (json.dumps(values | lost) + "\n").encode()


def parse(text: bytes) -> dict[str, Any] | None:
    """Returns a line's object; None where the line was not written to its end, or isn't an object with a step."""
    try:
        values = parse_json(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return values if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a metrics.jsonl; lines that can't be read are passed over."""
    with files.open_file(path, within=path.parent) as file:
        return [values for text in _lines(file) if (values := parse(text)) is not None]


def is_untrained(path: Path) -> bool:
    """Returns whether no training step was recorded."""
    if not files.exists(path):
        return True
    with files.open_file(path, within=path.parent) as file:
        return not any(b'"loss":' in text for text in _lines(file))


def has_no_later_text(path: Path) -> bool:
    """Returns whether a samples.txt has no text of a step after the first."""
    if not files.exists(path):
        return True
    with files.open_file(path, within=path.parent) as file:
        return not any(_LATER.match(text) for text in _lines(file))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields a file's lines; one that is longer than `LONGEST` comes in parts, which can't be read."""
    return iter(lambda: file.readline(LONGEST), b"")


def cut_back(path: Path, length: int, step: int) -> list[str]:
    """Cuts a metrics.jsonl, if there is one, back to its `length` in bytes when the state after `step` was saved.

    Evaluations of steps up to `step` that were added later stay. Lines that can't be read are moved to `DAMAGED`, and
    a message says so. The file is written anew, so that a file that was linked here is left as it is.
    """
    if not files.exists(path):
        return []
    first = count = end = 0
    with (
        files.open_file(path, within=path.parent) as file,
        writing.replacing(path) as new,
        new.open("wb") as kept,
        contextlib.ExitStack() as opened,
    ):
        aside = None
        for number, text in enumerate(_lines(file), 1):
            end += len(text)
            values = parse(text)
            if values is None:
                if end <= length:
                    aside = aside or opened.enter_context(writing.open_to_append(path.with_name(DAMAGED)))
                    aside.write(text if text.endswith(b"\n") else text + b"\n")
                    first, count = first or number, count + 1
            elif values["step"] <= step and (end <= length or values.get("by") == EVALUATE):
                kept.write(text)
        if aside:  # on the disk before the lines are gone from here
            aside.flush()
            os.fsync(aside.fileno())
    if count > 1:
        lines, they = f"{count:,} lines, the first of them line {first:,},", "they are"
    else:
        lines, they = f"line {first:,}", "it is"
    return [f"{path}: {lines} can't be read; {they} put aside into {DAMAGED}"] if count else []


def cut_text(path: Path, length: int) -> None:
    """Cuts a file to its first `length` bytes by writing it anew; does nothing where there is none."""
    if not files.exists(path):
        return
    with files.open_file(path, within=path.parent) as file, writing.replacing(path) as new, new.open("wb") as kept:
        shutil.copyfileobj(file, kept)
        kept.truncate(min(length, kept.tell()))


def add_evaluation(run: Path, values: dict[str, Any]) -> str:
    """Appends an evaluation to the metrics.jsonl of a run that isn't open here; returns why not, empty if it was."""
    path = run / NAME
    try:
        with writing.lock(run, TRAINING), writing.open_to_append(path) as file:
            separator = b"" if _ends_a_line(path) else b"\n"  # after a line that a killed run has left half written
            file.write(separator + line(values | {"by": EVALUATE}))
    except UserError:
        return f"{path}: not added there, because the run is being trained"
    except OSError as error:
        return f"{path}: not added there ({error.strerror})"
    return ""


def _ends_a_line(path: Path) -> bool:
    with files.open_file(path, within=path.parent) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1))
        return file.read() in (b"", b"\n")
