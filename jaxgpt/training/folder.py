"""A run's folder: the only place a run writes to.

config.toml      everything needed to repeat the run
metrics.jsonl    one object a line: training metrics by step, validation losses
memory_plan.json what the train step needs, by name
samples.txt      text drawn from the model
loss.png         the loss curve
machine.json     where the run trains
report.html      all of this to look at
checkpoints/     by orbax
"""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxgpt import settings
from jaxgpt.config import Config
from jaxgpt.errors import RunError, UserError
from jaxgpt.parallel import processes
from jaxgpt.training import checkpoints

EVALUATE = "evaluate"  # lines that a command added which was no part of the training


EXISTS = (
    "{} exists and is left as it is. Go on with it by --resume, give the run another name with --run.name, or replace "
    "the old one with --run.overwrite"
)
NOTHING_TO_RESUME = "{}: there is no checkpoint to resume from. --resume auto begins anew where there is none"


def check_name(config: Config) -> None:
    """UserError for a name that `RunFolder` is sure to refuse, so that nobody waits for a compilation to hear of it."""
    path = Path(config.run.folder) / config.run.name
    with contextlib.suppress(OSError, ValueError):  # which RunFolder tells
        if config.run.resume == "always" and not will_resume(config):
            raise UserError(NOTHING_TO_RESUME.format(path))
        if config.run.resume == "never" and not config.run.overwrite and checkpoints.steps_of(path / "checkpoints"):
            raise UserError(EXISTS.format(path))


def will_resume(config: Config) -> bool:
    """Whether a run of this name is there to go on with, and is to be gone on with."""
    folder = Path(config.run.folder) / config.run.name / "checkpoints"
    return config.run.resume != "never" and bool(checkpoints.steps_of(folder))


class RunFolder:
    """An open run folder: a new one, or with `run.resume` one that has checkpoints, which stays as it is until `go_on`.

    UserError where it can't be made or opened, where it exists and is not to be replaced, where another process trains
    in it, and where nothing can be resumed that should be.
    """

    def __init__(self, config: Config):
        self.config = config  # as it was asked for, with what each machine decides for itself left open
        self.path = Path(config.run.folder) / config.run.name
        resume = config.run.resume
        self._lock: int | None = None
        self._file: TextIO = io.StringIO()  # metrics.jsonl, once it is open
        try:
            self.resumes = will_resume(config)
            if resume == "always" and not self.resumes:
                raise UserError(NOTHING_TO_RESUME.format(self.path))
            if self.path.exists():
                self._lock = _locked(self.path)
            if not self.resumes:
                self._make(config)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            self._release()
            raise _cannot_write(self.path, error) from None
        except UserError:
            self._release()
            raise

    def _make(self, config: Config) -> None:
        """A new folder in the place of the old one, if there is one. Killed at any moment, it leaves no half of one."""
        if self.path.exists():
            self._check_replaceable(config)
        new, old = (self.path.with_name(f".{self.path.name}.{word}-{os.getpid()}") for word in ("new", "old"))
        new.mkdir(parents=True)
        settings.write(config, new / "config.toml")
        self._file = (new / "metrics.jsonl").open("w", encoding="utf-8")
        lock = _locked(new)
        if self.path.exists():
            self.path.rename(old)
        new.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)
        self._release()
        self._lock = lock

    def _check_replaceable(self, config: Config) -> None:
        ours = (self.path / "config.toml").is_file()
        if not (config.run.overwrite or (ours and (config.run.resume == "auto" or self._is_untrained()))):
            raise UserError(EXISTS.format(self.path))
        if not ours:
            raise UserError(f"{self.path} is not a run's folder (it has no config.toml), so it is not replaced")
        if self.path.is_symlink():
            raise OSError("it is a link")

    def _is_untrained(self) -> bool:
        """Whether nothing would be lost: not one step was recorded, and there is no checkpoint."""
        metrics = self.path / "metrics.jsonl"
        recorded = metrics.is_file() and '"loss":' in metrics.read_text(encoding="utf-8")
        return not recorded and not checkpoints.steps_of(self.checkpoints)

    def go_on(self, config: Config, step: int, lengths: dict[str, int]) -> None:
        """Cuts the files back to what they were when the state after `step` was saved, and opens them."""
        try:
            metrics = self.path / "metrics.jsonl"
            evaluations = _evaluations(metrics, lengths["metrics.jsonl"], step)
            for name, length in lengths.items():
                _cut(self.path / name, length)
            lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
            while lines and not (lines[-1].endswith(b"\n") and json.loads(lines[-1])["step"] <= step):
                lines.pop()  # one that was cut off, or a step after which the run had stopped for not being finite
            _cut(metrics, sum(len(line) for line in lines))
            settings.write(config, self.path / "config.toml.tmp")
            (self.path / "config.toml.tmp").replace(self.path / "config.toml")
            self._file = metrics.open("a", encoding="utf-8")
            self._file.writelines(evaluations)
        except (OSError, ValueError) as error:
            raise _cannot_write(self.path, error) from None

    def lengths(self) -> dict[str, int]:
        """How many bytes metrics.jsonl and samples.txt have, all of them on the disk."""
        with self.writing("metrics.jsonl"):
            os.fsync(self._file.fileno())
        paths = {name: self.path / name for name in ("metrics.jsonl", "samples.txt")}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def metric(self, **values: Any) -> None:
        """Adds a line to metrics.jsonl, on disk when this returns. Numbers that are not finite become null."""
        with self.writing("metrics.jsonl"):
            self._file.write(json.dumps(_finite_only(values)) + "\n")
            self._file.flush()

    def sample(self, step: int, text: str) -> None:
        """Adds a text to samples.txt."""
        with self.writing("samples.txt") as path, path.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n\n")

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes a file of one object."""
        with self.writing(name) as path:
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The path of a file in the folder; a RunError where writing it fails: a full disk, a folder that is gone."""
        path = self.path / name
        try:
            yield path
        except OSError as error:
            raise RunError(f"{path}: writing failed ({error.strerror}). Is the disk full?") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been reported
            self._file.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Onlooker(RunFolder):
    """The folder as a process has it that is not the first: it reads checkpoints and writes nothing."""

    def __init__(self, config: Config, resumes: bool):
        self.config, self.resumes = config, resumes
        self.path = Path(config.run.folder) / config.run.name

    def go_on(self, config: Config, step: int, lengths: dict[str, int]) -> None: ...

    def lengths(self) -> dict[str, int]:
        return {}

    def metric(self, **values: Any) -> None: ...

    def sample(self, step: int, text: str) -> None: ...

    def write_json(self, name: str, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_folder(config: Config) -> RunFolder:
    """The run's folder, as this process has it."""
    if not processes.first():
        return Onlooker(config, processes.talk.from_first(lambda: False))
    folder = RunFolder(config)
    processes.talk.from_first(lambda: folder.resumes)
    return folder


def _locked(path: Path) -> int | None:
    """A descriptor of the folder, locked while it is open. UserError where another process has locked it.

    None where there are no such locks, as on Windows and on some network file systems.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{path}: another process is training this run. Wait for its end, or stop it") from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: can't write there ({reason}). Choose another folder with --run.folder")


def add_evaluation(run: Path, values: dict[str, Any]) -> str:
    """Adds a line to the metrics.jsonl of a run that isn't open here; why it wasn't added, or nothing."""
    path = run / "metrics.jsonl"
    try:
        lock = _locked(run)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**_finite_only(values), "by": EVALUATE}) + "\n")
        finally:
            if lock is not None:
                os.close(lock)
    except UserError:
        return f"{path}: not added there, because the run is being trained"
    except OSError as error:
        return f"{path}: not added there ({error.strerror})"
    return ""


def _evaluations(metrics: Path, start: int, step: int) -> list[str]:
    """The lines behind byte `start` that `add_evaluation` added, of steps up to this one."""
    if not metrics.exists():
        return []
    lines = metrics.read_bytes()[start:].decode("utf-8", "replace").splitlines(keepends=True)
    marked = [line for line in lines if f'"by": "{EVALUATE}"' in line and line.endswith("}\n")]
    return [line for line in marked if json.loads(line)["step"] <= step]


def _cut(path: Path, length: int) -> None:
    """Leaves of the file, if it is there, no more than so many bytes."""
    if path.exists():
        os.truncate(path, min(length, path.stat().st_size))


def _finite_only(values: dict[str, Any]) -> dict[str, Any]:
    """The same with null for numbers that JSON hasn't got."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
