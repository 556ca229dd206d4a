"""Signals and the deadline that end a run early.

They are Ctrl-C, SIGTERM, a closed terminal (SIGHUP), and the end of a Slurm allocation. The step under way is always
finished.
"""

import signal
import time
from types import FrameType
from typing import NamedTuple

from jaxgpt import environment
from jaxgpt.errors import HungUp, Interrupted, Terminated

HANGUP = getattr(signal, "SIGHUP", None)  # Windows hasn't got it
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970


class Ending(NamedTuple):
    reason: str
    error: type[Interrupted]


CTRL_C, SIGTERM, SIGHUP, ALLOCATION = ENDINGS = (
    Ending("with Ctrl-C", Interrupted),
    Ending("by SIGTERM", Terminated),
    Ending("by SIGHUP", HungUp),
    Ending("before the end of the Slurm allocation", Terminated),
)


class Stop:
    """Records signals in `ending` instead of ending the process; a second Ctrl-C ends it at once. A context manager.

    Where `minutes_before_end` is not 0, the time so many minutes before the end of a Slurm allocation counts as a
    signal too. Under nohup SIGHUP stays ignored.
    """

    def __init__(self, minutes_before_end: float = 0):
        self.ending: Ending | None = None
        end = environment.number(SLURM_END) if minutes_before_end else None
        self._deadline = None if end is None else end - 60 * minutes_before_end

    def __enter__(self) -> "Stop":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
            numbers.append(HANGUP)
        self._previous = {number: signal.signal(number, self._received) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        if not self.ending and self._deadline is not None and time.time() >= self._deadline:
            self.ending = ALLOCATION
        return bool(self.ending)

    def wishes(self) -> list[bool]:
        """Returns for each of `ENDINGS` whether this process wishes to end for it."""
        self.requested()
        return [self.ending is ending for ending in ENDINGS]

    def _received(self, number: int, _frame: FrameType | None) -> None:
        """Records a signal. Prints nothing, since the signal may have interrupted a print."""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.ending:
            self.ending = {signal.SIGINT: CTRL_C, HANGUP: SIGHUP}.get(number, SIGTERM)
