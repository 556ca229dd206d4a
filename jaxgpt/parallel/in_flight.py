"""A limit on the number of programs that are dispatched to the devices at once.

JAX returns before a program has run, so a loop that only dispatches fills the devices' queues: with batches, for which
there may be no room, and on simulated devices until they deadlock. XLA's CPU client takes 32 programs a
device. The launch of one more waits for room, in a thread of the pool that also runs the programs; with few cores the
pool has no more threads than there are devices. With one of them waiting, a program whose devices have to meet in a
collective never gets all the threads that it needs, and there is never room.

So results are read while the loop goes on. The device has the next programs in its queue meanwhile.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax

MOST = 4  # programs dispatched and not known to be done; the training loop has two


def in_turn(results: Iterable[Any]) -> Iterator[Any]:
    """Yields the results of dispatched programs, in NumPy's memory and in their order.

    Args:
        results: Dispatches a program for each result that is asked of it. The next one is asked for as soon as fewer
            than `MOST` programs are in flight.
    """
    waiting: deque[Any] = deque()
    for result in results:
        waiting.append(result)
        if len(waiting) == MOST:
            yield _read(waiting.popleft())
    while waiting:
        yield _read(waiting.popleft())


def _read(result: Any) -> Any:
    """Returns a result in NumPy's memory; waits for all devices, and not only for the one that it is read from."""
    return jax.device_get(jax.block_until_ready(result))
