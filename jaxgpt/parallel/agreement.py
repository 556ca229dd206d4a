"""What any process wishes, all of them learn at the same step: to stop, to save.

A process alone may not leave the loop or begin to save, since the others would wait for it in a collective. So with
each step the processes' wishes are put together in a program of its own, a maximum of a few numbers over all devices.
It runs behind the step before, and its result is read one step later, when it is long there: neither the device nor
Python waits for it. A process alone hears what it says.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxgpt.parallel import processes
from jaxgpt.parallel.mesh import AXIS
from jaxgpt.parallel.sharding import Layout


class Agreement:
    """Of the processes of a layout; all of them have to call its methods in the same order."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._said: jax.Array | None = None
        if processes.count() > 1:
            sharded, whole = PartitionSpec(AXIS), PartitionSpec()
            self._any = layout.jit(lambda wishes: lax.pmax(wishes[0], AXIS), in_specs=sharded, out_specs=whole)

    def exchange(self, wishes: Sequence[bool]) -> list[bool]:
        """Says this process's wishes; returns which of them any process had at the last exchange (at first, none)."""
        if processes.count() == 1:
            return list(wishes)
        before = self._said
        own = np.tile(np.asarray(wishes, np.int32), (len(self.layout.own_devices), 1))
        self._said = self._any(self.layout.from_processes(own, PartitionSpec(AXIS)))
        return [False] * len(wishes) if before is None else [bool(wish) for wish in np.asarray(before)]

    def now(self, wishes: Sequence[bool]) -> list[bool]:
        """Which of the wishes any process has now, for which it waits."""
        self.exchange(wishes)
        heard = self.exchange(wishes)
        self._said = None
        return heard
