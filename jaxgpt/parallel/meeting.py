"""Rendezvous of the processes before JAX connects them: one TCP connection from each to process 0.

JAX waits for minutes without a message where a process is missing, and where two have the same number its C++ code
aborts all of them. Here process 0 counts those that come, at the port where JAX's service is to listen afterwards. So
it can name the ones that are missing or came twice, and each end of a connection learns at once that the other has
died. The lines that they send:

    process 0    "jaxgpt"
    another      "PROCESSES PROCESS"
    process 0    "meet", to all once all are there, or "STATUS MESSAGE", to all where they can't train together
"""

import contextlib
import ctypes
import functools
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator

from jaxlib import _jax  # type: ignore[reportAttributeAccessIssue]

from jaxgpt import environment
from jaxgpt.errors import JaxgptError, RunError, UserError, reason
from jaxgpt.parallel.cluster import Place

START_SECONDS = 45  # in which all processes must have come, unless the variable says otherwise
SECONDS_VARIABLE = "JAXGPT_START_SECONDS"
GREETING_SECONDS = 2  # in which an end that is there says its first line
RETRY_SECONDS = 0.2
GREETING, MEET = b"jaxgpt\n", b"meet\n"
LINE = 4096  # bytes, at most


def meet(place: Place) -> None:
    """Waits until all processes are there.

    UserError where process 0 can't listen, two processes have the same number, or not all were told the same count;
    RunError where not all have come, or one has ended before all had.
    """
    if place.processes > 1:
        (_gather if place.process == 0 else _join)(place)


def start_seconds() -> float:
    """Returns the seconds in which all processes must have come. UserError where the variable has no number."""
    return environment.needed(SECONDS_VARIABLE, START_SECONDS)


def who(place: Place) -> str:
    """Returns a process's name in messages."""
    return f"process {place.process} of {place.processes} ({place.source})"


# Process 0


def _gather(place: Place) -> None:
    """Waits for the other processes, and replies to all of them once they are there or can't train together."""
    until = time.monotonic() + start_seconds()
    links: list[socket.socket] = []  # of all that have come, also of one that isn't welcome
    reply = b""
    try:
        with _listening(place) as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ, 0)
            numbers: set[int] = set()
            while len(numbers) < place.processes - 1:
                ready = selector.select(max(until - time.monotonic(), 0))
                if time.monotonic() >= until:
                    raise RunError(_missing(place, numbers))
                for key, _ in ready:
                    if key.data:  # the others say no more than their first line
                        raise RunError(f"process {key.data} has ended before all {place.processes} had met")
                if link := _accepted(server):
                    links.append(link)
                    if number := _admitted(link, place, numbers):
                        selector.register(link, selectors.EVENT_READ, number)
                        numbers.add(number)
                    else:
                        link.close()
        reply = MEET  # now that the port is free again
    except JaxgptError as error:
        reply = f"{error.status} {' '.join(str(error).split())}\n".encode()[:LINE]
        raise
    finally:
        for link in links:
            with contextlib.suppress(OSError), link:  # one that has ended itself
                link.sendall(reply)


def _listening(place: Place) -> socket.socket:
    """Opens the coordinator's port, for IPv6 too where the system has it. UserError where it can't be opened."""
    port = int(place.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("::" if both else "", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"{who(place)} can't listen at {place.coordinator}: {os.strerror(error.errno or 0)}. Is the port free?"
        ) from error


def _accepted(server: socket.socket) -> socket.socket | None:
    """Accepts a connection that waits for it; None where there is none."""
    server.settimeout(0)
    try:
        link, _ = server.accept()
    except OSError:
        return None
    link.settimeout(GREETING_SECONDS)
    return link


def _admitted(link: socket.socket, place: Place, numbers: set[int]) -> int | None:
    """Returns the number of the process at the other end; None where it is no process of this program.

    UserError where it was started with another number of processes, or its own number is taken or out of range.
    """
    try:
        link.sendall(GREETING)
        count, number = map(int, _line(link).split())
    except (OSError, ValueError):  # a port scanner
        return None
    if count != place.processes:
        raise UserError(
            f"process {number} was started as one of {count} processes, and process 0 as one of {place.processes}: "
            "give all of them the same --parallel.processes"
        )
    if number in numbers or not 0 < number < count:
        raise UserError(f"two processes were started as number {number} of {count}: each needs a number of its own")
    return number


def _missing(place: Place, numbers: set[int]) -> str:
    absent = [str(number) for number in range(1, place.processes) if number not in numbers]
    names = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return (
        f"{who(place)} waited {start_seconds()} seconds at {place.coordinator} for process{'es' * (len(absent) > 1)} "
        f"{names}. Were all of them started, with that address, and is the port open to them?"
    )


# The others


def _join(place: Place) -> None:
    """Waits for process 0 to be there, and then for its reply. UserError or RunError as it says."""
    until = time.monotonic() + start_seconds()
    while True:
        try:
            reply = _reply(place, until)
            break
        except OSError as error:  # process 0 may be about to start
            if time.monotonic() >= until:
                raise RunError(
                    f"{who(place)} waited {start_seconds()} seconds for process 0 at {place.coordinator}: "
                    f"{reason(error)}. Was it started, is it there, with a port that is free and open, and did it not "
                    "end at once?"
                ) from None
        time.sleep(RETRY_SECONDS)
    if reply == MEET:
        return
    status, _, message = reply.decode(errors="replace").strip().partition(" ")
    if not message:
        raise RunError(f"process 0 has ended before all {place.processes} had met")
    raise (UserError if status == str(UserError.status) else RunError)(f"process 0 says: {message}")


def _reply(place: Place, until: float) -> bytes:
    """Returns process 0's reply once all have come; b"" where it has ended. OSError where it isn't there."""
    host, _, port = place.coordinator.rpartition(":")
    left = max(until - time.monotonic(), RETRY_SECONDS)
    with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 10)) as link:
        link.settimeout(GREETING_SECONDS)
        try:
            greeting = _line(link)
        except TimeoutError:
            greeting = b""
        if greeting != GREETING:
            raise OSError("another program listens there")
        try:
            link.sendall(f"{place.processes} {place.process}\n".encode())
            link.settimeout(start_seconds() + GREETING_SECONDS)  # process 0 may have begun to wait just now
            return _line(link)
        except OSError:
            return b""


def _line(link: socket.socket) -> bytes:
    """Reads the other end's next line, of at most `LINE` bytes, after which it waits for an answer."""
    line = b""
    while not line.endswith(b"\n") and len(line) < LINE:
        more = link.recv(LINE - len(line))
        if not more:
            break
        line += more
    return line


# Once they have met

_kept = []  # keeps alive what C++ has pointers to


@contextlib.contextmanager
def instead_of_abort(function: Callable[[], None]) -> Iterator[None]:
    """Has clients of JAX's service that are made inside call a function where they would abort the process.

    Where the processes have lost each other, JAX would abort this one, with a trace of its C++ code. It takes a
    callback instead, but up to 0.12 it fails to hand Python the reason: it throws a C++ exception that nobody catches,
    for which the C++ library aborts the process as well. So this one exception is caught in the C++ library's terminate
    handler, where all uncaught ones arrive.

    The function, which is to end the process, is called in a thread of the client's. It is not used where the C++
    library is another one than GCC's (libstdc++): there JAX aborts as ever.
    """
    if not _catch_bad_cast(function):
        yield
        return
    make = _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lambda *_: function())
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


def _catch_bad_cast(function: Callable[[], None]) -> bool:
    """Has an uncaught std::bad_cast call a function before the process aborts. Returns False without libstdc++."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, current = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError):
        return False
    handler_type = ctypes.CFUNCTYPE(None)
    set_terminate.argtypes, set_terminate.restype = [handler_type], ctypes.c_void_p
    current.restype = ctypes.POINTER(ctypes.c_void_p)
    before = []

    @handler_type
    def terminate() -> None:
        thrown = current()
        # A std::type_info: a pointer to its table of functions, and one to its name.
        if thrown and ctypes.string_at(thrown[1] or 0) == b"St8bad_cast":
            function()
        handler_type(before[0])()

    before.append(set_terminate(terminate))
    _kept.append(terminate)
    return True
