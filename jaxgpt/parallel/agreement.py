"""Agreement of processes: a wish of any of them, to stop or to save, is known to all of them at the same step.

A process by itself may not leave the loop or begin to save, since the others would wait for it in a collective. So at
each step the processes' wishes are combined by a small program: a maximum of a few numbers over all devices. It runs
behind the step before, and its result is read one step later, when it has long been there: neither the device nor
Python waits for it. A process that trains alone gets its own wishes back.
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
    """Combines the wishes of a layout's processes. All of them have to call its methods in the same order."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._said: jax.Array | None = None
        if processes.count() > 1:
            sharded, whole = PartitionSpec(AXIS), PartitionSpec()
            self._any = layout.jit(lambda wishes: lax.pmax(wishes[0], AXIS), in_specs=sharded, out_specs=whole)

    def exchange(self, wishes: Sequence[bool]) -> list[bool]:
        """Sends this process's wishes, and returns those that any process sent at the exchange before.

        Args:
            wishes: One bool per wish, in the same order at each call and in each process.

        Returns:
            One bool per wish, all False at the first exchange. A process that trains alone gets its own at once.
        """
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
