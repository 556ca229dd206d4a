"""Several processes, each with its own devices, that train one model: start, communication, failure, end.

All run the same program and meet in every step's collectives. What is not an array on a device goes through the
coordination service that JAX starts in process 0: few and small JSON values, never one for each step.

A process that can't go on would leave the others waiting in a collective. So it tells all of them why, and they end
too; each has a thread that listens for it. A process that was killed can't tell: the others' next collective fails, or
else the service misses its heartbeat and ends them.
"""

import contextlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # the service's client has no public name; orbax takes it from there too

from jaxgpt.errors import AllFailed, Interrupted, JaxgptError, RunError, one_line
from jaxgpt.options.config import Parallel
from jaxgpt.parallel import cluster, meeting
from jaxgpt.terminal import end, say

HEARTBEAT_SECONDS = 30  # without a heartbeat, after which a process counts as dead
CONNECT_SECONDS = 30  # in which JAX must have connected all processes, once they have met
LONGEST_WAIT = 7 * 24 * 3600  # no limit in practice: those waited for are alive as long as their heartbeats come
LISTEN_SECONDS = 0.5
GRACE_SECONDS = 5  # in which a process that hears of a failure may end by itself, most often of the same one
AGREED = (AllFailed, Interrupted)  # errors that all processes raise at the same step
GONE = "another process has ended, or can't be reached"
GO_ON = "--resume goes on from the last checkpoint, on fewer processes too"
FAILURE, HEARD = "jaxgpt/failure", "jaxgpt/heard"


def count() -> int:
    """Returns the number of processes."""
    return distributed.global_state.num_processes if distributed.global_state.client else 1


def index() -> int:
    """Returns this process's number, from 0. Only process 0 writes the run's files and prints."""
    return distributed.global_state.process_id


def first() -> bool:
    """Returns whether this is process 0."""
    return index() == 0


@contextlib.contextmanager
def together(parallel: Parallel) -> Iterator[None]:
    """Makes this process one of several, where options or the cluster say so; at the end each waits for all.

    An error ends all processes. It is then printed here and not raised: the process ends with its status. An error that
    all processes have agreed on (`AGREED`) ends each by itself: process 0 raises it, and the others exit silently.
    """
    place = cluster.find(parallel)
    if place is None:
        yield
        return
    _start(place)
    listener, agreed = _Listener(), None
    try:
        try:
            yield
        except AGREED as error:
            agreed = error
        # Process 0 has most to do at the end, and the service is in it: none may leave before all are here.
        wait_for_all("end")
    except BaseException as error:  # Ctrl-C and a bug's exceptions too
        tell(error)
        listener.stop()
        _end(error)
    listener.stop()
    if agreed and not first():
        raise SystemExit(agreed.status)
    if agreed:
        raise agreed


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tells the other processes of an error. Enter it last, so that they hear of it before cleanup starts.

    Nothing that is then closed has to wait for them.
    """
    try:
        yield
    except AGREED:
        raise
    except BaseException as error:
        tell(error)
        raise


def _start(place: cluster.Place) -> None:
    """Meets the other processes and connects JAX to them. Where JAX can't, prints that and ends the process."""
    # JAX would take SIGTERM for itself, and from here on: a run could not be stopped while it compiles.
    jax.config.update("jax_enable_preemption_service", False)
    meeting.meet(place)
    failed = f"{meeting.who(place)} has met the others at {place.coordinator}, and JAX could not connect to them"
    patience = threading.Timer(CONNECT_SECONDS, _leave, [failed])  # JAX's own would end with SIGABRT
    patience.daemon = True
    patience.start()
    try:
        with meeting.instead_of_abort(_lost):
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=2 * CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except Exception as error:  # of many types
        # A service that did not start leaves something behind that would crash an ordinary exit.
        _leave(f"{failed}: {one_line(error)}")
    finally:
        patience.cancel()


def _leave(message: str) -> NoReturn:
    """Prints an error and ends the process at once."""
    say(f"error: {message}", error=True)
    os._exit(RunError.status)


def _client() -> Any:
    return distributed.global_state.client


def wait_for_all(name: str) -> None:
    """Waits until all processes are here. Each name may be used once."""
    if count() > 1:
        _client().wait_at_barrier(f"jaxgpt/{name}", 1000 * LONGEST_WAIT)


class Talk:
    """Broadcast and all-gather of small JSON values; every process calls them in the same order."""

    def __init__(self) -> None:
        self._said = 0

    def _key(self) -> str:
        self._said += 1
        return f"jaxgpt/said/{self._said}"

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Broadcasts the JSON value that `make` returns in process 0. An error of `make` ends all processes."""
        if count() == 1:
            return make()
        key = self._key()
        if first():
            said = make()
            _client().key_value_set(key, json.dumps(said))
            return said
        return _heard(key)

    def all_gather(self, own: Any) -> list[Any]:
        """All-gathers each process's own JSON value; returns them in the order of the processes."""
        if count() == 1:
            return [own]
        key = self._key()
        _client().key_value_set(f"{key}/{index()}", json.dumps(own))
        return [_heard(f"{key}/{process}") for process in range(count())]


talk = Talk()


def _heard(key: str) -> Any:
    return json.loads(_client().blocking_key_value_get(key, 1000 * LONGEST_WAIT))


class Failure(NamedTuple):
    """The cause for which a process can't go on."""

    message: str
    status: int  # exit status of all processes
    process: int


def _failure(error: BaseException) -> Failure:
    """Returns what the other processes are told of this one's error."""
    if isinstance(error, KeyboardInterrupt):
        return Failure("stopped with Ctrl-C", Interrupted.status, index())
    if isinstance(error, JaxgptError):
        return Failure(str(error), error.status, index())
    if _of_another(error):
        return Failure(f"{GONE} ({one_line(error)}). {GO_ON}", RunError.status, index())
    return Failure(f"{type(error).__name__}: {one_line(error)}", RunError.status, index())


def _of_another(error: BaseException) -> bool:
    """Returns whether a collective or the service failed, so that the fault is in another process."""
    return any(word in str(error) for word in ("Gloo", "NCCL", "coordination", "Barrier"))


def tell(error: BaseException) -> None:
    """Tells all processes why this one can't go on, unless one has told its own cause before."""
    if count() > 1:
        with contextlib.suppress(Exception):  # another was first, or the service is gone
            _client().key_value_set(FAILURE, json.dumps(_failure(error)))


def _told() -> Failure | None:
    """Returns the failure that was told first, or None."""
    try:
        return Failure(*json.loads(_client().key_value_try_get(FAILURE)))
    except Exception:  # nothing was, or the service is gone
        return None


class _Listener:
    """A thread that ends this process where another tells that it can't go on."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._done.wait(LISTEN_SECONDS):
            if _told():
                if not self._done.wait(GRACE_SECONDS):
                    _end(None)
                return


def _lost() -> None:
    """Ends this process where JAX's service is gone, or says that another process is."""
    if _first_to_end():
        _leave(f"{GONE}. {GO_ON}")


_ending = threading.Lock()


def _first_to_end() -> bool:
    """Returns whether the calling thread is the first that ends this process.

    For any other thread it returns only once the first one has had time to end the process.
    """
    if _ending.acquire(blocking=False):
        return True
    time.sleep(LISTEN_SECONDS + 2 * GRACE_SECONDS)
    return False


def _end(error: BaseException | None) -> None:
    """Prints the failure that was told, or this process's own error, and ends the process at once.

    An ordinary exit would wait for the others.
    """
    _first_to_end()
    own = _failure(error) if error else None
    failure = _told() or own or Failure("another process has ended", RunError.status, index())
    if error and not isinstance(error, JaxgptError | KeyboardInterrupt) and not _of_another(error):
        traceback.print_exception(error)
    if failure.process == index():
        say(f"error: {failure.message}", error=True)
    elif first() or own is None or own.message != failure.message:
        say(f"error: process {failure.process} failed: {failure.message}", error=True)
    if first():
        _wait_for_listeners()
    else:
        with contextlib.suppress(Exception):
            _client().key_value_increment(HEARD, 1)
    end(failure.status)


def _wait_for_listeners() -> None:
    """Waits, in process 0, until the others have heard of the failure, but not for those that hang.

    Without the service, which is in process 0, they would not hear of it.
    """
    until = time.monotonic() + LISTEN_SECONDS + GRACE_SECONDS + 1
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            if int(_client().key_value_try_get(HEARD)) >= count() - 1:
                return
        time.sleep(LISTEN_SECONDS / 5)
