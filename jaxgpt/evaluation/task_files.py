"""The tasks' files, from a path or downloaded by the task's name, and llm.c's files of tokens.

FILE.jsonl      an object a line. Where the right choices are apart, as PIQA's and WinoGrande's are, in
                FILE-labels.lst beside it, one a line
SUBJECT_test.csv, or a folder of them: MMLU as its authors published it, without a header: the question, four
                choices, a letter
FILE.parquet    as on the Hugging Face hub
FILE.bin        llm.c's, such as hellaswag_val.bin. Little-endian. 256 int32: 20240522, version 1, the number of
                examples, the bytes of the longest one; then uint16, each example: 65535, its own bytes, its index, the
                right choice, the number of choices, n and n tokens of context, and of each choice n and n tokens
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxgpt import files, foreign_text, writing
from jaxgpt.data import parquet
from jaxgpt.errors import UserError, one_line
from jaxgpt.evaluation.tasks import TASKS, Malformed, Question, Row
from jaxgpt.foreign_text import shown as written

CONVERTED = "refs/convert/parquet"  # the revision where the hub keeps every data set as Parquet
MMLU_FIELDS = 6
LARGEST_BYTES = 1 << 28  # of a task's file
RESTORE = "Restore the file from where it came"
Read = TypeVar("Read")

# llm.c's files
MAGIC, VERSION = 20240522, 1
HEADER_BYTES = 1024
LARGEST_LLMC = 1 << 30
START = 65535
HEADING = 5  # numbers before an example's context
WHAT_TO_DO = "Make the file anew, or restore it from a copy"


def questions(task: str, path: str, shots: int = 0) -> list[Question]:
    """Returns all of a multiple-choice task's questions, from a file or with an empty path from the hub.

    Before each come so many answered questions of MMLU, from its development split. UserError where there is no such
    file, or it isn't as it should be.
    """
    if shots and task != "mmlu":
        raise UserError(f"--shots {shots}: of the multiple-choice tasks only mmlu has questions to show before another")
    where = Path(path) if path else _downloaded(task, TASKS[task].part)
    found, called = [], written(where)
    shown = _development(where, path, shots) if shots else {}
    for number, row in enumerate(_rows(where), 1):
        try:
            if shots:
                row = {**row, "shown": _shown(row, shown, shots)}
            found.append(TASKS[task].question(row))
        except Malformed as error:
            raise _unlike(task, f"{called}: example {number}: {written(error)}") from None
    if not found:
        raise UserError(f"{called}: there are no examples in it. {RESTORE}")
    if not path and len(found) != TASKS[task].examples:
        raise UserError(
            f"{called}: downloaded, and of {len(found):,} examples, where the task {task} has "
            f"{TASKS[task].examples:,}. Delete it, and it is downloaded again; or name a file"
        )
    return found


def _development(where: Path, path: str, shots: int) -> dict[str, list[Row]]:
    """Returns the development split's rows by their subject."""
    if not path:
        folder = _downloaded("mmlu", "all/dev")
    elif where.is_dir() and where.with_name("dev").is_dir():
        folder = where.with_name("dev")
    else:
        raise UserError(
            f"--shots {shots}: {written(where)} is not MMLU's folder test, beside which its folder dev has "
            "examples to show. Unpack all of MMLU, and name its folder test"
        )
    found: dict[str, list[Row]] = {}
    for row in _rows(folder):
        found.setdefault(str(row.get("subject")), []).append({**row, "subject": None})
    return found


def _shown(row: Row, development: dict[str, list[Row]], shots: int) -> list[Row]:
    subject = row.get("subject")
    rows = development.get(str(subject), [])
    if len(rows) < shots:
        raise Malformed(f"of its subject, {written(subject)}, there are {len(rows)} examples to show, and not {shots}")
    return rows[:shots]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file, or of all CSV files in a folder."""
    readers = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        found = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    except ValueError:  # a zero byte in the path
        found = [path]
    if not found:
        raise UserError(f"{written(path)}: a folder without CSV files. Name a file")
    for file in found:
        if file.suffix not in readers:
            raise UserError(
                f"{written(file)}: not a kind of file that is read here: {', '.join(readers)}, or llm.c's .bin"
            )
        yield from readers[file.suffix](file)


def _unlike(task: str, what: str) -> UserError:
    return UserError(f"{what}. Is it a file of the task {written(task)}? {RESTORE}")


def json_lines(path: Path, within: Path | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a file of JSON lines, each with its line's number; empty lines are passed over.

    UserError, with file and line, for one that has no object; also for a link out of the folder `within`.
    """
    for number, line in enumerate(files.text_lines(files.read_text(path, LARGEST_BYTES, within)), 1):
        if not line.strip():
            continue
        try:
            row = foreign_text.parse_json(line)
        except ValueError as error:
            raise UserError(f"{written(path)}: line {number} is not JSON ({written(error)}). {RESTORE}") from None
        if not isinstance(row, dict):
            raise UserError(f"{written(path)}: line {number} is not a JSON object. {RESTORE}")
        yield number, row


def read_lines(path: Path, task: str, read: Callable[[dict[str, Any]], Read], within: Path | None = None) -> list[Read]:
    """Returns what `read` makes of each object of a task's file of JSON lines.

    UserError as `json_lines`, where `read` raises Malformed, and for a file without objects.
    """
    found = []
    for number, row in json_lines(path, within):
        try:
            found.append(read(row))
        except Malformed as error:
            raise _unlike(task, f"{written(path)}: line {number}: {written(error)}") from None
    if not found:
        raise UserError(f"{written(path)}: there are no examples in it. {RESTORE}")
    return found


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = [row for _, row in json_lines(path)]
    labels = path.with_name(f"{path.stem}-labels.lst")
    if not os.path.lexists(labels):
        yield from rows
        return
    answers = files.read_text(labels, LARGEST_BYTES).split()
    if len(answers) != len(rows):
        raise UserError(f"{written(labels)}: {len(answers)} labels for {len(rows)} examples. {RESTORE}")
    for row, answer in zip(rows, answers, strict=True):
        yield {"label": answer, "answer": answer, **row}


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    subject = path.stem
    for split in ("_test", "_dev", "_val"):
        subject = subject.removesuffix(split)
    try:
        lines = csv.reader(io.StringIO(files.read_text(path, LARGEST_BYTES), newline=""))
        for number, fields in enumerate(lines, 1):
            if len(fields) != MMLU_FIELDS:
                has = f"row {number} has {len(fields)} fields"
                raise UserError(f"{written(path)}: {has}, and {MMLU_FIELDS} are expected")
            question, *choices, answer = fields
            yield {"question": question, "choices": choices, "answer": answer, "subject": subject}
    except csv.Error as error:
        raise UserError(f"{written(path)}: not CSV ({error}). {RESTORE}") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    read = 0
    for _, batch in parquet.rows(path, None):
        read += batch.nbytes
        if read > LARGEST_BYTES:
            raise UserError(f"{written(path)}: more than the {LARGEST_BYTES:,} bytes that a task may have. {RESTORE}")
        try:
            yield from batch.to_pylist()
        except (ValueError, OverflowError, IndexError) as error:  # not UTF-8, times, indices
            raise UserError(f"{written(path)}: a row can't be read ({written(error)}). {RESTORE}") from None


def _downloaded(task: str, part: str) -> Path:
    """Returns a task's file in the hub's cache, downloaded if it isn't there.

    The hub's client resumes downloads that were broken off. UserError where the file can't be had.
    """
    by_hand = f"Name a file of it with --data: JSON lines, or Parquet of {TASKS[task].repository}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"--task {task} without --data: to download it the package huggingface-hub is needed: make env EXTRAS="
            f"data. {by_hand}"
        ) from None
    try:
        name = f"{part}/0000.parquet"
        return Path(hf_hub_download(TASKS[task].repository, name, repo_type="dataset", revision=CONVERTED))
    except Exception as error:  # of many types: its own, httpx's, the operating system's
        message = one_line(error)
    raise UserError(f"--task {task}: it can't be had from the Hugging Face hub ({message}). {by_hand}")


# llm.c's files


class TokenExample(NamedTuple):
    """Token ids of a question: the context and what may come after it."""

    context: np.ndarray
    completions: tuple[np.ndarray, ...]
    label: int  # the right one


def read_llmc(path: Path) -> list[TokenExample]:
    """Returns all examples. UserError, with the byte, where the file is not what its numbers say."""
    data = files.read_bytes(path, LARGEST_LLMC)
    if len(data) < HEADER_BYTES:
        raise UserError(f"{written(path)}: {len(data)} bytes, and the header alone has {HEADER_BYTES}. {WHAT_TO_DO}")
    magic, version, count, longest = np.frombuffer(data, "<i4", 4).tolist()
    if magic != MAGIC or version != VERSION:
        raise UserError(
            f"{written(path)}: its header begins with {magic}, {version}, and llm.c's multiple-choice files with "
            f"{MAGIC}, {VERSION}. {WHAT_TO_DO}"
        )
    room = len(data) - HEADER_BYTES
    if not (0 <= count <= room // (2 * HEADING) and 0 <= longest <= room) or room % 2:
        raise UserError(
            f"{written(path)}: the header says {count} examples of up to {longest} bytes, which don't fit in the "
            f"{room} bytes after it. {WHAT_TO_DO}"
        )
    stream = np.frombuffer(data, "<u2", offset=HEADER_BYTES)
    place, examples = 0, []
    for index in range(count):
        example, place = _llmc_example(path, stream, place, index, longest)
        examples.append(example)
    if more := 2 * (len(stream) - place):
        raise UserError(f"{written(path)}: {more} bytes more than its {count} examples have. {WHAT_TO_DO}")
    return examples


def _llmc_example(path: Path, stream: np.ndarray, place: int, index: int, longest: int) -> tuple[TokenExample, int]:
    """Returns the example at `place`, and the place after it; places count uint16 numbers."""

    def wrong(what: str, at: int) -> UserError:
        return UserError(f"{written(path)}: example {index} at byte {HEADER_BYTES + 2 * at}: {what}. {WHAT_TO_DO}")

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
    return TokenExample(parts[0], tuple(parts[1:]), label), place


def write_llmc(path: Path, examples: Sequence[TokenExample]) -> None:
    """Writes the examples. UserError for one that the format has no room for, RunError where it can't be written."""
    pieces = []
    for index, example in enumerate(examples):
        parts = [example.context, *example.completions]
        body = np.concatenate([piece for part in parts for piece in ([len(part)], np.asarray(part, np.int64))])
        size = 2 * (HEADING + len(body))
        heading = [START, size, index, example.label, len(example.completions)]
        if not all(map(len, parts)) or max(*heading, *body.tolist()) > START or index == START:
            raise UserError(
                f"{written(path)}: example {index} can't be written: its tokens are to be of GPT-2's vocabulary, none "
                f"of its parts empty, all of it below 64 KiB, and its number below {START}"
            )
        pieces.append(np.concatenate([heading, body]).astype("<u2").tobytes())
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = MAGIC, VERSION, len(pieces), max(map(len, pieces), default=0)
    writing.write(path, header.tobytes() + b"".join(pieces))
