"""Display of a training run.

On a terminal: one live line, and a line kept for each evaluation. Into a file or a pipe: plain lines.
"""

import contextlib
import io
import os
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from jaxgpt.errors import reason
from jaxgpt.foreign_text import printable

PLAIN_SECONDS = 10  # between plain lines, where there is no terminal
PLAIN_WIDTH = 80  # characters of a line, where the terminal has none
SMOOTHING = 0.9


class TimeLeft(ProgressColumn):
    """The time left, in hours, minutes and seconds, at the run's mean speed, evaluations included."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.time_remaining is None:
            return Text("")
        minutes, seconds = divmod(round(task.time_remaining), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f" {hours}:{minutes:02}:{seconds:02} left" if hours else f" {minutes}:{seconds:02} left")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raises the error again, where a rich console would end the process."""
        raise


def silent() -> Console:
    """Returns a console that prints nothing, for the processes beside the one that prints."""
    return Console(file=io.StringIO(), quiet=True)


class Display:
    """Prints a run's live line with `step` after each step, and lines that stay with `note`. A context manager.

    Where lines can't be written any more, because a pipe's reader has left or the disk is full, `lost` says why, and
    nothing more is written.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self.console = console or _Console(highlight=False)
        if self.console.width < 1:  # COLUMNS=0, as some containers set it, leaves no room for a letter
            self.console.width = PLAIN_WIDTH
        self.lost = ""
        self.steps = steps
        self.rate: float | None = None  # tokens/s, smoothed
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._compiled = False  # the first step's time includes compiling, so it gives no speed
        self._printed = 0.0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            TimeLeft(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),  # the only part that shrinks where the terminal is narrow
            console=self.console,
            disable=not self.live,
            speed_estimate_period=3600,  # seconds; steps may take minutes each
        )
        self._task = self._progress.add_task("compiling …", total=steps)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the live line; it stays as it is. Notes may follow."""
        with self._printing():
            self._progress.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays; on a terminal, long ones are broken between words."""
        with self._printing():
            self.console.print(Text(printable(text)), soft_wrap=not self.console.is_terminal)

    @contextlib.contextmanager
    def _printing(self) -> Iterator[None]:
        """Records an error while printing in `lost`, and switches all further printing off."""
        try:
            yield
        except OSError as error:
            self.lost = reason(error)
            self.console.quiet = True
            with contextlib.suppress(OSError):  # buffers are flushed to the null device, which can't fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())

    def resume(self, step: int) -> None:
        """Shows that `step` steps are done already."""
        with self._printing():
            self._progress.reset(self._task, completed=step, description="compiling …")

    def step(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        flops_per_second: float,
        utilisation: float | None,
        words: str = "",
    ) -> None:
        """Shows on the live line that `step` steps are done, with the last one's loss and its speed.

        The speed is shown in FLOP/s too where the model FLOPs utilisation, from 0 to 1, is unknown. `words` say more of
        the step.
        """
        line = f"step {step}/{self.steps}  loss {loss:.4f}" + (f"  {words}" if words else "")
        if self._compiled:
            previous = tokens_per_second if self.rate is None else self.rate
            self.rate = SMOOTHING * previous + (1 - SMOOTHING) * tokens_per_second
            line += f"  {self.rate:,.0f} tokens/s  "
            line += f"{flops_per_second / 1e12:.3g} TFLOP/s" if utilisation is None else f"MFU {utilisation:.1%}"
        self._compiled = True
        with self._printing():
            self._progress.update(self._task, completed=step, description=line)
        if not self.live and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.note(line)
