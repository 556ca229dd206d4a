"""Writing checkpoints in the background, while training goes on.

Of several processes each writes what its devices have, and orbax waits for all of them; process 0 alone makes the
checkpoint whole and deletes older ones.
"""

import contextlib
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxgpt import writing
from jaxgpt.options.config import Checkpoint
from jaxgpt.errors import RunError
from jaxgpt.parallel import processes
from jaxgpt.runs import checkpoints, checksums
from jaxgpt.runs.checkpoints import whole_steps
from jaxgpt.training.state import TrainState


class Writer:
    """Writes checkpoints into `folder` while training goes on, and deletes those that are not to be kept.

    A context manager: at its end the last one is written. One is written at a time.
    """

    def __init__(self, folder: Path, options: Checkpoint):
        self.folder, self.options = folder, options
        self.problem = ""  # what went wrong since the last look at it
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._wanted = False
        self._clock = time.monotonic()  # when the last one was begun
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Writer":
        self._stack.enter_context(checkpoints.quiet())
        self._stack.callback(self._forget)
        # With folders made in the background, orbax would wait minutes for one that can't be made.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler()
        self._orbax = self._stack.enter_context(ocp.AsyncCheckpointer(handler, async_options=options))
        self._stack.callback(self._wait)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return not (self._thread and self._thread.is_alive())

    @property
    def late(self) -> bool:
        """Whether so many minutes have passed that the state is to be saved."""
        minutes = self.options.every_minutes
        return minutes > 0 and time.monotonic() - self._clock >= 60 * minutes

    def due(self, step: int, *, late: bool | None = None, idle: bool | None = None) -> bool:
        """Whether the state after this step is to be saved now; where the last is still being written, later.

        `late` and `idle` are what all processes have agreed on, in the place of this one's own.
        """
        steps = self.options.every_steps
        self._wanted |= steps > 0 and step % steps == 0
        self._wanted |= self.late if late is None else late
        return self._wanted and (self.idle if idle is None else idle)

    def save(self, state: TrainState, about: dict[str, Any]) -> Path:
        """Begins to write the state under its step, and returns where, once the state may be overwritten.

        What goes wrong is told in `problem`.
        """
        self._wait()
        step = int(state.step)
        path = self.folder.absolute() / str(step)
        self._wanted, self._clock = False, time.monotonic()
        if not processes.talk.from_first(lambda: checksums.is_there(path)):
            params, optimizer = checkpoints.saved_form(state)
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                about=ocp.args.JsonSave(about | {"step": step}),
            )
            try:
                writing.check_no_link(path)
                self.folder.mkdir(parents=True, exist_ok=True)
                self._orbax.save(path, args=items, force=True)
                error = ""
            except Exception as raised:  # of many types: orbax even raises Exception itself
                error = checkpoints.one_line(raised)
            if error:
                self._failed(step, error)
            else:
                self._thread = threading.Thread(target=self._finish, args=(path,))
                self._thread.start()
        return self.folder / str(step)

    def save_and_wait(self, state: TrainState, about: dict[str, Any]) -> Path:
        """`save`, to its end. RunError where the disk is full or can't be written."""
        self._wait()
        self.problem = ""
        path = self.save(state, about)
        self._wait()
        if self.problem:
            raise RunError(self.problem)
        return path

    def _finish(self, path: Path) -> None:
        """Waits until orbax has written all of it, makes it whole, and deletes what need not be kept any more."""
        try:
            self._orbax.wait_until_finished()
            if processes.first():
                checksums.write(path)
                writing.sync(self.folder.absolute().parent)  # the name of a folder that the first of them made
                steps = whole_steps(self.folder)
                for step in set(steps) - kept(steps, self.options.keep_last, self.options.keep_every):
                    delete(self.folder / str(step))
            error = ""
        except Exception as raised:  # as above
            error = checkpoints.one_line(raised)
        if error:
            self._failed(int(path.name), error)

    def _failed(self, step: int, error: str) -> None:
        self._failures += 1
        checkpoints.let_others_fail()
        if processes.first():
            delete_unfinished(self.folder)
        self.problem = f"{self.folder}: the checkpoint of step {step} could not be written: {error}"

    def _forget(self) -> None:
        """Collects what orbax holds of a save that failed, before it may print again."""
        del self._orbax
        if self._failures:
            checkpoints.let_others_fail()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()


def kept(steps: list[int], last: int, every: int) -> set[int]:
    """Which checkpoints to keep: the `last` newest, and with `every` the first at or after each multiple of it."""
    result = set(steps[-last:])
    reached = 0  # the multiple
    for step in steps if every else []:
        if step // every > reached:
            reached = step // every
            result.add(step)
    return result


def delete(path: Path) -> None:
    """Deletes a checkpoint, its SHA256SUMS first, so that what a crash leaves of it doesn't look whole."""
    (path / checksums.NAME).unlink(missing_ok=True)
    writing.sync(path)
    shutil.rmtree(path)


def delete_unfinished(folder: Path) -> None:
    """Deletes what a killed process, or a full disk, has left half written, and nothing else."""
    for path in checkpoints.unfinished(folder):
        shutil.rmtree(path, ignore_errors=True)
