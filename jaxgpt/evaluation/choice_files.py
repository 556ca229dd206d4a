"""Reads and writes llm.c's multiple-choice files, such as hellaswag_val.bin.

Little-endian. 256 int32: 20240522, version 1, the number of examples, the bytes of the longest one; then uint16, each
example:

    65535, its own bytes, its index, the right choice, the number of choices,
    n and n tokens of context, and of each choice n and n tokens
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt import files
from jaxgpt.errors import RunError, UserError
from jaxgpt.foreign_text import shown

MAGIC, VERSION = 20240522, 1
HEADER_BYTES = 1024
LARGEST_BYTES = 1 << 30
START = 65535
HEADING = 5  # numbers before an example's context
WHAT_TO_DO = "Make the file anew, or restore it from a copy"


class Example(NamedTuple):
    """Token ids of a question: the context and what may come after it."""

    context: np.ndarray
    completions: tuple[np.ndarray, ...]
    label: int  # the right one


def read(path: Path) -> list[Example]:
    """Returns all examples. UserError, with the byte, where the file is not what its numbers say."""
    data = files.read_bytes(path, LARGEST_BYTES)
    if len(data) < HEADER_BYTES:
        raise UserError(f"{shown(path)}: {len(data)} bytes, and the header alone has {HEADER_BYTES}. {WHAT_TO_DO}")
    magic, version, count, longest = np.frombuffer(data, "<i4", 4).tolist()
    if magic != MAGIC or version != VERSION:
        raise UserError(
            f"{shown(path)}: its header begins with {magic}, {version}, and llm.c's multiple-choice files with "
            f"{MAGIC}, {VERSION}. {WHAT_TO_DO}"
        )
    room = len(data) - HEADER_BYTES
    if not (0 <= count <= room // (2 * HEADING) and 0 <= longest <= room) or room % 2:
        raise UserError(
            f"{shown(path)}: the header says {count} examples of up to {longest} bytes, which don't fit in the {room} "
            f"bytes after it. {WHAT_TO_DO}"
        )
    stream = np.frombuffer(data, "<u2", offset=HEADER_BYTES)
    place, examples = 0, []
    for index in range(count):
        example, place = _example(path, stream, place, index, longest)
        examples.append(example)
    if place != len(stream):
        raise UserError(
            f"{shown(path)}: {2 * (len(stream) - place)} bytes more than its {count} examples have. {WHAT_TO_DO}"
        )
    return examples


def _example(path: Path, stream: np.ndarray, place: int, index: int, longest: int) -> tuple[Example, int]:
    """Returns the example at `place`, and the place after it; places count uint16 numbers."""

    def wrong(what: str, at: int) -> UserError:
        return UserError(f"{shown(path)}: example {index} at byte {HEADER_BYTES + 2 * at}: {what}. {WHAT_TO_DO}")

    if place + HEADING > len(stream):
        raise wrong("the file ends there", place)
    start, size, own_index, label, choices = stream[place : place + HEADING].tolist()
    if start != START or own_index != index:
        raise wrong(f"it begins with {start} and index {own_index}, where {START} and {index} are expected", place)
    end = place + size // 2
    if size % 2 or size > longest or end > len(stream):
        raise wrong(f"it says that it has {size} bytes, and the longest has {longest}", place + 1)
    if not 0 <= label < choices:
        raise wrong(f"the right choice is number {label}, counted from 0, of {choices}", place + 3)
    parts, place = [], place + HEADING
    for _ in range(1 + choices):
        length = int(stream[place]) if place < end else 0
        if length == 0 or place + 1 + length > end:
            raise wrong(f"{length} tokens, of {max(0, end - place - 1)} that are left in it", place)
        parts.append(stream[place + 1 : place + 1 + length])
        place += 1 + length
    if place != end:
        raise wrong(f"{2 * (end - place)} bytes more than its choices have", place)
    return Example(parts[0], tuple(parts[1:]), label), place


def write(path: Path, examples: Sequence[Example]) -> None:
    """Writes the examples. UserError for one that the format has no room for, RunError where it can't be written."""
    pieces = []
    for index, example in enumerate(examples):
        parts = [example.context, *example.completions]
        body = np.concatenate([piece for part in parts for piece in ([len(part)], np.asarray(part, np.int64))])
        size = 2 * (HEADING + len(body))
        heading = [START, size, index, example.label, len(example.completions)]
        if not all(map(len, parts)) or max(*heading, *body.tolist()) > START or index == START:
            raise UserError(
                f"{shown(path)}: example {index} can't be written: its tokens are to be of GPT-2's vocabulary, none of "
                f"its parts empty, all of it below 64 KiB, and its number below {START}"
            )
        pieces.append(np.concatenate([heading, body]).astype("<u2").tobytes())
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = MAGIC, VERSION, len(pieces), max(map(len, pieces), default=0)
    try:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(header.tobytes() + b"".join(pieces))
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path}: writing failed ({error.strerror})") from error
