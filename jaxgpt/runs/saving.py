"""Writing checkpoints in the background, while training goes on.

Each process writes its devices' shards, and orbax waits for all of them; process 0 alone writes the checksums, which
make a checkpoint whole, and deletes older checkpoints.
"""

import contextlib
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxgpt import writing
from jaxgpt.errors import RunError, one_line
from jaxgpt.options.config import Checkpoint
from jaxgpt.parallel import processes
from jaxgpt.runs import best, checkpoints, checksums
from jaxgpt.runs.best import Best
from jaxgpt.runs.checkpoints import whole_steps
from jaxgpt.training.state import TrainState


class Writer:
    """Writes checkpoints into `folder`, one at a time, while training goes on, and deletes those that are not kept.

    With `keep_best` the checkpoint of the lowest validation loss is kept too, and best.json beside the folder names it.
    A context manager: leaving it waits until the last checkpoint is written.
    """

    def __init__(self, folder: Path, options: Checkpoint):
        self.folder, self.options = folder, options
        self.best: Best | None = None  # the lowest validation loss so far
        self.problem = ""  # the last failure, until its reader clears it
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._wanted = False
        self._clock = time.monotonic()  # when the last save began
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
        """Returns whether no checkpoint is being written."""
        return not (self._thread and self._thread.is_alive())

    @property
    def late(self) -> bool:
        """Returns whether `checkpoint.every_minutes` have passed since the last save began."""
        minutes = self.options.every_minutes
        return minutes > 0 and time.monotonic() - self._clock >= 60 * minutes

    def due(self, step: int, *, late: bool | None = None, idle: bool | None = None) -> bool:
        """Returns whether to save the state after this step now. A save that is due waits for the one before it.

        `late` and `idle` are what all processes have agreed on; this process's own if None.
        """
        steps = self.options.every_steps
        self._wanted |= steps > 0 and step % steps == 0
        self._wanted |= self.late if late is None else late
        return self._wanted and (self.idle if idle is None else idle)

    def save(self, state: TrainState, about: dict[str, Any]) -> Path:
        """Starts to write the state under its step; returns the checkpoint's path once the state may be overwritten.

        A failure is reported in `problem`.
        """
        self._wait()
        step = int(state.step)
        path = self.folder.absolute() / str(step)
        self._wanted, self._clock = False, time.monotonic()
        if not processes.talk.broadcast(lambda: checksums.is_there(path)):
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
                error = one_line(raised)
            if error:
                self._failed(step, error)
            else:
                self._thread = threading.Thread(target=self._finish, args=(path, self.best))
                self._thread.start()
        return self.folder / str(step)

    def save_and_wait(self, state: TrainState, about: dict[str, Any]) -> Path:
        """Saves the state, waits until it is on the disk, and returns the checkpoint. RunError where that fails."""
        self._wait()
        self.problem = ""
        path = self.save(state, about)
        self._wait()
        if self.problem:
            raise RunError(self.problem)
        return path

    def mark_best(self, *, at_end: bool = False) -> None:
        """Names the best checkpoint in best.json, once no checkpoint is being written. RunError if that fails.

        At the end of a run the best of before is deleted, if it is another and none of the newest.
        """
        self._wait()
        if processes.first():
            try:
                self._mark(self.best)
                if at_end and self.options.keep_best:
                    self._delete_others()
            except OSError as error:
                raise writing.failure(self.folder.parent / best.NAME, error) from error

    def _mark(self, found: Best | None) -> None:
        """Writes best.json where that checkpoint is whole, and deletes it where none is to be kept as the best.

        Where it could not be written, the one before it is still the best that there is.
        """
        run = self.folder.absolute().parent
        if not (self.options.keep_best and found and found.step):
            best.write(run, None)
        elif checksums.is_there(self.folder / str(found.step)):
            best.write(run, found)

    def _delete_others(self) -> None:
        """Deletes the checkpoints that are not to be kept."""
        steps = whole_steps(self.folder)
        marked = best.read(self.folder.absolute().parent) or ()
        for step in set(steps) - kept(steps, self.options.keep_last, self.options.keep_every) - {*marked[:1]}:
            delete(self.folder / str(step))

    def _finish(self, path: Path, found: Best | None) -> None:
        """Waits until orbax has written everything, writes the checksums, and deletes what need not be kept."""
        try:
            self._orbax.wait_until_finished()
            if processes.first():
                checksums.write(path)
                writing.sync(self.folder.absolute().parent)  # the first checkpoint may have made the folder
                self._mark(found)
                self._delete_others()
            error = ""
        except Exception as raised:  # as above
            error = one_line(raised)
        if error:
            self._failed(int(path.name), error)

    def _failed(self, step: int, error: str) -> None:
        self._failures += 1
        checkpoints.let_others_fail()
        if processes.first():
            delete_unfinished(self.folder)
        self.problem = f"{self.folder}: the checkpoint of step {step} could not be written: {error}"

    def _forget(self) -> None:
        """Frees what orbax holds of a failed save, before orbax may print again."""
        del self._orbax
        if self._failures:
            checkpoints.let_others_fail()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()


def kept(steps: list[int], last: int, every: int) -> set[int]:
    """Returns the steps to keep: the `last` newest, and with `every` the first at or after each multiple of it."""
    result = set(steps[-last:])
    reached = 0  # the multiple
    for step in steps if every else []:
        if step // every > reached:
            reached = step // every
            result.add(step)
    return result


def delete(path: Path) -> None:
    """Deletes a checkpoint, its SHA256SUMS first, so that a crash leaves nothing that looks whole."""
    (path / checksums.NAME).unlink(missing_ok=True)
    writing.sync(path)
    shutil.rmtree(path)


def delete_unfinished(folder: Path) -> None:
    """Deletes half-written checkpoints, and nothing else."""
    for path in checkpoints.unfinished(folder):
        shutil.rmtree(path, ignore_errors=True)
