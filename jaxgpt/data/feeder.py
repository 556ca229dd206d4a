"""Makes batches in the background, so that the step doesn't wait for the disk."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from jaxgpt.data.loader import Batch

AHEAD = 2  # batches made before they are asked for


class Feeder:
    """Context manager whose `next()` returns make(first), make(first + 1), ..., computed ahead of time by one thread.

    An exception of `make` is raised by the `next` that would have returned its batch.

    Attributes:
        waited: Seconds that the last `next` waited.
    """

    def __init__(self, make: Callable[[int], Batch], first: int) -> None:
        self.waited = 0.0
        self._make, self._step = make, first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._batches: deque[Future[Batch]] = deque()
        for _ in range(AHEAD):
            self._begin()

    def _begin(self) -> None:
        self._batches.append(self._thread.submit(self._make, self._step))
        self._step += 1

    def next(self) -> Batch:
        """Returns the next batch, and has the thread make another one."""
        started = time.perf_counter()
        batch = self._batches.popleft().result()
        self.waited = time.perf_counter() - started
        self._begin()
        return batch

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
