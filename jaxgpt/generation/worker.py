"""The thread that draws a server's texts: requests come in from the event loop, and pieces of text go back to it."""

import asyncio
import contextlib
import queue
import threading
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from jaxgpt.generation.api import ApiError
from jaxgpt.generation.batching import ContinuousBatch, Request, ScoredToken, Text
from jaxgpt.terminal import say

LOOK_SECONDS = 0.5  # between looks whether a client that waits for its whole answer is still there


class Event(NamedTuple):
    piece: str
    tokens: int  # drawn so far
    ended: str  # "stop" or "length" with the last piece, "failed" where there will be no more, else ""
    scored: Sequence[ScoredToken] = ()  # the piece's tokens, where their log-probabilities are wanted
    error: str = ""  # why this text alone failed


Listener = Callable[[Event], object]  # called in the worker's thread; each text has one of its own
FAILED = Event("", 0, "failed")


class Worker:
    """Draws texts in a thread of its own, until it is stopped."""

    def __init__(self, batch: ContinuousBatch):
        self._batch = batch
        self._inbox: queue.SimpleQueue[tuple[Request | None, Listener] | None] = queue.SimpleQueue()
        self._listeners: dict[Text, Listener] = {}
        self._thread = threading.Thread(target=self._run, name="texts", daemon=True)
        self.failed = False
        self.drawings: set[Drawing] = set()  # changed by the event loop's thread alone
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of texts that were asked for and have not ended; for the event loop's thread."""
        return sum(map(len, self.drawings))

    def ask(self, request: Request, listener: Listener) -> None:
        """Asks for a text; the listener is called with each of its events."""
        self._inbox.put((request, listener))

    def cancel(self, listener: Listener) -> None:
        """Cancels the listener's text, for which nobody waits any more."""
        self._inbox.put((None, listener))

    def stop(self) -> None:
        """Ends the thread, after the tokens that are being drawn."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_messages():
                for text, piece in self._batch.turn():
                    listener = self._listeners[text]
                    if text.ended:
                        del self._listeners[text]
                    listener(Event(piece, len(text.tokens), text.ended, text.scored, text.error))
        except Exception:  # memory that ran out, most likely: the server says so to everybody who waits
            say(traceback.format_exc(), error=True)
            self.failed = True
            for listener in self._listeners.values():
                listener(FAILED)
            while message := self._inbox.get():
                request, listener = message
                if request:
                    listener(FAILED)

    def _take_messages(self) -> bool:
        """Handles all messages that have come, waiting for one where there is nothing to do. Returns False to stop."""
        while not self._inbox.empty() or not len(self._batch):
            if (message := self._inbox.get()) is None:
                return False
            request, listener = message
            if request:
                self._listeners[self._batch.add(request)] = listener
                continue
            for text in [text for text, found in self._listeners.items() if found is listener]:
                del self._listeners[text]
                self._batch.remove(text)
        return True


class Drawing(contextlib.AbstractContextManager):
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

        self._listeners = {number: listener(number) for number in range(len(requests))}  # of texts that haven't ended
        for request, hear in zip(requests, self._listeners.values(), strict=True):
            worker.ask(request, hear)
        worker.drawings.add(self)

    def __len__(self) -> int:
        return len(self._listeners)

    def __exit__(self, *error: Any) -> None:
        self._worker.drawings.discard(self)
        for listener in self._listeners.values():
            self._worker.cancel(listener)
        self._listeners.clear()

    def fail(self, error: ApiError) -> None:
        """Sends an error to whoever waits for the texts."""
        self._queue.put_nowait(error)

    async def events(self, has_left: Callable[[], Awaitable[bool]] | None = None) -> AsyncGenerator[tuple[int, Event]]:
        """Yields pieces of all texts as they come, until all have ended or the client has left.

        ApiError where there will be no more.
        """
        while self._listeners:
            try:
                found = await asyncio.wait_for(self._queue.get(), LOOK_SECONDS if has_left else None)
            except TimeoutError:
                if has_left and await has_left():
                    return
                continue
            if isinstance(found, ApiError):
                raise found
            number, event = found
            if event.error:
                raise ApiError(400, event.error, code="constraint_failed")
            if event.ended == "failed":
                raise ApiError(500, "the model failed; the server's log says why")
            if event.ended:
                self._listeners.pop(number, None)
            yield number, event
