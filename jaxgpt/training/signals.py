"""What ends a run early: Ctrl-C, SIGTERM, and the end of a Slurm allocation. The step under way is always finished."""

import os
import signal
import time
from types import FrameType

from jaxgpt.errors import Interrupted, Terminated

SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970


class Stop:
    """A context manager inside of which Ctrl-C and SIGTERM only set `reason`; a second Ctrl-C ends the process at once.

    The allocation's end counts where `minutes_before_end` is not 0.
    """

    def __init__(self, minutes_before_end: float = 0):
        self.reason = ""
        self.error: type[Interrupted] = Interrupted
        end = os.environ.get(SLURM_END, "")
        self._deadline = int(end) - 60 * minutes_before_end if minutes_before_end and end.isdecimal() else None

    def __enter__(self) -> "Stop":
        self._previous = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        if not self.reason and self._deadline is not None and time.time() >= self._deadline:
            self.reason, self.error = "before the end of the Slurm allocation", Terminated
        return bool(self.reason)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        """Nothing is printed here: what it interrupts may be halfway through a print."""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.reason:
            interrupt = number == signal.SIGINT
            self.reason, self.error = ("with Ctrl-C", Interrupted) if interrupt else ("by SIGTERM", Terminated)
