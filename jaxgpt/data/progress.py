"""How far `prepare` has come: for the next start in progress.json, and for people in a bar."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxgpt.data import manifest
from jaxgpt.data.manifest import Shard
from jaxgpt.data.pieces import Piece, Position
from jaxgpt.errors import UserError

NAME = "progress.json"
PLAIN_SECONDS = 30  # between lines, where there is no terminal


class State(NamedTuple):
    """As of the end of a shard."""

    tokenizer: dict[str, Any] | None = None
    part: int = 0  # of the input that is being read
    position: Position = Position()  # of the piece in which the next shard begins
    tokens: int = 0  # of that piece, which are in earlier shards
    documents: int = 0  # that began before that piece
    shards: tuple[Shard, ...] = ()


def save(folder: Path, made_from: dict[str, Any], state: State) -> None:
    shards = [shard.__dict__ for shard in state.shards]
    manifest.write_json(folder / NAME, {"made_from": made_from} | state._asdict() | {"shards": shards})


def load(folder: Path, made_from: dict[str, Any]) -> State:
    """The state that an earlier start left; the first where there is none.

    UserError where it was left by a command with other options or other files, and where its shards have changed.
    """
    path = folder / NAME
    if not path.exists():
        if any(folder.glob("*.bin")):
            raise UserError(f"{folder} has token files, and no {NAME} to go on from: name another --output")
        return State()
    saved = manifest.read_json(path)
    try:
        made_from = json.loads(json.dumps(made_from))  # as it was saved: lists for tuples
        before, tokenizer, part = saved["made_from"], saved["tokenizer"], int(saved["part"])
        file, offset, begins = saved["position"]
        position = Position(int(file), int(offset), bool(begins))
        tokens, documents = int(saved["tokens"]), int(saved["documents"])
        shards = tuple(manifest.shard(path, entry) for entry in saved["shards"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: delete the folder and begin anew") from None
    for key, value in made_from.items():
        if before.get(key) != value:
            raise UserError(
                f"{folder} was begun with other {key}: {_difference(before.get(key), value)}. Give the old ones, name "
                "another --output, or delete the folder"
            )
    for shard in shards:
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise UserError(f"{file} is not as it was written: delete the folder {folder} and begin anew")
    return State(tokenizer, part, position, tokens, documents, shards)


def _difference(before: Any, now: Any) -> str:
    """What differs, in few words."""
    if isinstance(before, dict) and isinstance(now, dict):
        return ", ".join(f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key])
    if isinstance(before, list) and isinstance(now, list):
        pairs = zip(before, now, strict=False)
        return next((f"{old}, now {new}" for old, new in pairs if old != new), f"{len(before)}, now {len(now)}")
    return f"{before!r}, now {now!r}"


def delete(folder: Path) -> None:
    (folder / NAME).unlink()


class Bar:
    """Bytes read of all there are: a live bar on a terminal, else a line now and then."""

    def __init__(self, size: int) -> None:
        console = Console(highlight=False, stderr=True)
        self._live = console.is_terminal
        self._console, self._size, self._printed, self._begun = console, size, time.monotonic(), time.monotonic()
        self._before = 0  # of the files that are done, and what an earlier start has read
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=size)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Starts at nothing."""
        self._what, self._before, self._begun = what, 0, time.monotonic()
        self._progress.reset(self._task, description=what)

    def skip(self, size: int) -> None:
        """So many bytes were read earlier."""
        self._before += size
        self._show(0)

    def watch(self, items: Iterable[Piece], size: int) -> Iterator[Piece]:
        """The same pieces, of a file with so many bytes."""
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
