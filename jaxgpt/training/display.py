"""What a person sees while a run goes on.

On a terminal: one live line, and a line kept for each evaluation. Into a file or a pipe: plain lines.
"""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10  # between plain lines, where there is no terminal
SMOOTHING = 0.9


class Display:
    """A context manager; `step` after each step, `note` for lines that stay."""

    def __init__(self, steps: int, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.steps = steps
        self.rate: float | None = None  # tokens/s, smoothed
        self._printed = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("compiling …", total=steps)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def step(self, step: int, loss: float, tokens_per_second: float, utilisation: float | None) -> None:
        """`step` of them are done; `utilisation` is the model FLOPs utilisation of the last one, None if unknown."""
        if self.rate is None or step <= 2:  # the first step's time is the compiler's
            self.rate = tokens_per_second
        self.rate = SMOOTHING * self.rate + (1 - SMOOTHING) * tokens_per_second
        line = f"step {step}/{self.steps}  loss {loss:.4f}  {self.rate:,.0f} tokens/s"
        if utilisation is not None:
            line += f"  MFU {utilisation:.1%}"
        self._progress.update(self._task, completed=step, description=line)
        if not self.console.is_terminal and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.note(line)
