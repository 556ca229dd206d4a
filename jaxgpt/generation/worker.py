"""The thread that draws a server's texts: requests come in from the event loop, and pieces of text go back to it."""

import asyncio
import contextlib
import queue
import threading
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from jaxgpt.generation.api import ApiError
from jaxgpt.generation.batching import ContinuousBatch, Request, Text
from jaxgpt.terminal import say

LOOK_SECONDS = 0.5  # between looks whether a client that waits for its whole answer is still there


class Event(NamedTuple):
    piece: str
    tokens: int  # drawn so far
    ended: str  # "stop" or "length" with the last piece, "failed" where there will be no more, else ""


Listener = Callable[[Event], object]  # called in the worker's thread


class Job:
    """A text that was asked for."""

    def __init__(self, request: Request, listener: Listener):
        self.request, self.listener = request, listener
        self.text: Text | None = None  # once the worker has it


class Worker:
    """Draws texts in a thread of its own, until it is stopped."""

    def __init__(self, batch: ContinuousBatch):
        self._batch = batch
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[Text, Job] = {}
        self._thread = threading.Thread(target=self._run, name="texts", daemon=True)
        self.failed = False
        self.drawings: set[Drawing] = set()  # changed by the event loop's thread alone
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of texts that were asked for and have not ended; for the event loop's thread."""
        return sum(map(len, self.drawings))

    def ask(self, request: Request, listener: Listener) -> Job:
        """Asks for a text; the listener is called with each of its events."""
        job = Job(request, listener)
        self._inbox.put(("add", job))
        return job

    def cancel(self, job: Job) -> None:
        """Cancels a text that nobody waits for any more."""
        self._inbox.put(("cancel", job))

    def stop(self) -> None:
        """Ends the thread, after the tokens that are being drawn."""
        self._inbox.put(("stop", None))
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                for text, piece in self._batch.turn():
                    job = self._jobs[text]
                    if text.ended:
                        del self._jobs[text]
                    job.listener(Event(piece, len(text.tokens), text.ended))
        except Exception:  # memory that ran out, most likely: the server says so to everybody who waits
            say(traceback.format_exc(), error=True)
            self.failed = True
            for job in self._jobs.values():
                job.listener(Event("", 0, "failed"))
            while True:
                what, job = self._inbox.get()
                if what == "stop":
                    return
                if what == "add" and job:
                    job.listener(Event("", 0, "failed"))

    def _take_messages(self) -> bool:
        """Handles all messages that have come, waiting for one where there is nothing to do. Returns False to stop."""
        while not self._inbox.empty() or not len(self._batch):
            what, job = self._inbox.get()
            if job is None:
                return False
            if what == "add":
                job.text = self._batch.add(job.request)
                self._jobs[job.text] = job
            elif job.text is not None and self._jobs.pop(job.text, None):
                self._batch.remove(job.text)
        return True


class Drawing:
    """The texts of one request, for the event loop. A context manager: its exit cancels texts that haven't ended."""

    def __init__(self, worker: Worker, requests: Sequence[Request]):
        self._worker = worker
        self._queue: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(number: int) -> Listener:
            def hear(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has been closed, so nobody waits
                    loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

            return hear

        self._jobs = {number: worker.ask(request, listener(number)) for number, request in enumerate(requests)}
        worker.drawings.add(self)

    def __len__(self) -> int:
        return len(self._jobs)

    def __enter__(self) -> "Drawing":
        return self

    def __exit__(self, *error: Any) -> None:
        self._worker.drawings.discard(self)
        for job in self._jobs.values():
            self._worker.cancel(job)
        self._jobs.clear()

    def fail(self, error: ApiError) -> None:
        """Sends an error to whoever waits for the texts."""
        self._queue.put_nowait(error)

    async def events(self, has_left: Callable[[], Awaitable[bool]] | None = None) -> AsyncGenerator[tuple[int, Event]]:
        """Yields pieces of all texts as they come, until all have ended or the client has left.

        ApiError where there will be no more.
        """
        while self._jobs:
            try:
                found = await asyncio.wait_for(self._queue.get(), LOOK_SECONDS if has_left else None)
            except TimeoutError:
                if has_left and await has_left():
                    return
                continue
            if isinstance(found, ApiError):
                raise found
            number, event = found
            if event.ended == "failed":
                raise ApiError(500, "the model failed; the server's log says why")
            if event.ended:
                self._jobs.pop(number, None)
            yield number, event
