"""Decisions of all processes at the same step: when a run ends early, and when it is saved.

Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and the end of a Slurm allocation end a run; the step under way is always
finished. A process by itself may not leave the loop or begin to save, since the others would wait for it in a
collective. So at each step the processes' wishes are combined by a small program: a maximum of a few numbers over all
devices. It runs behind the step before, and its result is read one step later, when it has long been there: neither
the device nor Python waits for it.
"""

import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxgpt import environment
from jaxgpt.commands.display import Display
from jaxgpt.errors import HungUp, Interrupted, Terminated
from jaxgpt.parallel import processes
from jaxgpt.parallel.mesh import AXIS
from jaxgpt.parallel.sharding import Layout
from jaxgpt.runs.saving import Writer

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


class Agreement:
    """Combines the wishes of a layout's processes. All of them have to call its methods in the same order.

    A wish is a bool, and wishes come in the same order at each call. A process that trains alone gets its own back.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self._said: jax.Array | None = None
        if processes.count() > 1:
            sharded, whole = PartitionSpec(AXIS), PartitionSpec()
            self._any = layout.jit(lambda wishes: lax.pmax(wishes[0], AXIS), in_specs=sharded, out_specs=whole)

    def exchange(self, wishes: Sequence[bool]) -> list[bool]:
        """Sends this process's wishes; returns those that any process sent at the exchange before, at first none."""
        if processes.count() == 1:
            return list(wishes)
        before = self._said
        own = np.tile(np.asarray(wishes, np.int32), (len(self.layout.own_devices), 1))
        self._said = self._any(self.layout.from_processes(own, PartitionSpec(AXIS)))
        return [False] * len(wishes) if before is None else [bool(wish) for wish in np.asarray(before)]

    def now(self, wishes: Sequence[bool]) -> list[bool]:
        """Returns which of the wishes any process has now; waits for all processes."""
        self.exchange(wishes)
        heard = self.exchange(wishes)
        self._said = None
        return heard


class Decisions:
    """Decisions that all processes make together: all have to call the methods in the same order.

    A run ends or is saved only after a step whose number `every` divides.
    """

    def __init__(self, layout: Layout, stop: Stop, writer: Writer, display: Display, every: int = 1):
        self.every = every
        self._agreement, self._stop, self._writer, self._display = Agreement(layout), stop, writer, display
        self.ending: Ending | None = None  # why the run is to end
        self.lost = ""  # why nothing can be printed any more, which ends it as well
        self._late, self._idle = False, True

    def ends(self, step: int) -> bool:
        """Returns whether the run ends after this step.

        It does one step after a process wished it, or at once where it is alone, as soon as it may.
        """
        self._agree(self._agreement.exchange)
        return step % self.every == 0 and bool(self.ending or self.lost)

    def settle(self) -> None:
        """Waits for all processes and takes over what any of them wishes now."""
        self._agree(self._agreement.now)

    def save_is_due(self, step: int) -> bool:
        """Returns whether to save the state after this step now."""
        alone = processes.count() == 1
        due = self._writer.due(step) if alone else self._writer.due(step, late=self._late, idle=self._idle)
        return due and step % self.every == 0  # what is due stays so until then

    def _agree(self, put_together: Callable[[Sequence[bool]], list[bool]]) -> None:
        wishes = [bool(self._display.lost), self._writer.late, not self._writer.idle]
        *endings, lost, self._late, busy = put_together([*self._stop.wishes(), *wishes])
        self._idle = not busy
        self.ending = next((ending for ending, wished in zip(ENDINGS, endings, strict=True) if wished), None)
        self.lost = (self._display.lost or "process 0 says why") if lost else ""
