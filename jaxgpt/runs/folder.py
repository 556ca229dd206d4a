"""A run's folder: the only place a run writes to.

config.toml      everything needed to repeat the run
start.txt        what is trained, with what memory, and where
metrics.jsonl    one object a line: training metrics by step, validation losses
memory_plan.json what the train step needs, by name
samples.txt      text drawn from the model
best.json        the checkpoint of the lowest validation loss, where it is kept
metrics.damaged  lines of metrics.jsonl that could not be read when the run was resumed
loss.png         the loss curve
machine.json     the machine that the run trains on
gradcheck.json   what `gradcheck --as-run` found of its gradients
report.html      a page that shows all of this
checkpoints/     by orbax
"""

import contextlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxgpt import files, writing
from jaxgpt.errors import RunError, UserError, reason
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes
from jaxgpt.runs import best, checkpoints, metrics_file, verdict

CONFIGURATION = "config.toml"
SAMPLES = "samples.txt"
START = "start.txt"
CURVE = "loss.png"
GROWING = (metrics_file.NAME, SAMPLES)  # cut back when the run is resumed
OURS = (CONFIGURATION, *GROWING, "memory_plan.json", "machine.json", START, CURVE, best.NAME)  # by the open run alone
WRITTEN = {
    *OURS,
    metrics_file.DAMAGED,
    verdict.NAME,
    "report.html",
    "checkpoints",
    "tensorboard",
    "wandb",
    "wandb_id.txt",
}

EXISTS = (
    "{} exists and is left as it is. Go on with it by --resume, give the run another name with --run.name, or replace "
    "the old one with --run.overwrite"
)
NOTHING_TO_RESUME = "{}: there is no checkpoint to resume from. --resume auto begins anew where there is none"


def check_name(config: Config) -> None:
    """Raises a UserError for a name that `RunFolder` is sure to refuse, before anybody waits for a compilation."""
    path = Path(config.run.folder) / config.run.name
    with contextlib.suppress(OSError, ValueError):  # RunFolder reports them
        if config.run.resume == "always" and not will_resume(config):
            raise UserError(NOTHING_TO_RESUME.format(path))
        if config.run.resume == "never" and not config.run.overwrite and checkpoints.steps_of(path / "checkpoints"):
            raise UserError(EXISTS.format(path))


def named(config: Config, name: str) -> Config:
    """Returns the configuration of a run for which its user has chosen no name: `name`, or name-2, name-3, ...

    A new run takes the first of them that no other run has. All processes have to call it together.
    """
    name = re.sub(r"[^\w.-]+", "_", name).strip("._-") or "run"
    if config.run.resume == "never" and not config.run.overwrite:
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        name = processes.talk.broadcast(lambda: next(free for free in names if _is_free(config, free)))
    return settings.changed(config, run={"name": name})


def _is_free(config: Config, name: str) -> bool:
    """Returns whether a new run may have this name: there is nothing, or a run of which nothing would be lost."""
    path = Path(config.run.folder) / name
    if not os.path.lexists(path):
        return True
    with contextlib.suppress(OSError, UserError), writing.lock(path, metrics_file.TRAINING):
        return (path / CONFIGURATION).is_file() and _is_untrained(path)
    return False


def will_resume(config: Config) -> bool:
    """Returns whether a run of this name has checkpoints and `run.resume` asks to resume it."""
    folder = Path(config.run.folder) / config.run.name / "checkpoints"
    return config.run.resume != "never" and bool(checkpoints.steps_of(folder))


def _is_untrained(path: Path) -> bool:
    """Returns whether nothing would be lost of a run: no step has left a trace, and there is no checkpoint."""
    return (
        metrics_file.is_untrained(path / metrics_file.NAME)
        and metrics_file.has_no_later_text(path / SAMPLES)
        and not files.exists(path / CURVE)
        and not checkpoints.steps_of(path / "checkpoints")
    )


class RunFolder:
    """An open run folder: a new one or, with `run.resume`, one that has checkpoints, left unchanged until `go_on`.

    Everything is written into the folder itself: no link that lies in it is followed. UserError where the folder can't
    be made or opened, it exists and may not be replaced, another process trains in it, or there is nothing to resume
    where there should be.
    """

    def __init__(self, config: Config):
        self.config = config  # as asked for: what each machine decides for itself is left open
        self.path = Path(config.run.folder) / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self.notes: list[str] = []  # lines to print at the start
        self._lock = writing.Lock()
        self._file: BinaryIO = io.BytesIO()  # metrics.jsonl, once it is open
        try:
            self._take()
            if not self.resumes:
                if config.run.resume == "always":
                    raise UserError(NOTHING_TO_RESUME.format(self.path))
                with writing.reserved(self.path):
                    self._take()  # another process may have made it meanwhile
                    if not self.resumes:
                        self._check_replaceable()
                        if reason := self._kept_for():
                            self._keep(f"{self.path}: {reason}")
                        self._make()
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            self._lock.close()
            raise _cannot_write(self.path, error) from None
        except BaseException:
            self._lock.close()
            raise

    def _take(self) -> None:
        """Locks the folder if it exists, and decides whether it is resumed."""
        if not self._lock.held and self.path.exists():
            self._lock = writing.lock(self.path, metrics_file.TRAINING)
        self.resumes = will_resume(self.config)
        if self.resumes:
            writing.check_no_link(self.checkpoints)

    def _make(self) -> None:
        """Makes a new folder, in the place of the old one if there is one. The name must be reserved."""
        with writing.replacing_folder(self.path) as new:
            settings.write(self.config, new / CONFIGURATION)
            self._file = writing.open_to_append(new / metrics_file.NAME)
            lock = writing.lock(new, metrics_file.TRAINING)
        self._lock.close()
        self._lock = lock

    def _check_replaceable(self) -> None:
        """Raises a UserError, or an OSError for a link, where something exists that may not be replaced."""
        if not self.path.exists():
            return
        options = self.config.run
        ours = (self.path / CONFIGURATION).is_file()
        if not (options.overwrite or (ours and (options.resume == "auto" or _is_untrained(self.path)))):
            raise UserError(EXISTS.format(self.path))
        if not ours:
            raise UserError(f"{self.path} is not a run's folder (it has no config.toml), so it is not replaced")
        writing.check_no_link(self.path)

    def _kept_for(self) -> str:
        """Returns why the folder may not be deleted though another takes its name; empty where it may be."""
        if self.config.run.overwrite or not self.path.is_dir():
            return ""
        if not _is_untrained(self.path):
            return "it was trained, and has no checkpoint to resume from"
        others = self._others()
        return f"no run writes {shown(others[0])}, so it isn't deleted" if others else ""

    def _others(self) -> list[str]:
        """Returns what lies in the folder and no run has written."""
        left = re.compile(rf"\.({'|'.join(map(re.escape, OURS))})\.(new|old)-[0-9a-f]+")
        names = {path.name for path in self.path.iterdir() if not left.fullmatch(path.name)} - WRITTEN
        kept = set(files.names(self.checkpoints)) - {path.name for path in checkpoints.unfinished(self.checkpoints)}
        return sorted(names) + sorted(f"checkpoints/{name}" for name in kept)

    def start_over(self, why: str) -> None:
        """Begins anew where nothing can be resumed, for a reason to print, and keeps the folder under another name."""
        try:
            with writing.reserved(self.path):
                writing.check_no_link(self.path)
                self._keep(why)
                self._make()
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self.resumes = False

    def _keep(self, why: str) -> None:
        """Renames the folder to a free name, and notes that with the reason `why`. The name must be reserved."""
        names = (self.path.with_name(f"{self.path.name}.damaged-{number}") for number in itertools.count(1))
        kept = next(path for path in names if not os.path.lexists(path))
        self.path.rename(kept)
        self.notes = [f"{why}. This run is kept as {kept}, and begins anew"]

    def go_on(self, config: Config, step: int, lengths: dict[str, Any]) -> list[str]:
        """Cuts the growing files back to their lengths when the state after `step` was saved, and opens them.

        The options that are asked for now become config.toml. Of the `lengths` in bytes, as the checkpoint states them,
        names that aren't in `GROWING` are ignored: a checkpoint doesn't decide which files are cut. Returns messages on
        damaged lines.
        """
        for name in GROWING:
            length = lengths.get(name)
            if type(length) is not int or length < 0:
                raise UserError(f"the checkpoint says that {name} had {quoted(length)} bytes. Restore it from a copy")
        lines, texts = (lengths[name] for name in GROWING)
        try:
            for name in OURS:
                writing.clear(self.path / name)
            damaged = metrics_file.cut_back(self.path / metrics_file.NAME, lines, step)
            metrics_file.cut_text(self.path / SAMPLES, texts)
            with self.replacing(CONFIGURATION) as path:
                settings.write(config, path)
            self._file = writing.open_to_append(self.path / metrics_file.NAME)
            writing.sync(self.path)
        except (OSError, ValueError) as error:
            raise _cannot_write(self.path, error) from None
        return damaged

    def lengths(self) -> dict[str, int]:
        """Returns the bytes of metrics.jsonl and samples.txt by name, all of them on the disk."""
        result = {}
        for name in GROWING:
            with self.writing(name) as path:
                if path.exists():
                    writing.sync(path)
                result[name] = path.stat().st_size if path.exists() else 0
        with self.writing(""):
            writing.sync(self.path)
        return result

    def metric(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl, which readers see at once. Numbers that are not finite become null."""
        with self.writing(metrics_file.NAME) as path:
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                self._file.close()  # an editor has put another file in its place
                self._file = writing.open_to_append(path)
            self._file.write(metrics_file.line(values))
            self._file.flush()

    def sample(self, step: int, text: str) -> None:
        """Appends a text to samples.txt."""
        with self.writing(SAMPLES) as path, writing.open_to_append(path) as file:
            file.write(f"--- step {step}\n{text}\n\n".encode())

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes a JSON file of one object."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file."""
        with self.replacing(name) as path:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yields a temporary path, whose file takes the place of one in the folder when the block ends."""
        with self.writing(name) as path, writing.replacing(path) as new:
            yield new

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a file's path. RunError where writing fails: a full disk, a folder that is gone."""
        path = self.path / name
        try:
            yield path
        except FileNotFoundError:
            gone = self.path / metrics_file.NAME if self.path.exists() else self.path
            raise RunError(f"{gone} was deleted or moved while the run trains, so the run stops here") from None
        except OSError as error:
            raise writing.failure(path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been reported
            self._file.close()
        self._lock.close()


class Onlooker(RunFolder):
    """The run folder in every process but the first: it reads checkpoints and writes nothing."""

    def __init__(self, config: Config, resumes: bool):
        self.config, self.resumes, self.notes = config, resumes, []
        self.path = Path(config.run.folder) / config.run.name
        self.checkpoints = self.path / "checkpoints"

    def start_over(self, why: str) -> None:
        self.resumes = False

    def go_on(self, config: Config, step: int, lengths: dict[str, Any]) -> list[str]:
        return []

    def lengths(self) -> dict[str, int]:
        return {}

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    metric = sample = write_json = write_text = close = _nothing


def open_folder(config: Config) -> RunFolder:
    """Opens the run's folder: a `RunFolder` in process 0, an `Onlooker` in the others."""
    folder = RunFolder(config) if processes.first() else None
    resumes = processes.talk.broadcast(lambda: folder and folder.resumes)
    return folder or Onlooker(config, resumes)


def _cannot_write(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: can't write there ({reason(error)}). Choose another folder with --run.folder")
