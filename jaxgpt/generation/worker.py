"""The thread that draws a server's texts: requests come in from the event loop, and pieces of text go back to it."""

import queue
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

from jaxgpt.generation.texts import Batch, Request, Text
from jaxgpt.terminal import say


class Event(NamedTuple):
    """What has come of a text."""

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

    def __init__(self, batch: Batch):
        self._batch = batch
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[Text, Job] = {}
        self._thread = threading.Thread(target=self._run, name="texts", daemon=True)
        self.failed = False
        self.waiting = 0  # texts that were asked for and have not ended; changed by the event loop's thread alone
        self._thread.start()

    def ask(self, request: Request, listener: Listener) -> Job:
        job = Job(request, listener)
        self._inbox.put(("add", job))
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for the text any more."""
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
        """All that have come; waits for one where there is nothing to do. False to stop."""
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
