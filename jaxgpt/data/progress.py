"""The progress of `prepare`: saved in progress.json for the next start, and shown in a bar for people."""

import errno
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxgpt import files
from jaxgpt.data import manifest
from jaxgpt.data.documents import Chunk, Position
from jaxgpt.data.manifest import Shard
from jaxgpt.errors import RunError, UserError, reason
from jaxgpt.foreign_text import printable, quoted, shown

NAME = "progress.json"
PLAIN_SECONDS = 30  # between two lines, where there is no terminal


class State(NamedTuple):
    """State of `prepare` at the end of a token file."""

    tokenizer: dict[str, Any] | None = None
    part: int = 0  # number of the part that is being read
    position: Position = Position()  # of the piece in which the next token file begins
    tokens: int = 0  # of that piece that are in earlier token files
    documents: int = 0  # documents that began before that piece
    empty: int = 0  # rows without text before that piece
    bad: int = 0  # bad rows before that piece
    validation_tokens: int = 0
    shards: tuple[Shard, ...] = ()


def failure(folder: Path, error: OSError, then: str) -> RunError:
    """Returns the error for a folder that can't be prepared; `then` says what the same command does afterwards."""
    advice = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend what that says"
    return RunError(f"{shown(folder)}: preparing failed ({shown(reason(error))}). {advice}; the same command {then}")


def save(folder: Path, made_from: dict[str, Any], state: State) -> None:
    """Saves the state, with everything that the output depends on, for the next start."""
    shards = [shard.__dict__ for shard in state.shards]
    manifest.write_json(folder / NAME, {"made_from": made_from} | state._asdict() | {"shards": shards})


def load(folder: Path, made_from: dict[str, Any]) -> State:
    """Returns the state that an earlier start saved, or the initial state where there is none.

    One that was made from something else and came no further than the text for validation is begun anew: a file that
    couldn't be read may have ended it, and was mended since.

    UserError where it is damaged, was made from something else than `made_from`, or its token files have changed.
    """
    path = folder / NAME
    if not path.exists():
        if any(folder.glob("*.bin")):
            raise UserError(f"{shown(folder)} has token files, and no {NAME} to go on from: name another --output")
        return State()
    saved = files.read_json(path, manifest.LARGEST_BYTES, folder)
    made_from = json.loads(json.dumps(made_from))  # as it was saved: lists for tuples
    try:
        before, shards = dict(saved["made_from"]), tuple(manifest.shard(path, entry) for entry in saved["shards"])
        if before != made_from and not any(shard.split == "train" for shard in shards):
            for shard in shards:
                _delete(folder, shard)
            return State()
        if before.get("pieces") != made_from["pieces"]:
            raise UserError(f"{shown(folder)} was begun by another version of jaxgpt: delete the folder and begin anew")
        file, offset, begins = saved["position"]
        position = Position(int(file), int(offset), bool(begins))
        counts = ("part", "tokens", "documents", "empty", "bad", "validation_tokens")
        state = State(
            saved["tokenizer"], position=position, shards=shards, **{name: int(saved[name]) for name in counts}
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{shown(path)} is damaged: delete the folder and begin anew") from None
    for key, value in made_from.items():
        if before.get(key) != value:
            raise UserError(
                f"{shown(folder)} was begun with other {key}: {_difference(before.get(key), value)}. Give the old "
                "ones, name another --output, or delete the folder"
            )
    for shard in shards:
        file = folder / shard.file
        if not files.is_file(file, folder) or files.size(file, folder) != shard.bytes:
            raise _changed(file)
    return state


def _delete(folder: Path, shard: Shard) -> None:
    """Deletes a token file that is as it was written; one that isn't, which the state may name wrongly, is kept."""
    file = folder / shard.file
    if not files.is_file(file, folder) or manifest.describe(file, shard.split) != shard:
        raise _changed(file)
    file.unlink()


def _changed(file: Path) -> UserError:
    return UserError(f"{shown(file)} is not as it was written: delete the folder {shown(file.parent)} and begin anew")


def _difference(before: Any, now: Any) -> str:
    """Describes the difference of two JSON values in few words."""
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in now if before.get(key) != now[key]]
        return ", ".join(f"{key} {quoted(before.get(key))}, now {quoted(now[key])}" for key in changed)
    if isinstance(before, list) and isinstance(now, list):
        changed = ((old, new) for old, new in zip(before, now, strict=False) if old != new)
        old, new = next(changed, (len(before), len(now)))
        return f"{shown(str(old))}, now {shown(str(new))}"
    return f"{quoted(before)}, now {quoted(now)}"


class Bar:
    """Shows how much of the input was read: in a live bar on a terminal, else in a line now and then."""

    def __init__(self, size: int) -> None:
        console = Console(highlight=False, markup=False, stderr=True)
        self._live = console.is_terminal
        self._console, self._size, self._printed, self._begun = console, size, time.monotonic(), time.monotonic()
        self._before = 0  # bytes of the finished files, also of those that an earlier start has read
        columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        said = TextColumn("{task.description}", markup=False)
        self._progress = Progress(said, BarColumn(30), *columns, console=console, disable=not self._live)
        self._task = self._progress.add_task("", total=size)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(printable(line), markup=False, soft_wrap=True)

    def begin(self, what: str) -> None:
        """Restarts the bar at 0, for the work that `what` describes."""
        self._what, self._before, self._begun = printable(what), 0, time.monotonic()
        self._progress.reset(self._task, description=self._what)

    def skip(self, size: int) -> None:
        """Counts bytes that an earlier start has read."""
        self._before += size
        self._show(0)

    def watch(self, items: Iterable[Chunk], size: int) -> Iterator[Chunk]:
        """Yields the pieces of a file of `size` bytes, and shows how far it was read."""
        for piece in items:
            yield piece
            self._show(piece.read)
        self._before += size

    def _show(self, read: int) -> None:
        done = self._before + read
        self._progress.update(self._task, completed=done)
        now = time.monotonic()
        if not self._live and now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            left = (now - self._begun) * (self._size - done) / done if done else 0
            self._console.print(f"{self._what}: {done / max(self._size, 1):.1%}, {left / 60:.1f} minutes left")
